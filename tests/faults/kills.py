"""Kill commands of kogia at seeded moments, go on as a user would, and compare with a run that nobody disturbed.

A scenario is a command in a folder of its own. A trial copies the folder, kills the command (SIGKILL or SIGTERM, at a
change of the file system or at a moment), sometimes kills what goes on with it as well, lets it end, and compares all
files with those of the undisturbed run: weights, optimiser, random states, logs, outputs, foreign files. Times are
left out, and of the checkpoints the newest counts.
"""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parent / "server.py"
LIMIT_SECONDS = 120.0
"""Over this a command counts as one that hangs; the longest takes some seconds."""
MOST_KILLS = 4
"""Of one trial."""
SHARE_AGAIN = 0.35
"""Of the commands that go on, how many are killed too."""
SHARE_TIMED = 0.3
"""Of the kills, how many come at a moment and not at a change of the file system."""
SHARE_TERM = 0.3
"""Of the kills, how many are SIGTERM."""
SIGTERM, SIGKILL = 15, 9
LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.(?:tmp|old)$")
TIMES = re.compile(r"fingerprint|seconds|tokens_per_second|mfu_|peak_|memory_gib|mtp_acceptance|_seconds$")
KEPT = 2
"""Checkpoints that a run keeps."""

PRETRAIN = """
steps = 6
save_every = 2
eval_every = 3
keep_checkpoints = 2
threads = 1
tokenizer_documents = 60
[model]
vocab_size = 270
dim = 16
num_layers = 2
ffn_dim = 24
num_mtp_layers = 1
max_position = 96
[model.attention]
kind = "mla"
num_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 8
[model.moe]
num_experts = 4
topk = 2
expert_dim = 8
[data]
batch_tokens = 128
max_seqlen = 64
val_share = 0.1
[[data.sources]]
spec = "kogia.tasks.synthetic:base_corpus"
num = 60
[optim]
lr = 3e-3
warmup_steps = 2
"""
PREPARE = """
vocab_size = 270
val_share = 0.2
workers = 1
[[sources]]
spec = "rows.jsonl.gz"
[[sources]]
spec = "p*.txt"
separator = "\\n"
dedup = "none"
[[sources]]
spec = "kogia.tasks.synthetic:base_corpus"
num = 60
[[evaluations]]
spec = "test.jsonl"
"""
RL = """
init = "model"
tasks = ["toy_task:Checksum", "toy_task:Brief"]
steps = 4
prompts_per_step = 4
group_size = 4
max_tokens = 8
updates_per_rollout = 2
reference_every = 2
signal_prompts = 4
signal_samples = 4
eval_every = 2
eval_questions = 6
eval_samples = 2
save_every = 1
keep_checkpoints = 2
verify_workers = 1
verify_timeout = 60.0
device = "cpu"
threads = 1
[loss]
kl_coef = 0.05
[optim]
lr = 3e-3
[engine]
num_blocks = 256
block_size = 4
max_sequences = 32
"""
SAMPLING = (
    "--max-tokens 8 --verify-workers 1 --verify-timeout 60 --threads 1 --device cpu --engine.num-blocks 256 "
    "--engine.block-size 4 --engine.max-sequences 32 --tasks toy_task:Checksum toy_task:Brief"
).split()
DEMO = {
    "pretrain": {"steps": 4},
    "cold_start": {"steps": 4},
    "grpo": {
        "max_tokens": 12,
        "prompts_per_step": 2,
        "group_size": 2,
        "steps": 2,
        "save_every": 1,
        "signal_check": "false",
    },
    "curate": {"max_tokens": 48, "correct_only": "false", "min_language_share": 0.0, "num_problems": 40},
    "rejection_sft": {"steps": 4},
    "student": {"steps": 4},
}
"""What makes the demonstration's recipes short; the model learns nothing."""


@dataclass(frozen=True)
class Scenario:
    """A command, what the folder holds before it, and what of it must be old or new at any time."""

    name: str
    words: tuple[str, ...]
    resumes: bool = False
    """Whether it goes on with --resume; else with the same words."""
    before: tuple[tuple[str, ...], ...] = ()
    """Commands that make what the folder holds."""
    whole: str = ""
    """A file or directory that is the old or the new one at any time, and is there if it was."""


