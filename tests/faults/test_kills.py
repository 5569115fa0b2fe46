"""A short campaign of kills; benchmarks/faults.py has the long one."""

import shutil
from pathlib import Path

import pytest

from faults.kills import SCENARIOS, Campaign, Scenario, contents, differences

TRIALS = {
    "prepare": 3, "pretrain": 2, "pretrain-all": 2, "sft": 2, "overwrite": 2, "rl": 2, "eval": 3, "curate": 2,
    "generate": 2, "convert-over": 3,
}  # fmt: skip
"""Of each scenario. What is left out is in the long campaign alone, where it takes longest and shows least."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory):
    with Campaign(tmp_path_factory.mktemp("kills")) as campaign:
        yield campaign


@pytest.mark.parametrize("scenario", [each for each in SCENARIOS if each.name in TRIALS], ids=lambda each: each.name)
def test_a_command_that_was_killed_goes_on_to_what_an_undisturbed_one_leaves(campaign: Campaign, scenario: Scenario):
    campaign.prepare(scenario)
    trials = [campaign.trial(scenario, seed) for seed in range(TRIALS[scenario.name])]
    assert sum(len(trial.kills) for trial in trials) >= TRIALS[scenario.name] // 2
    assert [(trial.seed, trial.kills, trial.faults) for trial in trials if trial.faults] == []


def test_what_is_lost_doubled_or_left_over_is_noticed(tmp_path: Path):
    for run in ("whole", "damaged"):
        for step in ("step-000002", "step-000004"):
            (tmp_path / run / "checkpoints" / step).mkdir(parents=True)
            (tmp_path / run / "checkpoints" / step / "model.safetensors").write_text(step)
        rows = [f'{{"step": {step}, "loss": {step}, "seconds": {len(run)}}}\n' for step in range(3)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(rows))
        (tmp_path / run / "mine.txt").write_text("mine")
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    assert differences(contents(whole), contents(damaged)) == []
    shutil.copy(whole / "mine.txt", damaged / ".mine.txt.0123456789abcdef.tmp")
    (damaged / "checkpoints" / "step-000004" / "model.safetensors").write_text("other weights")
    (damaged / "checkpoints" / "step-000001").mkdir()
    (damaged / "metrics.jsonl").write_text("".join([*rows, rows[-1]]))
    (damaged / "mine.txt").unlink()
    found = differences(contents(whole), contents(damaged))
    assert [words.partition(" ")[0] for words in found] == [
        ".mine.txt.0123456789abcdef.tmp",
        "checkpoints",
        "checkpoints/step-000004/model.safetensors",
        "metrics.jsonl",
        "mine.txt",
    ]
