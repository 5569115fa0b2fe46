"""`kogia demo`: pretrain, cold start, GRPO, rejection sampling, distillation, each measured on held-out problems.

Every stage is one of kogia's own commands with one of the recipes in `kogia/recipes/demo`; this file only puts them in
a row, measures between them and writes summary.json. OUT/stages.json remembers the seconds of what is done, so that an
interrupted demonstration goes on where it stopped.
"""

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from kogia import log
from kogia.config import from_dict, parse_toml
from kogia.demo.config import RECIPES, STAGES, DemoConfig
from kogia.eval.config import EvalConfig
from kogia.eval.partial import find_partial
from kogia.eval.run import evaluate_tasks, file_name, output_directory
from kogia.files import empty_directory, is_draft, write_json
from kogia.report.build import main as run_report
from kogia.report.config import ReportConfig
from kogia.rl.config import CurateConfig, RLConfig
from kogia.rl.curate import run_curation
from kogia.rl.grpo import run_stage as run_rl
from kogia.train.config import SupervisedConfig
from kogia.train.lock import sole_writer
from kogia.train.supervised import run_stage as run_supervised

T = TypeVar("T")
STAGES_FILE = "stages.json"
DRAFTING_STAGE = "rejection_sft"
"""The stage whose recipe trains the multi-token-prediction module."""
RUNS_PREFIX = "runs/demo"
"""What the recipes call the demonstration's directory; replaced by `out`."""


def main(config: DemoConfig) -> None:
    """Run all stages that are not done yet, then write summary.json and report.html."""
    stages: list[tuple[str, str, Callable[[], None]]] = [
        ("base", "pretraining a base model on arithmetic", lambda: supervised(config, "pretrain")),
        (
            "cold_start",
            "cold start: the form of reasoning, from noisy traces",
            lambda: supervised(config, "cold_start"),
        ),
        ("grpo", "GRPO with rule rewards", lambda: reinforce(config)),
        ("curated", "rejection sampling", lambda: curate(config)),
        ("rejection_sft", "fine-tuning on the kept samples", lambda: supervised(config, "rejection_sft")),
        ("student", "distilling into a dense student", lambda: supervised(config, "student")),
    ]
    if config.dry_run:
        for name, what, _ in stages:
            print(f"{name:14} {what}")
        print(f"recipes in {config.recipes or RECIPES}")
        return
    with open_directory(config) as out:
        done = Stages(out, config)
        for number, (name, what, action) in enumerate(stages, start=1):
            log.info(f"[{number}/{len(stages)}] {what}")
            done.run(name, action)
            if name in STAGES:
                done.run(f"{name}_eval", lambda name=name: measure(config, name))
                log.info(f"      {_score_line(out, name)}")
            if name == DRAFTING_STAGE:
                done.run("drafting", lambda: measure_drafting(config))
        done.run("report", lambda: summarise_and_report(config, done))
    _farewell(config, done)