GUARDED = (
    "--average-decay 0.9 --micro-batches 2 --micro-batches-first 1 --ramp-steps 3 --guard.skips 1 --guard.rollbacks 1 "
    "--guard.sigmas 2 --guard.window 4 --optim.kind muon --optim.moments bfloat16 --dtype bfloat16 --recompute layer"
).split()
OVERWRITTEN = ("pretrain", "pretrain.toml", "--out", "runs/run", "--seed", "7", "--steps", "2", "--quiet")
CONVERT = ("convert", "model", "made/copy", "--dtype", "bfloat16", "--shard-gib", "0.00001")
GENERATE = "generate model --file prompts.txt --out made/answers.jsonl --max-tokens 8 --seed 1 --device cpu".split()
CURATE = "curate model --out made/kept.jsonl --num-samples 4 --num-problems 8 --batch-problems 2 --quiet".split()
SFT = (
    "sft --init model --out runs/run --data rows.jsonl.gz --steps 6 --save-every 2 --keep-checkpoints 2 --threads 1 "
    "--data.cache-dir cache --data.batch-tokens 128 --data.max-seqlen 96 --data.val-share 0.2 --eval-every 3 "
    "--optim.warmup-steps 1 --quiet"
).split()
DEMONSTRATION = (
    "demo --recipes recipes --out demo --scale 1 --num-questions 4 --num-samples 2 --threads 1 --quiet".split()
)
EVAL = "eval model --out evals --num-questions 12 --num-samples 3 --greedy --batch-questions 3 --quiet".split()
SCENARIOS = (
    Scenario("pretrain", ("pretrain", "pretrain.toml", "--out", "runs/run", "--quiet"), resumes=True),
    Scenario("pretrain-all", ("pretrain", "pretrain.toml", "--out", "runs/run", "--quiet", *GUARDED), resumes=True),
    Scenario("sft", tuple(SFT), resumes=True),
    Scenario(
        "overwrite", ("pretrain", "pretrain.toml", "--out", "runs/run", "--overwrite", "--quiet"), before=(OVERWRITTEN,)
    ),
    Scenario("prepare", ("prepare", "prepare.toml", "--out", "made/ready", "--quiet")),
    Scenario(
        "prepare-over",
        ("prepare", "prepare.toml", "--out", "made/ready", "--quiet", "--ngram", "8", "--overwrite"),
        before=(("prepare", "prepare.toml", "--out", "made/ready", "--quiet"),),
    ),
    Scenario("rl", ("rl", "rl.toml", "--out", "runs/run", "--quiet"), resumes=True),
    Scenario("eval", (*EVAL, *SAMPLING), resumes=True),
    Scenario("curate", (*CURATE, *SAMPLING)),
    Scenario(
        "curate-over",
        (*CURATE, *SAMPLING, "--overwrite", "--seed", "3"),
        before=((*CURATE, *SAMPLING),),
    ),
    Scenario("generate", tuple(GENERATE), resumes=True),
    Scenario("generate-over", (*GENERATE, "--n", "2"), resumes=True, before=(tuple(GENERATE),)),
    Scenario("convert", CONVERT),
    Scenario(
        "convert-over",
        (*CONVERT, "--overwrite"),
        before=(("convert", "model", "made/copy"),),
        whole="made/copy",
    ),
    Scenario(
        "convert-gguf",
        ("convert", "model", "made/model.gguf", "--quantize", "f16", "--overwrite"),
        before=(("convert", "model", "made/model.gguf"),),
        whole="made/model.gguf",
    ),
    Scenario(
        "report", ("report", "runs/run", "--out", "made/page.html"), before=(OVERWRITTEN,), whole="made/page.html"
    ),
    Scenario("demo", tuple(DEMONSTRATION)),
)


@dataclass
class Trial:
    """What happened in one trial."""

    scenario: str
    seed: int
    kills: list[str] = field(default_factory=list)
    """Each as `SIGKILL before os.rename runs/run/.run.toml...`."""
    faults: list[str] = field(default_factory=list)
    """What was lost, or went wrong besides; nothing in a trial that is as it should be."""


