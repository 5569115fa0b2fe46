import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.runs import MODEL, assert_same_run, checkpoint_contents, tiny_run

from kogia.checkpoint.hf import load_model
from kogia.checkpoint.resume import ResumeState, latest_checkpoint
from kogia.config import from_dict, to_dict
from kogia.data.config import DataConfig
from kogia.data.loader import LoaderState
from kogia.log import read_metrics
from kogia.train import guard, supervised
from kogia.train.config import GuardConfig, OptimConfig, SupervisedConfig
from kogia.train.guard import Guard, read_bad_step
from kogia.train.supervised import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> SupervisedConfig:
    """A run that finds its tokenizer and its tokens made."""
    config = tiny_run(tmp_path_factory.mktemp("prepared"))
    optim = replace(config.optim, schedule="constant")
    config = replace(config, data=replace(config.data, cache_dir=config.out + "-cache"), optim=optim)
    supervised.build_run(config)
    return replace(config, tokenizer=config.out + "/tokenizer", steps=20, save_every=5, eval_every=0)


@pytest.fixture
def config(prepared, tmp_path) -> SupervisedConfig:
    return replace(prepared, out=str(tmp_path / "run"))


def key_of(batch) -> int:
    return hash(tuple(batch.tokens.token_ids.tolist()))


@pytest.fixture
def poison(config, monkeypatch) -> Callable[..., None]:
    """Turns the losses of the batches that an undisturbed run has at `steps` (1-based) into NaN, or into `factor`
    times themselves."""
    inner = supervised.loss_for_step
    loader = supervised.build_run(replace(config, out=config.out + "-keys")).loader
    keys = [key_of(loader.next_batch()) for _ in range(30)]

    def poison(steps, factor=math.nan):
        bad = {keys[step - 1] for step in steps}

        def poisoned(config, state, batches):
            loss_fn = inner(config, state, batches)

            def loss(model, batch):
                loss = loss_fn(model, batch)
                return replace(loss, total=loss.total * factor) if key_of(batch) in bad else loss

            return loss

        monkeypatch.setattr(supervised, "loss_for_step", poisoned)

    return poison


def test_a_bad_step_is_left_out_and_the_run_goes_on_with_the_next_batch(config, poison, capsys):
    poison([7, 8])
    main(replace(config, guard=GuardConfig(skips=2)))
    lines = read_metrics(config.out)
    assert [line["step"] for line in lines if line.get("skipped")] == [7, 8]
    assert len([line for line in lines if "loss" in line]) == 20
    assert "step 7 is left out: the loss of micro-batch 0 is nan" in " ".join(capsys.readouterr().err.split())
    assert load_model(config.out).lm_head.weight.isfinite().all()


def test_a_bad_step_leaves_weights_moments_and_biases_as_they_were(config, poison):
    poison([1, 2])
    main(replace(config, steps=2, save_every=0, guard=GuardConfig(skips=2)))
    saved = checkpoint_contents(latest_checkpoint(config.out))
    fresh = supervised.build_run(replace(config, out=config.out + "-fresh")).state
    assert not any("exp_avg" in name for name in saved)
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(load_model(config.out).state_dict()[name], value), name


def test_the_batch_of_a_bad_step_gives_the_same_loss_again(config, poison, tmp_path):
    poison([7], factor=50.0)
    main(replace(config, steps=8, guard=GuardConfig(skips=1, sigmas=8.0, window=8)))
    (place,) = (Path(config.out) / "bad_steps").iterdir()
    assert place.name == "step-000007-0"
    report = json.loads((place / "report.json").read_text())
    assert report["step"] == 7
    assert "deviations above the mean" in report["reason"]
    shutil.copytree(
        Path(config.out) / "checkpoints" / "step-000005", tmp_path / "again" / "checkpoints" / "step-000005"
    )
    shutil.copy(Path(config.out) / "run.toml", tmp_path / "again")
    again = supervised.build_run(replace(config, out=str(tmp_path / "again"), resume=True))
    supervised.step(again)  # the sixth
    assert again.loader.state == LoaderState(**report["loader"])
    (kept,) = read_bad_step(place)
    loss = supervised.loss_for_step(config, again.state, [kept])(again.state.model, kept)
    assert float(loss.metrics["loss"]) / kept.num_loss_tokens == report["metrics"]["loss"]


