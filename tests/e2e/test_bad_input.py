"""What goes wrong in a user's hands ends in one clear line and status 2, and nothing already saved is lost."""

import os
import shutil
import signal
import sys
import time

import pytest
from e2e.kogia_cli import fails, kogia_here, start

from kogia.checkpoint.resume import latest_checkpoint
from kogia.log import read_metrics

TRAPS = """
from kogia.tasks.task import Problem, Verdict
from kogia.text.chat import Message

class Trap:
    name = "trap"
    def __init__(self, what: str = "raise", words: int = 1):
        self.what, self.words = what, words
    def problems(self, split):
        return [Problem(f"{split}/{i}", (Message("user", f"say {i}" + " 1" * self.words),), {}) for i in range(6)]
    def verify(self, problem, response):
        if problem.id.endswith(("/0", "/3")):
            if self.what == "raise":
                raise KeyError("the answer key is lost")
            while True:
                pass
        return Verdict(float(len(response.text) % 2), len(response.text) % 2 == 1, "ok", {}, None)
"""
TINY_RL = (
    "--steps 2 --prompts-per-step 6 --group-size 4 --max-tokens 8 --no-signal-check --eval-questions 0 "
    "--engine.num-blocks 256 --verify-timeout 0.5 --threads 1"
).split()


@pytest.fixture
def folder(tmp_path, pretrained, monkeypatch):
    """A current directory of one's own with pretrain.toml, the run `base` and a task module."""
    shutil.copytree(pretrained / "base", tmp_path / "base")
    shutil.copy(pretrained / "pretrain.toml", tmp_path)
    (tmp_path / "traps.py").write_text(TRAPS)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # commands add their current directory
    sys.modules.pop("traps", None)
    return tmp_path


def contents(run):
    return {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}


def test_an_unknown_key_in_a_recipe_or_flag_is_named_with_the_nearest_one(folder):
    recipe = folder / "pretrain.toml"
    recipe.write_text(recipe.read_text().replace("warmup_steps", "warm_up_steps"))
    message = fails(folder, "pretrain", "pretrain.toml")
    assert message.startswith("pretrain.toml: ")
    assert "'warm_up_steps'" in message
    assert "[optim]" in message
    assert "did you mean 'warmup_steps'?" in message
    _, err = kogia_here(folder, "rl", "--init", "base", "--group-sise", "4", status=2)
    assert "--group-sise" in err
    assert "--group-size" in err


@pytest.mark.parametrize(
    "words", [("eval", "absent"), ("rl", "--init", "absent"), ("chat", "absent"), ("curate", "absent")]
)
def test_a_missing_checkpoint_is_named(folder, words):
    assert fails(folder, *words) == "absent: no such file or directory; give a model directory or a run directory"
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("command", ["eval", "pretrain", "sft"])
def test_a_truncated_checkpoint_is_named_and_left_as_it_is(folder, command):
    weights = latest_checkpoint(folder / "base") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = contents(folder / "base")
    data = '[data]\nbatch_tokens = 256\nmax_seqlen = 64\n[[data.sources]]\nspec = "corpus.jsonl"\n'
    (folder / "corpus.jsonl").write_text('{"text": "1 + 1 = 2"}\n')
    (folder / "sft.toml").write_text(f'init = "base"\nout = "tuned"\nsteps = 3\n{data}')
    words = {
        "eval": ("eval", "base", "--tasks", "countdown"),
        "pretrain": ("pretrain", "pretrain.toml", "--resume", "--steps", "20"),
        "sft": ("sft", "sft.toml"),
    }
    message = fails(folder, *words[command])
    assert "model.safetensors" in message
    assert "damaged or truncated" in message
    assert contents(folder / "base") == before


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint_named(folder):
    flags = ("--out", "wild", "--optim.lr", "1e30", "--optim.warmup-steps", "0", "--save-every", "1")
    message = fails(folder, "pretrain", "pretrain.toml", *flags)
    for words in (
        "step 2: ",
        "weights were not updated",
        "wild/checkpoints/step-000001",
        "optim.lr = 1e+30",
        "--resume",
    ):
        assert words in message
    assert latest_checkpoint(folder / "wild").name == "step-000001"
    # what was saved is still good to go on from, with the fix applied
    kogia_here(folder, "pretrain", "pretrain.toml", "--out", "tame", "--steps", "1")
    assert latest_checkpoint(folder / "tame") is not None


