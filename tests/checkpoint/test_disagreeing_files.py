"""Where `config.json`, index and weights say different things: what loads, with which word, and what is refused."""

import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint.tiny import CONFIG, DENSE, assert_same, edit, rewrite, shard, tiny
from safetensors.torch import load_file, save_file

from kogia.checkpoint.convert import convert
from kogia.checkpoint.directory import stored_tensors
from kogia.checkpoint.fit import max_header
from kogia.checkpoint.hf import load_model, save_model
from kogia.checkpoint.inspect import inspect_model
from kogia.cli import main
from kogia.model.packed import pack

HEAD, EMBEDDING, INDEX = "lm_head.weight", "model.embed_tokens.weight", "model.safetensors.index.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tiny(), tmp_path / "model")


def warned(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


# The head


@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (9, 4)])
@pytest.mark.parametrize("config", [DENSE, CONFIG])
def test_a_stored_head_that_differs_is_the_head_though_config_says_tied(tmp_path, capsys, config, place):
    model = tiny(replace(config, tie_embeddings=True))
    save_model(model, tmp_path)
    head = model.lm_head.weight.detach().clone()
    head[place] += 0.5
    rewrite(tmp_path, lambda t: t.update({HEAD: head}))
    loaded = load_model(tmp_path)
    assert "the stored lm_head.weight differs" in " ".join(warned(capsys).split())
    assert torch.equal(loaded.lm_head.weight, head) and not loaded.config.tie_embeddings
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    batch = pack([[1, 2, 3]])
    torch.testing.assert_close(loaded.logits(loaded(batch)), loaded.model.norm(model(batch)) @ head.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stored_head_of_the_same_numbers_stays_tied(tmp_path, capsys, dtype):
    model = tiny(replace(DENSE, tie_embeddings=True))
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda t: t.update({HEAD: t[EMBEDDING].to(dtype).clone()}))
    assert_same(load_model(tmp_path, dtype=torch.float32), model)
    assert capsys.readouterr().err == ""


def test_a_tied_head_of_another_shape_is_named(tmp_path):
    save_model(tiny(replace(DENSE, tie_embeddings=True)), tmp_path)
    rewrite(tmp_path, lambda t: t.update({HEAD: torch.zeros(21, 10)}))
    with pytest.raises(ValueError, match=r"mis-shaped: lm_head.weight is \[21, 10\]"):
        load_model(tmp_path)


def test_a_tied_head_of_no_weights_type_is_named(tmp_path):
    save_model(tiny(replace(DENSE, tie_embeddings=True)), tmp_path)
    rewrite(tmp_path, lambda t: t.update({HEAD: torch.zeros(19, 10, dtype=torch.int64)}))
    with pytest.raises(ValueError, match=r"wrong dtype: lm_head.weight is I64"):
        load_model(tmp_path)


def test_a_copy_in_a_prediction_module_that_is_none_is_warned_of(saved, capsys):
    rewrite(saved, lambda t: t["model.layers.2.embed_tokens.weight"].add_(1))
    assert_same(load_model(saved), tiny())
    assert "model.layers.2.embed_tokens.weight differ" in warned(capsys)


# Index and single file


@pytest.mark.parametrize("shards_left", [True, False])
def test_of_a_single_file_and_an_index_the_file_is_taken_and_that_is_said(saved, capsys, shards_left):
    new = tiny(seed=9)
    index = shard(saved)
    text = index.read_text()
    (saved / "new").mkdir()
    save_model(new, saved / "new" / "model")
    (saved / "new" / "model" / "model.safetensors").rename(saved / "model.safetensors")
    if not shards_left:
        for file in saved.glob("model-*.safetensors"):
            file.unlink()
    assert_same(load_model(saved), new)
    message = warned(capsys)
    assert "model.safetensors and model.safetensors.index.json" in message and "model.safetensors is taken" in message
    assert index.read_text() == text
    convert(saved, saved.parent / "converted")
    assert_same(load_model(saved.parent / "converted"), new)