def test_after_one_bad_step_too_many_the_run_goes_back_and_on_with_other_data(config, poison, capsys):
    poison([12, 13, 14])
    main(replace(config, guard=GuardConfig(skips=2, rollbacks=1)))
    lines = [line for line in read_metrics(config.out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert not any("skipped" in line for line in lines)
    loader = supervised.build_run(replace(config, resume=True)).loader
    other = supervised.build_run(replace(config, out=config.out + "-other")).loader
    for _ in range(24):  # 14 until it went back to the tenth, then 10 more
        other.next_batch()
    assert loader.state == other.state
    messages = " ".join(capsys.readouterr().err.split())
    assert "gone back to step 10, on with other data: 1 of 1 times" in messages
    assert len(list((Path(config.out) / "bad_steps").iterdir())) == 3


def test_the_run_ends_where_going_back_is_used_up_or_there_is_nowhere_to_go(config, poison):
    poison(range(12, 25))
    guarded = replace(config, guard=GuardConfig(skips=1, rollbacks=2))
    with pytest.raises(FloatingPointError, match=r"step 12: the loss .* is nan; its batch is in .*step-000012-2\. The"):
        main(guarded)
    assert latest_checkpoint(config.out).name == "step-000010"
    poison([1])
    with pytest.raises(FloatingPointError, match="nothing is saved yet"):
        main(replace(guarded, overwrite=True, guard=GuardConfig(rollbacks=2)))


def test_by_default_the_first_bad_step_ends_the_run_and_its_batch_is_kept(config, poison):
    poison([6])
    with pytest.raises(FloatingPointError, match=r"step 6: .*step-000006-0.*last good checkpoint is .*step-000005"):
        main(config)
    assert len(read_bad_step(Path(config.out) / "bad_steps" / "step-000006-0")) == 1


def test_a_batch_that_cannot_be_kept_costs_the_batch_alone(config, poison, capsys, monkeypatch):
    poison([3])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guard, "write_bad_step", full)
    main(replace(config, steps=4, guard=GuardConfig(skips=1)))
    assert "could not be kept: [Errno 28] No space left" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("killed_at", [7, 13])
def test_a_guarded_run_stopped_anywhere_and_resumed_equals_one_that_was_not(config, poison, monkeypatch, killed_at):
    """Steps 6 to 8 send it back once; 16 is left out."""
    poison([6, 7, 8, 16])
    guarded = replace(config, guard=GuardConfig(skips=2, rollbacks=2, sigmas=9.0, window=8), average_decay=0.9)
    main(replace(guarded, out=config.out + "-whole"))
    step, calls = supervised.step, []

    def step_and_kill(run):
        calls.append(run.state.step)
        if len(calls) == killed_at:
            raise KeyboardInterrupt  # as a kill: nothing more is written
        return step(run)

    monkeypatch.setattr(supervised, "step", step_and_kill)
    with pytest.raises(KeyboardInterrupt):
        main(guarded)
    monkeypatch.setattr(supervised, "step", step)
    main(replace(guarded, resume=True))
    assert_same_run(Path(config.out + "-whole"), Path(config.out))
    kept = [{p.name for p in (Path(run) / "bad_steps").iterdir()} for run in (config.out, config.out + "-whole")]
    assert kept[0] == kept[1]


def test_a_run_stopped_between_bad_steps_still_goes_back_to_before_them(config, poison, monkeypatch):
    poison([7, 8, 9])
    guarded = replace(config, guard=GuardConfig(skips=2, rollbacks=1))
    main(replace(guarded, out=config.out + "-whole"))
    step = supervised.step

    def step_and_signal(run):
        metrics = step(run)
        if run.state.step == 8:
            os.kill(os.getpid(), 15)
        return metrics

    monkeypatch.setattr(supervised, "step", step_and_signal)
    with pytest.raises(KeyboardInterrupt):
        main(guarded)
    assert latest_checkpoint(config.out).name == "step-000008"
    monkeypatch.setattr(supervised, "step", step)
    main(replace(guarded, resume=True))
    assert_same_run(Path(config.out + "-whole"), Path(config.out))


def judged(values, **fields) -> list[bool]:
    guard = Guard(GuardConfig(**fields))
    return [guard.judge(value, 1.0, None) is not None for value in values]


def test_a_spike_is_bad_where_it_stands_out_from_enough_good_steps_and_is_none_of_them():
    quiet = [2.0, 2.2, 1.8, 2.1, 1.9, 2.0]
    assert judged([*quiet, 9.0, 9.0, 2.0], sigmas=6.0, window=8) == [False] * 6 + [True, True, False]
    assert not any(judged([*quiet, 9.0], sigmas=0.0, window=8))
    assert not any(judged([2.0, 2.2, 1.8, 9.0], sigmas=6.0, window=8)), "three are too few"
    assert not any(judged([*quiet, 0.1], sigmas=6.0, window=8)), "a loss may fall"
    guard = Guard(GuardConfig(sigmas=3.0, window=4))
    assert [guard.judge(2.0, norm, None) for norm in (1.0, 1.1, 0.9)] == [None] * 3
    assert "gradient norm of 7 is" in guard.judge(2.0, 7.0, None)


def test_what_a_guard_knows_goes_through_json_exactly():
    first = Guard(GuardConfig(sigmas=3.0, window=4, skips=9))
    for value in (0.1, 1 / 3, 0.2, 5e9, 0.25):
        first.judge(value, value / 7, None)
    second = Guard(first.config)
    second.restore(ResumeState({"guard": json.loads(json.dumps(first.values()))}))
    assert second.values() == first.values()
    for broken in ({}, {"recent": {}}, {**first.values(), "streak": -1}, {**first.values(), "recent": {"loss": ["x"]}}):
        with pytest.raises(ValueError, match=r"guard\..*damaged"):
            second.restore(ResumeState({"guard": broken}))


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"guard": GuardConfig(rollbacks=1), "save_every": 0},
            "guard.rollbacks = 1: there is no checkpoint",
        ),
        ({"average_decay": 1.5}, r"average_decay = 1.5: must lie in \[0, 1\]"),
        ({"average_from": 1.0}, r"average_from = 1.0"),
        ({"ramp_steps": 3}, "a growing batch needs both"),
        ({"micro_batches_first": 3, "ramp_steps": 3}, "micro_batches_first = 3: above micro_batches = 1"),
        ({"micro_batches_first": 1, "ramp_steps": 10**9}, "ramp_steps = 1000000000: must be at most 1,000,000"),
        ({"micro_batches": 10**9}, "micro_batches = 1000000000 of data.batch_tokens = .* lower one of them"),
        ({"data": DataConfig(batch_tokens=10**12)}, "data.batch_tokens = 1000000000000 are 1,000,000,000,000 tokens"),
    ],
)
def test_wrong_settings_name_value_and_fix(config, fields, words):
    with pytest.raises(ValueError, match=words):
        main(replace(config, **fields))
    with pytest.raises(ValueError, match="guard.skips = -1"):
        GuardConfig(skips=-1)


