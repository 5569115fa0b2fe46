"""`kogia demo` end to end, with short recipes that keep every finished sample: the model learns nothing here."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from e2e.kogia_cli import fails, kogia_here, start

from kogia.demo.config import RECIPES, STAGES, DemoConfig
from kogia.demo.run import Stages, open_directory, recipe, stored_state
from kogia.log import read_metrics
from kogia.rl.config import CurateConfig, RLConfig
from kogia.train.config import SupervisedConfig

SUPERVISED = ("pretrain", "cold_start", "rejection_sft", "student")
KEYS = {"name", "seconds", "pass@1", "pass@8", "maj@8", "greedy", "think_tokens", "truncated", "status_counts"}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """The shipped recipes with short samples, of which curation keeps the wrong ones too."""
    folder = tmp_path_factory.mktemp("recipes")
    changes = {
        "grpo": {"max_tokens": 48, "prompts_per_step": 4, "group_size": 4},
        "curate": {"max_tokens": 48, "correct_only": "false", "min_language_share": 0.0},
    }
    for file in RECIPES.glob("*.toml"):
        text = file.read_text(encoding="utf-8")
        for key, value in changes.get(file.stem, {}).items():
            text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            text = text if found else f"{key} = {value}\n{text}"
        text = text.replace("batch_tokens = 4096", "batch_tokens = 1024")
        (folder / file.name).write_text(text, encoding="utf-8")
    return folder


def words(recipes: Path, *more: str) -> list[str]:
    size = ["--scale", "0.01", "--num-questions", "8", "--num-samples", "2", "--threads", "1", "--quiet"]
    return ["demo", "--recipes", str(recipes), "--out", "demo", *size, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipes) -> tuple[Path, str]:
    """(directory that holds `demo`, output of the last call): interrupted in its second stage, then continued."""
    folder = tmp_path_factory.mktemp("demo")
    process = start(folder, *words(recipes))
    while not read_metrics(folder / "demo" / "cold_start"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    base = (folder / "demo" / "base" / "metrics.jsonl").read_bytes()
    out, _ = kogia_here(folder, *words(recipes))
    assert (folder / "demo" / "base" / "metrics.jsonl").read_bytes() == base  # what was done is not done again
    return folder, out


def test_the_demo_goes_on_after_ctrl_c_and_writes_its_summary_and_report(finished):
    demo = finished[0] / "demo"
    summary = json.loads((demo / "summary.json").read_text())
    assert {"seconds", "peak_memory_bytes", "seed", "stages"} <= summary.keys()
    assert summary["seconds"] > 0
    assert 2**26 < summary["peak_memory_bytes"] < 3 * 2**30
    assert summary["seed"] == 0
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    for stage in summary["stages"]:
        assert stage.keys() >= KEYS
        mean, low, high = stage["pass@1"]
        assert 0 <= low <= mean <= high <= 1
        assert stage["pass@8"] is None  # two samples do not reach
        assert 0 <= stage["truncated"] <= 1
        assert 0 < stage["think_tokens"] <= 48
        assert sum(stage["status_counts"].values()) == 8 * 2
        lines = (demo / stage["name"] / "evals" / "heldout.jsonl").read_text(encoding="utf-8")
        samples = lines.rstrip("\n").split("\n")
        assert len(samples) == 8 * 3  # two sampled and one greedy
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert len(page) > 10_000


def test_every_stage_starts_from_the_one_before_it(finished):
    demo = finished[0] / "demo"
    for name, before in (("cold_start", "base"), ("grpo", "cold_start"), ("rejection_sft", "grpo")):
        assert f'init = "demo/{before}"' in (demo / name / "run.toml").read_text()
    curated = (demo / "curated" / "data.jsonl").read_text().splitlines()
    assert 0 < len(curated) == json.loads((demo / "curated" / "data.summary.json").read_text())["kept"]
    assert 'kind = "gqa"' in (demo / "student" / "run.toml").read_text()


def test_calling_it_again_does_nothing(finished, recipes):
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in (folder / "demo").rglob("*") if path.name != "stages.json"}
    started = time.process_time()
    kogia_here(folder, *words(recipes))
    assert time.process_time() - started < 2
    after = {path: path.stat().st_mtime_ns for path in (folder / "demo").rglob("*") if path.name != "stages.json"}
    assert after == before


def test_other_settings_or_a_foreign_directory_are_refused(finished, recipes):
    folder = finished[0]
    message = fails(folder, *words(recipes, "--seed", "1"))
    assert message.startswith("demo holds a demonstration with {'seed': 0")
    assert "add --overwrite to delete it, or name another --out" in message
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("keep me")
    for flags in (["--out", "mine"], ["--out", "mine", "--overwrite"]):
        assert "holds other files and no stages.json" in fails(folder, *words(recipes, *flags))
    assert (folder / "mine" / "thesis.tex").read_text() == "keep me"


def test_a_start_or_an_overwriting_that_was_killed_stands_in_nobodys_way(finished, recipes, tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".stages.json.0123456789abcdef.tmp").write_text("{")
    with contextlib.chdir(tmp_path), open_directory(DemoConfig(out="demo")) as out:
        Stages(out, stored_state(DemoConfig(out="demo")))
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["stages.json"]
    shutil.copytree(finished[0] / "demo", tmp_path / "old")
    rmtree, removed = shutil.rmtree, []

    def die_in_the_middle(path, *rest, **options):
        rmtree(path, *rest, **options)
        removed.append(path)
        if len(removed) == 2:
            raise KeyboardInterrupt

    config = DemoConfig(out=str(tmp_path / "old"), overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            open_directory(config).__enter__()
    with open_directory(config) as out:
        assert list(out.iterdir()) == []


def test_two_demonstrations_in_one_directory_are_refused_and_a_damaged_record_is_named(tmp_path, recipes):
    (tmp_path / "demo").mkdir()
    with open_directory(DemoConfig(out=str(tmp_path / "demo"))):
        for flags in ([], ["--overwrite"]):
            assert "'demo': another run is writing there" in fails(tmp_path, *words(recipes, *flags))
    for damaged in ("", "[]", '{"base": {}}', '{"base": 5}', "[" * 5000):
        (tmp_path / "demo" / "stages.json").write_text(damaged)
        message = fails(tmp_path, *words(recipes))
        assert message.startswith("demo/stages.json: is ")
        assert message.endswith("or add --overwrite to start over")


def test_the_commands_it_prints_work(finished):
    folder, out = finished
    lines = out.replace("\\\n", "").splitlines()  # a long one goes on behind a backslash
    printed = [shlex.split(line, comments=True) for line in lines if line.startswith("  kogia ")]
    assert [command[1] for command in printed] == ["chat", "eval", "rl"]
    for _, name, *rest in printed[1:]:
        rest = ["toy_task:Checksum" if word == "my_tasks:MyTask" else word for word in rest]
        plan, _ = kogia_here(folder, name, *rest, "--dry-run")
        assert "# parameters" in plan
    process = start(folder, *printed[0][1:], "--max-tokens", "4")
    reply, err = process.communicate("numbers 4 6 15 target 17\n", timeout=60)
    assert process.returncode == 0, err
    assert "tokens/s" in reply


def test_the_shipped_recipes_follow_directory_seed_scale_and_threads():
    demo = DemoConfig(out="elsewhere", seed=3, scale=0.5, threads=2)
    plain = DemoConfig()
    for name in SUPERVISED:
        changed, shipped = recipe(demo, name, SupervisedConfig), recipe(plain, name, SupervisedConfig)
        assert shipped.out.startswith("runs/demo/")
        assert changed.out == shipped.out.replace("runs/demo", "elsewhere")
        assert changed.steps == round(shipped.steps / 2)
        assert (changed.seed, changed.threads) == (shipped.seed + 3, 2)
    rl, curate = recipe(demo, "grpo", RLConfig), recipe(demo, "curate", CurateConfig)
    assert (rl.init, rl.out) == ("elsewhere/cold_start", "elsewhere/grpo")
    assert (curate.path, curate.out) == ("elsewhere/grpo", "elsewhere/curated/data.jsonl")
    assert rl.tasks == curate.tasks == ("countdown",)
    assert rl.task_options == curate.task_options
    assert rl.max_tokens == curate.max_tokens


def test_a_dry_run_lists_the_stages_and_writes_nothing(tmp_path):
    out, _ = kogia_here(tmp_path, "demo", "--dry-run")
    assert all(name in out for name in STAGES)
    assert not any(tmp_path.iterdir())


def test_a_demo_whose_model_solves_nothing_says_so_and_goes_on_to_its_report(finished, recipes, tmp_path):
    shutil.copytree(finished[0] / "demo", tmp_path / "demo")
    stages = json.loads((tmp_path / "demo" / "stages.json").read_text())
    for name in ("curated", "rejection_sft", "student"):
        shutil.rmtree(tmp_path / "demo" / name)
    for name in ("curated", "rejection_sft", "rejection_sft_eval", "drafting", "student", "student_eval", "report"):
        stages[name]["done"] = False
    (tmp_path / "demo" / "stages.json").write_text(json.dumps(stages))
    curate = (recipes / "curate.toml").read_text().replace("correct_only = false", "min_reward = 1.0")
    shutil.copytree(recipes, tmp_path / "strict")
    (tmp_path / "strict" / "curate.toml").write_text(curate)
    _, err = kogia_here(tmp_path, *words(tmp_path / "strict"))
    said = "rejection sampling kept nothing"
    assert said in " ".join(err.split())
    assert (tmp_path / "demo" / "curated" / "data.jsonl").read_text() == ""
    for name in ("rejection_sft", "student"):  # what they were trained on stands in their settings
        assert "cold_start_traces" in (tmp_path / "demo" / name / "run.toml").read_text()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    assert said in summary["notes"][0]
    assert said in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")


def test_a_demo_that_kept_samples_says_nothing_of_the_kind(finished):
    demo = finished[0] / "demo"
    assert json.loads((demo / "summary.json").read_text())["notes"] == []
    assert "kept nothing" not in (demo / "report.html").read_text(encoding="utf-8")