def test_an_index_of_the_single_file_is_no_contradiction(saved, capsys):
    names = load_file(saved / "model.safetensors").keys()
    (saved / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert_same(load_model(saved), tiny())
    assert capsys.readouterr().err == ""


# Multi-token prediction


@pytest.mark.parametrize("stored, announced, left", [(1, 0, 0), (2, 0, 0), (2, 1, 1), (1, 3, 1), (0, 2, 0)])
def test_as_many_prediction_modules_load_as_are_announced_and_stored(tmp_path, capsys, stored, announced, left):
    model = tiny(replace(CONFIG, num_mtp_layers=stored))
    save_model(model, tmp_path / "model")
    edit(tmp_path / "model", num_nextn_predict_layers=announced)
    loaded = load_model(tmp_path / "model")
    assert loaded.config == replace(CONFIG, num_mtp_layers=left)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert warned(capsys).count("multi-token prediction") == 1


def test_a_decoder_layer_too_many_is_no_prediction_module(tmp_path):
    save_model(tiny(replace(CONFIG, num_layers=3, num_mtp_layers=0)), tmp_path)
    edit(tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"extra: model\.layers\.2\."):
        load_model(tmp_path)


def test_a_damaged_prediction_module_is_not_passed_over(saved):
    rewrite(saved, lambda t: t.pop("model.layers.2.enorm.weight"))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\.enorm\.weight"):
        load_model(saved)


def test_conversion_keeps_modules_that_are_not_announced(saved):
    edit(saved, num_nextn_predict_layers=0)
    target = convert(saved, saved.parent / "converted")
    edit(target, num_nextn_predict_layers=1)
    assert_same(load_model(target), tiny())


# Sizes out of all proportion


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_hidden_layers=100_000), "num_hidden_layers = 100000"),
        (dict(num_hidden_layers=1_500), "num_hidden_layers = 1,500, but 3 layers are stored"),
        (dict(num_nextn_predict_layers=1_000), "3 layers are stored"),
        (dict(n_routed_experts=10**7), "n_routed_experts = 10,000,000"),
        (dict(n_routed_experts=2 * 10**9), "n_routed_experts = 2,000,000,000"),
        (dict(n_shared_experts=2**31 - 1), "parameters, but .* numbers are stored"),
        (dict(hidden_size=2**40), "hidden_size = 1099511627776"),
        (dict(hidden_size=2**31 - 1), "parameters|hidden_size"),
        (dict(moe_intermediate_size=2**30), "parameters, but .* numbers are stored"),
        (dict(vocab_size=2**31 - 1, intermediate_size=2**31 - 1), "parameters, but .* numbers are stored"),
    ],
)
def test_a_size_out_of_all_proportion_costs_nothing(saved, fields, words):
    edit(saved, **fields)
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (load_model, lambda directory: convert(directory, directory.parent / "converted")):
        with pytest.raises(ValueError, match=words):
            read(saved)
    try:
        inspect_model(str(saved))
    except ValueError as error:
        assert next(iter(fields)) in str(error)  # noqa: PT017
    assert time.process_time() - begin < 3  # with checks of types on every call; some 0.1 s without
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # KiB


def test_a_header_that_no_such_model_can_need_is_refused_unread(saved):
    entries = {f"t{i}": torch.zeros(0) for i in range(40_000)}
    save_file(load_file(saved / "model.safetensors") | entries, saved / "model.safetensors")
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"its header has [\d,]+ bytes, config\.json's model needs [\d,]+ at most"):
        load_model(saved)
    assert "its header has" in inspect_model(str(saved)).disagreements[0]
    assert time.process_time() - begin < 1
    assert len(stored_tensors(saved)) > 40_000  # the file itself is sound


def test_an_index_that_no_such_model_can_need_is_refused_unread(saved):
    index = shard(saved)
    os.truncate(index, max_header(CONFIG) + 1)
    with pytest.raises(ValueError, match=r"index\.json: 2 MB, over the limit of"):
        load_model(saved)


# Signs that steer a terminal


@pytest.mark.parametrize("name", ["\x1b[2Jweight", "a\nb", "right\u202eleft", "c1\x9b31m", "", "x" * 600])
def test_tensor_names_are_shown_escaped(saved, capsys, name):
    rewrite(saved, lambda t: t.update({name: torch.zeros(1)}))
    with pytest.raises(ValueError, match="no name of a tensor") as error:
        load_model(saved)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert main(["inspect", str(saved)]) == 1
    assert_no_controls(capsys.readouterr())


@pytest.mark.parametrize("field", ["model_type", "\x1b[31m", "torch_dtype", "bos_token_id", "rope_scaling"])
@pytest.mark.parametrize("value", ["\x1b[2J", "\x9b31m", {"type": "\x1b]0;title\x07"}, ["\x1b"]])
def test_config_values_are_shown_escaped(saved, capsys, field, value):
    edit(saved, **{field: value})
    for words in (["inspect", str(saved)], ["inspect", str(saved), "--json"], ["convert", str(saved), "/dev/null/x"]):
        main(words)
        assert_no_controls(capsys.readouterr())


@pytest.mark.parametrize("name", ["\x1b[31m.safetensors", "a\x9b.safetensors"])
def test_shard_and_file_names_are_shown_escaped(saved, capsys, name):
    (saved / "model.safetensors").rename(saved / name)
    assert main(["inspect", str(saved)]) == 1
    (saved / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert main(["inspect", str(saved)]) == 1
    assert main(["convert", str(saved), str(saved.parent / "converted")]) == 2
    assert_no_controls(capsys.readouterr())


def assert_no_controls(captured) -> None:
    text = (captured.out + captured.err).replace("\n", "")
    assert text.isprintable() and text.strip()