@contextmanager
def open_directory(config: DemoConfig) -> Iterator[Path]:
    """OUT, made if it is not there and emptied with `overwrite`, kept for this demonstration while the block lasts.

    Raises ValueError if it holds anything else, or another demonstration is at work there.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {config.out!r}: is a file; name a directory")
    # a start that was killed leaves at most a draft
    begun = not out.exists() or (out / STAGES_FILE).exists()
    if not begun and any(not is_draft(path, STAGES_FILE) for path in out.iterdir()):
        raise ValueError(f"out = {config.out!r}: holds other files and no {STAGES_FILE}; name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        if config.overwrite:
            empty_directory(out, last=STAGES_FILE)
        yield out


class Stages:
    """What is done, and how long it took, kept in OUT/stages.json."""

    def __init__(self, out: Path, config: DemoConfig) -> None:
        self.file = out / STAGES_FILE
        self.state: dict[str, Any] = _read_state(self.file) if self.file.exists() else {}
        settings = {"seed": config.seed, "scale": config.scale}
        if self.state.setdefault("settings", settings) != settings:
            raise ValueError(
                f"{out} holds a demonstration with {self.state['settings']}, not {settings}: add --overwrite to delete "
                "it, or name another --out"
            )
        write_json(self.file, self.state)

    def run(self, name: str, action: Callable[[], None]) -> None:
        """Do `action` unless it is done; time spent before an interruption counts."""
        entry = self.state.setdefault(name, {"seconds": 0.0, "done": False})
        if entry["done"]:
            return
        start = time.monotonic()
        try:
            action()
            entry["done"] = True
        finally:
            entry["seconds"] += time.monotonic() - start
            self.state["peak_memory_bytes"] = max(self.state.get("peak_memory_bytes", 0), peak_memory_bytes())
            write_json(self.file, self.state)

    @property
    def seconds(self) -> float:
        return sum(entry["seconds"] for entry in self.state.values() if isinstance(entry, dict) and "seconds" in entry)


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({error}); restore it, or add --overwrite to start over") from None
    if not isinstance(state, dict) or not all(_is_sound(name, entry) for name, entry in state.items()):
        raise ValueError(f"{file}: is no record of a demonstration; restore it, or add --overwrite to start over")
    return state


def _is_sound(name: str, entry: Any) -> bool:
    if name == "settings":
        return isinstance(entry, dict)
    if name == "peak_memory_bytes":
        return isinstance(entry, int)
    match entry:
        case {"seconds": int() | float(), "done": bool()}:
            return True
    return False


def recipe(config: DemoConfig, name: str, cls: type[T]) -> T:
    """A stage's configuration: its recipe, under this demonstration's directory, seed, scale and threads."""
    file = Path(config.recipes or RECIPES) / f"{name}.toml"
    try:
        data = parse_toml(file.read_text(encoding="utf-8").replace(RUNS_PREFIX, config.out))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    data |= {"seed": data.get("seed", 0) + config.seed, "device": config.device, "quiet": config.quiet}
    for key in ("steps", "num_problems"):
        if key in data:
            data[key] = max(2, round(data[key] * config.scale))
    for source in data.get("data", {}).get("sources", []):
        source["seed"] = source.get("seed", 0) + config.seed
        if "num" in source:
            source["num"] = max(500, round(source["num"] * min(1.0, config.scale)))
    if config.threads is not None:
        data["threads"] = config.threads
    return from_dict(cls, data, where=file.name)


def supervised(config: DemoConfig, name: str) -> None:
    stage = recipe(config, name, SupervisedConfig)
    run_supervised(replace(stage, resume=Path(stage.out).exists()))


def reinforce(config: DemoConfig) -> None:
    rl = recipe(config, "grpo", RLConfig)
    # a scaled-down cold start has nothing for the signal check to find
    check = rl.signal_check and config.scale >= 0.5
    run_rl(replace(rl, resume=Path(rl.out).exists(), signal_check=check))


def curate(config: DemoConfig) -> None:
    curated = recipe(config, "curate", CurateConfig)
    Path(curated.out).parent.mkdir(parents=True, exist_ok=True)
    run_curation(curated)
    if not Path(curated.out).read_text(encoding="utf-8").strip():
        raise ValueError(
            f"rejection sampling kept nothing: after GRPO the model solves none of {curated.num_problems} problems, "
            f"and the next stages have no data. scale = {config.scale} trains too little; start again with a larger "
            "--scale"
        )


def measure(config: DemoConfig, name: str) -> None:
    """Evaluate a stage's run on the held-out problems, the same at every stage; files go to its evals/."""
    evaluate(eval_config(config, Path(config.out) / name))