def test_a_diverging_policy_stops_with_one_line(folder, checkpoint):
    flags = ("--tasks", "toy_task:Checksum", *TINY_RL, "--optim.lr", "1e30", "--optim.warmup-steps", "0")
    message = fails(folder, "rl", "--init", str(checkpoint), "--out", "wild", *flags, "--save-every", "1")
    assert "NaN" in message or "not updated" in message
    assert latest_checkpoint(folder / "wild").name == "step-000001"


@pytest.mark.parametrize(
    ("module", "spec", "words"),
    [
        (None, "absent_tasks:Mine", "absent_tasks"),
        ("import absent_dependency\nclass Mine: pass\n", "mine_a:Mine", "absent_dependency"),
        ("class Mine(:\n", "mine_b:Mine", "mine_b.py"),
        ("class Mine: pass\n", "mine_c:Other", "Other"),
        (None, "contdown", "did you mean 'countdown'"),
    ],
)
def test_a_task_that_does_not_load_is_named_before_anything_is_written(folder, module, spec, words):
    if module:
        (folder / f"{spec.partition(':')[0]}.py").write_text(module)
    for command in (("rl", "--init", "base", "--out", "new"), ("eval", "base")):
        message = fails(folder, *command, "--tasks", spec)
        assert words in message
        assert spec.partition(":")[0] in message
    assert not (folder / "new").exists()


@pytest.mark.parametrize(("what", "status"), [("raise", "error"), ("hang", "timeout")])
def test_a_verifier_that_raises_or_never_returns_costs_only_its_samples(folder, checkpoint, what, status):
    task = f'tasks = ["traps:Trap"]\ntask_options = {{ "traps:Trap" = {{ what = "{what}" }} }}\n'
    (folder / "trap.toml").write_text(task)
    kogia_here(folder, "rl", "trap.toml", "--init", str(checkpoint), "--out", "trained", *TINY_RL, "--steps", "1")
    (line,) = read_metrics(folder / "trained")
    assert line[f"status_{status}"] == pytest.approx(2 / 6)  # two problems of six
    assert line["status_ok"] == pytest.approx(4 / 6)
    assert latest_checkpoint(folder / "trained").name == "step-000001"


FULL_DISK = """
import resource
limit = {limit}
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # from here on, the kernel refuses to grow a file beyond it
"""


def test_a_full_disk_while_saving_names_the_place_and_keeps_the_older_checkpoint(folder):
    before = contents(folder / "base")
    code = FULL_DISK.format(limit=40_000)
    message = fails(folder, "pretrain", "pretrain.toml", "--resume", "--steps", "14", code=code)
    assert "cannot save base/checkpoints/step-000014" in message
    assert "Free some space; base/checkpoints/step-000012 is intact: continue from it with --resume" in message
    assert contents(folder / "base") == before
    kogia_here(folder, "pretrain", "pretrain.toml", "--resume", "--steps", "14")
    assert latest_checkpoint(folder / "base").name == "step-000014"
    assert read_metrics(folder / "base")[-1]["step"] == 14


def test_ctrl_c_saves_the_step_and_exits_130_and_the_run_goes_on(folder):
    words = ("pretrain", "pretrain.toml", "--out", "long", "--optim.schedule", "constant")
    process = start(folder, *words, "--steps", "100000")
    while len(read_metrics(folder / "long")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    done = read_metrics(folder / "long")[-1]["step"]
    assert latest_checkpoint(folder / "long").name == f"step-{done:06d}"
    assert f"saved as long/checkpoints/step-{done:06d}; --resume continues" in err
    kogia_here(folder, *words, "--steps", str(done + 1), "--resume")
    assert latest_checkpoint(folder / "long").name == f"step-{done + 1:06d}"


def test_a_prompt_longer_than_the_context_is_named_with_the_limit(folder, checkpoint):
    long = " ".join(["say 1"] * 200)
    message = fails(folder, "generate", str(checkpoint), "--prompt", long)
    assert "must have 1 to 127" in message
    assert "shorten the prompt" in message
    task = 'tasks = ["traps:Trap"]\ntask_options = { "traps:Trap" = { words = 200 } }\n'
    (folder / "long.toml").write_text(task)
    model = str(checkpoint)
    for words in (("rl", "long.toml", "--init", model, *TINY_RL), ("eval", "long.toml", model)):
        message = fails(folder, *words)
        assert "context is 128" in message
        assert "long_prompts = 'skip'" in message
        assert "problem '" in message  # whose prompt it is
