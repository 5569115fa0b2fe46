"""How far back a model looks, recomputed by hand on a real tiny model."""

import json
from dataclasses import replace

import pytest
import torch

from kogia.checkpoint.open import open_model
from kogia.engine.config import EngineConfig
from kogia.engine.request import Completion
from kogia.eval.config import ContextConfig
from kogia.eval.context import by_cell, default_lengths, hidden_keys, main, plan_measurement
from kogia.eval.intervals import unbounded_interval
from kogia.model.packed import pack

WORDS = "say 1 2 3 4 5 6 7 8 9 10 11 "


@pytest.fixture
def config(checkpoint, tmp_path) -> ContextConfig:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": WORDS[i:] + WORDS * 30}) for i in range(5)))
    return ContextConfig(
        str(checkpoint), text=(str(text),), lengths=(108, 114, 120), keys=2, depths=(0.0, 0.5, 1.0), windows=4, tail=8,
        out=str(tmp_path / "evals"), engine=EngineConfig(num_blocks=64), device="cpu", quiet=True,
    )  # fmt: skip


def nats(model, ids):
    logits = model.logits(model(pack([ids]))).double()
    return -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def test_losses_are_those_of_the_same_tokens_behind_more_and_more_text(config, tmp_path):
    main(config)
    result = json.loads((tmp_path / "evals" / "context.json").read_text())
    assert (tmp_path / "evals" / "context.png").read_bytes().startswith(b"\x89PNG")
    plan, model = plan_measurement(config), open_model(config.path, device="cpu").model
    begin = plan.windows[0][:1] if plan.found.tokenizer.adds_bos else []
    for row in result["loss_by_context"]:
        cut = [begin + window[len(begin) + 1 - row["length"] :] for window in plan.windows]
        assert all(len(ids) == row["length"] - 1 for ids in cut)
        means = [nats(model, ids)[-8:].mean().item() for ids in cut]
        assert row["nats"] == pytest.approx(unbounded_interval(means).to_list(), abs=1e-4)
    whole = torch.stack([nats(model, window) for window in plan.windows])
    (row,) = result["loss_by_position"]  # the first bucket holds them all
    assert (row["from"], row["to"]) == (1, 119)
    assert row["nats"][0] == pytest.approx(whole.mean().item(), abs=1e-4)
    first, *_, last = result["loss_by_context"]
    assert first["gain"] is None
    assert last["gain"][0] == pytest.approx(first["nats"][0] - last["nats"][0], abs=1e-9)


def test_keys_are_hidden_where_they_are_said_to_be_and_prompts_have_the_length_they_are_said_to_have(config):
    plan = plan_measurement(config)
    tokenizer, keys = plan.found.tokenizer, list(hidden_keys(config, plan, (108, 120)))
    assert len(keys) == 2 * 3 * 2
    for key in keys:
        assert len(key.prompt) + key.num_answer == key.length
        text = tokenizer.decode(key.prompt)
        assert text.count(key.key) == 2
        before, after = text.index(f"The pass key is {key.key}"), len(text) - text.rindex(key.key)
        assert {0.0: before < 30, 0.5: before > 0, 1.0: after < 70}[key.depth], (key.depth, text)
    assert len({key.key for key in keys}) > 6
    again = list(hidden_keys(config, plan, (120,)))
    assert again == [key for key in keys if key.length == 120], "drawn by seed, length, depth and number alone"


def test_an_answer_counts_that_begins_with_the_key(config):
    key = next(hidden_keys(config, plan_measurement(config), (120,)))
    for text, is_found in ((f" {key.key}.", True), (f"\n{key.key} is", True), (f" not {key.key}", False), ("", False)):
        assert key.is_found_by(Completion([], text, None, "stop", 0, 0, 0, 0)) is is_found
    cells = by_cell([key, key], [True, False])
    assert cells[0]["found"][0] == 0.5 and len(cells) == 1


def test_without_texts_keys_alone_are_measured(config, capsys):
    main(replace(config, text=(), lengths=(120,)))
    said = capsys.readouterr().out
    assert "Pass keys found" in said and "Loss" not in said


def test_lengths_double_up_to_the_context():
    assert default_lengths(1000) == (128, 256, 512, 1000)
    assert default_lengths(512) == (128, 256, 512)
    assert default_lengths(100) == (100,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": (110, 2000)}, "2000 tokens, but the model's context is 128"),
        ({"lengths": (20,), "text": ()}, "20 tokens do not hold a pass key and its question; give at least"),
        ({"tail": 200}, "tail = 200: must be below the tokens of a window"),
        ({"text": ("no.jsonl",)}, "no.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_weight_is_read(config, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        plan_measurement(replace(config, **changes))


def test_short_documents_are_refused_with_the_longest_there_is(config, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "1 2 3"}))
    with pytest.raises(ValueError, match=r"the longest document has \d+ tokens, and the largest of the lengths is 120"):
        plan_measurement(replace(config, text=(str(tmp_path / "short.jsonl"),)))


@pytest.mark.parametrize(
    "changes",
    [{"lengths": (5, 5)}, {"lengths": (9, 4)}, {"lengths": (1,)}, {"depths": ()}, {"depths": (1.5,)}, {"keys": 0}],
)
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ContextConfig("model", **changes)