class Campaign:
    """Folders of the scenarios and the server that runs commands in them. A context manager."""

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        self.before: dict[str, dict[str, Any]] = {}
        self.after: dict[str, dict[str, Any]] = {}
        self.events: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "Campaign":
        self.server = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=30)

    def run(self, folder: Path, words: Sequence[str], **kill: Any) -> dict[str, Any]:
        """How a command ended; see `faults.server.run`."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        job = {"folder": str(folder), "words": list(words), "limit": LIMIT_SECONDS, **kill}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def prepare(self, scenario: Scenario) -> None:
        """Make the scenario's folder, run it undisturbed in a copy, and remember both."""
        start = self.place / f"{scenario.name}-start"
        make_folder(start)
        for words in scenario.before:
            self._must(self.run(start, words), words)
        for name in ("made", "runs"):  # what stands beside a target under names like those of drafts is somebody's
            _plant(start / name)
        with self._copy(scenario) as folder:
            ended = self.run(folder, scenario.words)
            self._must(ended, scenario.words)
            self.before[scenario.name], self.after[scenario.name] = contents(start), contents(folder)
            self.events[scenario.name], self.seconds[scenario.name] = ended["events"], ended["seconds"]

    def _must(self, ended: dict[str, Any], words: Sequence[str]) -> None:
        assert ended["status"] == 0, f"{words}: status {ended['status']}\n{ended['err']}"

    @contextmanager
    def _copy(self, scenario: Scenario) -> Iterator[Path]:
        folder = self.place / f"{scenario.name}-trial"
        shutil.copytree(self.place / f"{scenario.name}-start", folder, symlinks=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def trial(self, scenario: Scenario, seed: int) -> Trial:
        """One trial; equal seeds choose equal moments."""
        trial, draw = Trial(scenario.name, seed), random.Random(f"{scenario.name} {seed}")
        with self._copy(scenario) as folder:
            words = scenario.words
            while True:
                kill = self._kill(scenario, draw)
                again = not trial.kills or (len(trial.kills) < MOST_KILLS and draw.random() < SHARE_AGAIN)
                ended = self._start(folder, scenario, words, trial, kill if again else {})
                if again and ended["status"] in (-SIGKILL, -SIGTERM, 130):
                    trial.kills.append(self._describe(kill, ended))
                    self._check_whole(folder, scenario, trial)
                    words = self._goes_on(scenario)
                    continue
                if ended["status"] == 0 or self._is_there(scenario, ended):
                    break
                trial.faults.append(f"status {ended['status']}: {ended['err'][-1500:]}")
                return trial
            trial.faults += differences(self.after[scenario.name], contents(folder))
        return trial

    def _start(
        self, folder: Path, scenario: Scenario, words: Sequence[str], trial: Trial, kill: dict[str, Any]
    ) -> dict[str, Any]:
        ended = self.run(folder, words, quick=not kill or "after" in kill, **kill)
        if ended["status"] == 2 and scenario.resumes and "leave --resume out" in ended["err"]:  # as it advises
            ended = self.run(folder, scenario.words, quick=not kill or "after" in kill, **kill)
        if ended["hung"]:
            trial.faults.append(f"hung over {LIMIT_SECONDS:.0f} s: {ended['err'][-1500:]}")
        if ended["orphans"]:
            trial.faults.append(f"{ended['orphans']} processes lived on")
        if "Traceback" in ended["err"] and "KeyboardInterrupt" not in ended["err"].rstrip().rpartition("\n")[2]:
            trial.faults.append(f"traceback: {ended['err'][-3000:]}")
        return ended

    def _kill(self, scenario: Scenario, draw: random.Random) -> dict[str, Any]:
        number = SIGTERM if draw.random() < SHARE_TERM else SIGKILL
        if draw.random() < SHARE_TIMED:
            return {"signal": number, "after": draw.uniform(0.0, 1.1 * self.seconds[scenario.name])}
        return {"signal": number, "event": draw.randint(1, len(self.events[scenario.name]))}

    def _describe(self, kill: dict[str, Any], ended: dict[str, Any]) -> str:
        name = "SIGTERM" if kill["signal"] == SIGTERM else "SIGKILL"
        if "after" in kill:
            return f"{name} after {kill['after']:.3f} s"
        return f"{name} at change {kill['event']}, {ended['events'][kill['event'] - 1 :][:1]}"

    def _goes_on(self, scenario: Scenario) -> Sequence[str]:
        return (*scenario.words, "--resume") if scenario.resumes else scenario.words

    def _is_there(self, scenario: Scenario, ended: dict[str, Any]) -> bool:
        """Whether the command was killed after its work and says now that the result is there."""
        return scenario.name == "convert" and "exists already" in ended["err"]

    def _check_whole(self, folder: Path, scenario: Scenario, trial: Trial) -> None:
        if not scenario.whole:
            return
        now, old, new = (
            {key: value for key, value in each.items() if f"{key}/".startswith(f"{scenario.whole}/")}
            for each in (contents(folder), self.before[scenario.name], self.after[scenario.name])
        )
        if now not in (old, new):
            trial.faults.append(f"{scenario.whole} is neither the old nor the new one after {trial.kills[-1]}")


def make_folder(folder: Path) -> None:
    """What every scenario starts from: recipes, rows, prompts, a model that stops by itself, and foreign files."""
    folder.mkdir(parents=True)
    (folder / "pretrain.toml").write_text(PRETRAIN)
    (folder / "prepare.toml").write_text(PREPARE)
    (folder / "test.jsonl").write_text('{"question": "say 3"}\n{"question": "4 4 4 4 4"}\n')
    (folder / "rl.toml").write_text(RL)
    (folder / "prompts.txt").write_text("".join(f"say {i}\n" for i in range(6)))
    with gzip.GzipFile(folder / "rows.jsonl.gz", "wb", mtime=0) as rows:
        for i in range(40):
            rows.write(json.dumps({"prompt": f"say {i}", "completion": f"{i} " * (1 + i % 5)}).encode() + b"\n")
    _save_model(folder / "model")
    _short_recipes(folder / "recipes")


def _save_model(directory: Path) -> None:
    from tiny_checkpoint import save_tiny_checkpoint

    save_tiny_checkpoint(directory)


def _short_recipes(directory: Path) -> None:
    from kogia.demo.config import RECIPES

    directory.mkdir()
    for file in RECIPES.glob("*.toml"):
        text = file.read_text(encoding="utf-8")
        for key, value in DEMO.get(file.stem, {}).items():
            text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            text = text if found else f"{key} = {value}\n{text}"
        for old, new in (
            ("batch_tokens = 4096", "batch_tokens = 512"),
            ("max_seqlen = 256", "max_seqlen = 128"),
            ("num_blocks = 24000", "num_blocks = 600"),
            ("dim = 96", "dim = 16"),
            ("ffn_dim = 384", "ffn_dim = 24"),
        ):
            text = text.replace(old, new)
        text = re.sub(r"(?m)^num = \d+$", "num = 500", text)
        (directory / file.name).write_text(text, encoding="utf-8")


def _plant(directory: Path) -> None:
    """Foreign files with names much like those that kogia makes."""
    directory.mkdir(exist_ok=True)
    for name in ("run", "copy", "ready", "kept.jsonl", "answers.jsonl"):
        for made in (f".{name}.tmp", f".{name}.7.tmp", f"{name}.partial", f"{name}.old"):
            (directory / made).mkdir()
            (directory / made / "mine.txt").write_text("mine")
        (directory / f".{name}.0123456789ABCDEF.tmp").write_text("mine")


def contents(folder: Path) -> dict[str, Any]:
    """What every file below `folder` holds, as it may be compared, by name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        parts = path.relative_to(folder).parts
        if "checkpoints" in parts[:-1]:
            place = folder.joinpath(*parts[: parts.index("checkpoints") + 1])
            steps = sorted(step.name for step in place.iterdir() if step.name.startswith("step-"))
            found[f"{place.relative_to(folder)} are few"] = len(steps) <= KEPT
            if not LEFTOVER.search(name) and steps and steps[-1] not in parts:
                continue
        if path.is_dir():
            found[name] = "directory"
        else:
            found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.suffix in (".json", ".settings"):
            return _timeless(json.loads(data))
        if path.suffix == ".jsonl":
            rows = [_timeless(json.loads(line)) for line in data.splitlines()]
            return rows if path.name in ("metrics.jsonl", "samples.jsonl") else sorted(rows, key=json.dumps)
    except ValueError:
        pass
    if path.suffix == ".html":
        return data.rstrip().endswith(b"</html>")
    return hashlib.sha256(data).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if not TIMES.search(key)}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """How two contents differ, in words."""
    words = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            words.append(f"{name} is missing")
        elif name not in expected:
            words.append(f"{name} is left over")
        elif expected[name] != found[name]:
            words.append(f"{name} differs: {str(found[name])[:300]} instead of {str(expected[name])[:300]}")
    return words


def moments(scenario: Scenario, num_trials: int, seed: int = 0) -> list[int]:
    """Seeds of trials."""
    return [seed * 1_000_003 + number for number in range(num_trials)]


if __name__ == "__main__":  # python tests/faults/kills.py DIR TRIALS [SCENARIO...]: for looking at faults
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with Campaign(Path(sys.argv[1])) as campaign:
        for each in SCENARIOS:
            if sys.argv[3:] and each.name not in sys.argv[3:]:
                continue
            campaign.prepare(each)
            print(each.name, f"{campaign.seconds[each.name]:.2f} s, {len(campaign.events[each.name])} changes")
            for number in moments(each, int(sys.argv[2])):
                trial = campaign.trial(each, number)
                print(" ", number, trial.kills, *trial.faults, sep="\n    ") if trial.faults else None