def test_guard_settings_survive_toml_and_a_checkpoint_without_any_is_resumed(config):
    guarded = replace(config, guard=GuardConfig(skips=3, sigmas=6.0))
    assert from_dict(SupervisedConfig, to_dict(guarded)) == guarded
    main(replace(config, steps=5))
    state = latest_checkpoint(config.out) / "train_state" / "state.json"
    values = json.loads(state.read_text())
    del values["guard"]  # as versions before it wrote
    state.write_text(json.dumps(values))
    main(replace(guarded, steps=6, resume=True))


def test_the_average_is_that_of_the_weights_after_each_step_and_is_a_model_with_a_loss_of_its_own(config, monkeypatch):
    step, seen = supervised.step, []

    def noting(run):
        metrics = step(run)
        seen.append({name: value.double().clone() for name, value in run.state.model.state_dict().items()})
        return metrics

    monkeypatch.setattr(supervised, "step", noting)
    for decay, begin, expected in (
        (1.0, 0.5, lambda w: sum(w[5:]) / 5),
        (0.75, 0.0, lambda w: 0.75 * (0.75 * sum(w[:4]) / 4 + 0.25 * w[4]) + 0.25 * w[5]),
    ):
        seen.clear()
        steps = 10 if begin else 6
        out = f"{config.out}-{decay}"
        main(replace(config, out=out, steps=steps, average_decay=decay, average_from=begin))
        average = load_model(latest_checkpoint(out) / "average")
        for name, value in average.state_dict().items():
            torch.testing.assert_close(value.double(), expected([w[name] for w in seen]), rtol=1e-5, atol=1e-7)
        last = read_metrics(out)[-1]
        assert last["val_loss_average"] != last["val_loss"]
        assert average.config == load_model(out).config == replace(MODEL, bos_id=average.config.bos_id)


HALF = {"dtype": "bfloat16", "recompute": "layer", "optim": OptimConfig(lr=3e-3, kind="muon", moments="bfloat16")}


@pytest.mark.parametrize("fields", [{}, HALF], ids=["float32", "bfloat16"])
def test_a_run_with_all_schedules_and_an_average_resumes_exactly(config, fields):
    config = replace(config, **fields)
    full = replace(
        config,
        steps=12,
        save_every=4,
        micro_batches=3,
        micro_batches_first=1,
        ramp_steps=6,
        optim=replace(config.optim, schedule="v3"),
        mtp_late_at=0.5,
        bias_freeze_at=0.7,
        average_decay=0.8,
        average_from=0.2,
        eval_every=4,
    )
    main(full)
    tokens = [line["tokens"] for line in read_metrics(full.out) if "tokens" in line]
    assert tokens[0] < 256 < tokens[5] <= 768
    resumed = shutil.copytree(full.out, full.out + "-resumed")
    shutil.rmtree(Path(resumed) / "checkpoints" / "step-000012")
    main(replace(full, out=str(resumed), resume=True))
    assert_same_run(Path(full.out), Path(resumed))
