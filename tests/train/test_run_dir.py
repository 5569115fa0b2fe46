import json
from dataclasses import replace
from pathlib import Path

import pytest

from kogia.config import load_toml
from kogia.data.config import DataConfig, SourceConfig
from kogia.train.config import OptimConfig, SupervisedConfig
from kogia.train.run_dir import hold_run_dir, open_run_dir

STARTS = [{}, {"resume": True}, {"overwrite": True}]
DAMAGED = [b"", b"\0\0\0\0", b"out = ", b"\xff\xfe", b"\n \n", b"x = " + b"[" * 5000]


@pytest.fixture
def config(tmp_path) -> SupervisedConfig:
    return SupervisedConfig(str(tmp_path / "run"), init="model", optim=OptimConfig(lr=1e-3), steps=3)


def checkpoint(config: SupervisedConfig, step: int) -> Path:
    path = Path(config.out) / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    return path


def begun(config: SupervisedConfig, recipe: bytes) -> Path:
    run = Path(config.out)
    run.mkdir()
    (run / "run.toml").write_bytes(recipe)
    return run


def warning(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("left", [None, ".run.toml.0123456789abcdef.tmp"])
def test_a_start_that_was_killed_before_it_wrote_its_settings_stands_in_nobodys_way(config, start, left):
    run = Path(config.out)
    run.mkdir()
    if left is not None:
        (run / left).write_text("out = ")
    with hold_run_dir(replace(config, **start)):
        assert open_run_dir(replace(config, **start)) is None
    assert [path.name for path in run.iterdir()] == ["run.toml"]
    assert load_toml(run / "run.toml", SupervisedConfig) == config


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("recipe", DAMAGED)
def test_empty_or_damaged_settings_of_a_run_without_a_step_are_written_anew(config, start, recipe):
    run = begun(config, recipe)
    assert open_run_dir(replace(config, **start)) is None
    assert load_toml(run / "run.toml", SupervisedConfig) == config


@pytest.mark.parametrize("recipe", DAMAGED)
def test_a_run_with_damaged_settings_is_refused_resumed_with_a_word_or_overwritten(config, recipe, capsys):
    run = begun(config, recipe)
    saved = checkpoint(config, 2)
    with pytest.raises(ValueError, match="already holds a run up to step-000002"):
        open_run_dir(config)
    assert (run / "run.toml").read_bytes() == recipe
    assert open_run_dir(replace(config, resume=True)) == saved
    assert "run.toml is empty or damaged" in warning(capsys)
    (run / "run.toml").write_bytes(recipe)
    assert open_run_dir(replace(config, overwrite=True)) is None
    assert not saved.exists()


@pytest.mark.parametrize("left", ["run.toml", "metrics.jsonl"])
def test_an_overwriting_that_was_killed_may_be_repeated(config, left, monkeypatch):
    run = begun(config, b"")
    checkpoint(config, 1)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    unlink = Path.unlink

    def unlink_or_die(path: Path, missing_ok: bool = False) -> None:
        if path == run / left:
            raise InterruptedError(left)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_or_die)
    with pytest.raises(InterruptedError):
        open_run_dir(replace(config, overwrite=True))
    monkeypatch.undo()
    assert (run / "run.toml").exists()
    assert open_run_dir(replace(config, overwrite=True)) is None
    assert [path.name for path in run.iterdir()] == ["run.toml"]


def test_nothing_is_resumed_where_there_is_no_run(config, capsys):
    resumed = replace(config, resume=True)
    for opened in (open_run_dir, lambda c: hold_run_dir(c).__enter__()):
        with pytest.raises(ValueError, match=r"run': there is no run to resume; correct --out, or leave --resume out"):
            opened(resumed)
    assert not Path(config.out).exists()
    open_run_dir(config)
    assert open_run_dir(resumed) is None
    assert "no checkpoint to resume from: starting at the first step" in warning(capsys)


def test_settings_that_changed_are_named_in_full_with_both_values(config, capsys):
    open_run_dir(config)
    sources = (SourceConfig("a.jsonl"), SourceConfig("b.jsonl", weight=2.0))
    optim, data = OptimConfig(lr=2e-3, betas=(0.9, 0.99)), DataConfig(sources)
    open_run_dir(replace(config, resume=True, quiet=True, threads=2, optim=optim, data=data, index_topk=5))
    said = warning(capsys)
    for words in (
        "optim.lr = 0.002 (was 0.001)",
        "optim.betas = [0.9, 0.99] (was [0.9, 0.95])",
        "data.sources[0].spec = 'a.jsonl' (was 'none')",
        "data.sources[1].weight = 2.0 (was 'none')",
        "index_topk = 5 (was 'none')",
    ):
        assert words in said
    assert "quiet" not in said
    assert "threads" not in said
    assert "steps" not in said
    open_run_dir(replace(config, resume=True, optim=optim, data=data, index_topk=5))
    assert "other settings" not in warning(capsys)