def measure_drafting(config: DemoConfig) -> None:
    """How many drafts of the multi-token-prediction module the model accepts; files go to evals/drafting.*."""
    held_out = eval_config(config, Path(config.out) / DRAFTING_STAGE)
    drafting = replace(held_out.engine, num_draft_tokens=1)
    num_questions = min(100, config.num_questions)
    evaluate(replace(held_out, num_questions=num_questions, num_samples=0, name="drafting", engine=drafting))


def evaluate(config: EvalConfig) -> None:
    """The evaluation, or the rest of it where the demonstration was interrupted in the middle of one."""
    left = find_partial(output_directory(config), file_name(config, config.tasks[0]))
    evaluate_tasks(replace(config, resume=left is not None))


def eval_config(config: DemoConfig, run: Path) -> EvalConfig:
    """pass@1 at temperature 1, pass@8, maj@8 and greedy, under the task and limits that GRPO trained with."""
    rl = recipe(config, "grpo", RLConfig)
    return EvalConfig(
        str(run),
        tasks=rl.tasks,
        task_options=rl.task_options,
        num_questions=config.num_questions,
        num_samples=config.num_samples,
        max_tokens=rl.max_tokens,
        greedy=True,
        seed=config.seed,
        name="heldout",
        out=str(run / "evals"),
        engine=rl.engine,
        device=config.device,
        threads=config.threads,
        quiet=config.quiet,
    )


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far plus that of its largest finished worker."""
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return 1024 * sum(usage)


def summarise_and_report(config: DemoConfig, done: Stages) -> None:
    """summary.json, of which the report is made, and report.html."""
    out = Path(config.out)
    stages = []
    for name in STAGES:
        result = json.loads((out / name / "evals" / "heldout.json").read_text(encoding="utf-8"))
        entry = {
            "name": name,
            "seconds": done.state[name]["seconds"],
            "eval_seconds": done.state[f"{name}_eval"]["seconds"],
        }
        skipped = {"name", "task", "split", "checkpoint", "sampling", "seconds"}
        stages.append(entry | {key: value for key, value in result.items() if key not in skipped})
        if name == DRAFTING_STAGE:
            drafting = json.loads((out / name / "evals" / "drafting.json").read_text(encoding="utf-8"))
            stages[-1]["mtp_acceptance"] = drafting["mtp_acceptance"]
    summary = {
        "seconds": round(done.seconds, 1),
        "peak_memory_bytes": done.state.get("peak_memory_bytes", peak_memory_bytes()),
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "stages": stages,
    }
    write_json(out / "summary.json", summary)
    run_report(ReportConfig(out))


def _score_line(out: Path, name: str) -> str:
    result = json.loads((out / name / "evals" / "heldout.json").read_text(encoding="utf-8"))
    mean, low, high = result["pass@1"]
    return (
        f"{name}: pass@1 {mean:.1%} ({low:.1%} to {high:.1%}), greedy {result['greedy'][0]:.1%}, pass@8 "
        f"{result['pass@8'][0]:.1%}, thinks {result['think_tokens']:.0f} tokens, truncated {result['truncated']:.1%}"
        if result["pass@8"] is not None
        else f"{name}: pass@1 {mean:.1%} ({low:.1%} to {high:.1%})"
    )


def _task_flags(config: DemoConfig) -> str:
    options = recipe(config, "grpo", RLConfig).task_options
    return " ".join(
        f"--task-options.{task}.{key} {value}" for task, table in options.items() for key, value in table.items()
    )


def _farewell(config: DemoConfig, done: Stages) -> None:
    out = Path(config.out)
    print(f"\nDone in {done.seconds / 60:.1f} minutes. The report is {out / 'report.html'}. Next:\n")
    print(f"  kogia chat {out / 'rejection_sft'} --single            # type: numbers 4 6 15 target 17")
    print(f"  kogia eval {out / 'grpo'} --tasks countdown {_task_flags(config)}    # measure it again, your way")
    print(
        f"  kogia rl --init {out / 'cold_start'} --out runs/mine --tasks my_tasks:MyTask    # reinforce your own task"
    )
