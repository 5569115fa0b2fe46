"""`kogia demo`: pretrain, cold start, GRPO, rejection sampling, distillation, each measured on held-out problems.

Every stage is one of kogia's own commands with one of the recipes in `kogia/recipes/demo`; this file only puts them in
a row, measures between them and writes summary.json. OUT/stages.json remembers the seconds of what is done, so that an
interrupted demonstration goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kogia import log
from kogia.demo.checks import check_demo
from kogia.demo.config import RECIPES, STAGES, DemoConfig
from kogia.demo.recipes import (
    DRAFTING_STAGE,
    curate_recipe,
    drafting_config,
    eval_config,
    has_kept_nothing,
    recipe,
    rl_recipe,
    supervised_recipe,
)
from kogia.eval.config import EvalConfig
from kogia.eval.partial import find_partial
from kogia.eval.run import evaluate_tasks, file_name, output_directory
from kogia.files import check_directory, empty_directory, is_draft, write_json
from kogia.ops.machine import peak_memory
from kogia.report.build import main as run_report
from kogia.report.config import ReportConfig
from kogia.rl.config import RLConfig
from kogia.rl.curate import run_curation
from kogia.rl.grpo import run_stage as run_rl
from kogia.train.lock import sole_writer
from kogia.train.supervised import run_stage as run_supervised

STAGES_FILE = "stages.json"
STAND_IN = (
    "rejection sampling kept nothing: the model solved none of its problems. The stages after it were trained on the "
    "cold start's traces instead, so they show that everything runs, and nothing about the recipe"
)
"""What log, summary and page say of such a demonstration."""


def main(config: DemoConfig) -> None:
    """Run all stages that are not done yet, then write summary.json and report.html."""
    stages: list[tuple[str, str, Callable[[], None]]] = [
        ("base", "pretraining a base model on arithmetic", lambda: supervised(config, "base")),
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
    stored = stored_state(config)
    check_demo(config, {name for name, entry in stored.items() if isinstance(entry, dict) and entry.get("done")})
    if config.dry_run:
        for name, what, _ in stages:
            print(f"{name:14} {what}")
        print(f"recipes in {config.recipes or RECIPES}")
        return
    with open_directory(config) as out:
        done = Stages(out, stored_state(config))
        for number, (name, what, action) in enumerate(stages, start=1):
            log.info(f"[{number}/{len(stages)}] {what}")
            done.run(name, action)
            if name in STAGES:
                done.run(f"{name}_eval", lambda name=name: measure(config, name))
                log.info(f"      {_score_line(out, name)}")
            if name == DRAFTING_STAGE:
                done.run("drafting", lambda: evaluate(drafting_config(config)))
        done.run("report", lambda: summarise_and_report(config, done))
    _farewell(config, done)


def stored_state(config: DemoConfig) -> dict[str, Any]:
    """What stages.json in OUT says, or the beginning of one. Raises ValueError if OUT holds anything else or may not be
    written, or a demonstration with other settings and `overwrite` is not set."""
    out, file = Path(config.out), Path(config.out) / STAGES_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {config.out!r}: is a file; name a directory")
    check_directory(out)
    begun = not out.is_dir() or file.exists()
    if not begun and any(not is_draft(path, STAGES_FILE) for path in out.iterdir()):  # a killed start leaves a draft
        raise ValueError(f"out = {config.out!r}: holds other files and no {STAGES_FILE}; name a new directory")
    settings = {"seed": config.seed, "scale": config.scale}
    stored = _read_state(file) if file.exists() and not config.overwrite else {}
    if stored.setdefault("settings", settings) != settings:
        raise ValueError(
            f"{out} holds a demonstration with {stored['settings']}, not {settings}: add --overwrite to delete it, or "
            "name another --out"
        )
    return stored


@contextmanager
def open_directory(config: DemoConfig) -> Iterator[Path]:
    """OUT, made if it is not there and emptied with `overwrite`, kept for this demonstration while the block lasts.

    Raises ValueError if another one is at work there.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        if config.overwrite:
            empty_directory(out, last=STAGES_FILE)
        yield out


class Stages:
    """What is done, and how long it took, kept in OUT/stages.json."""

    def __init__(self, out: Path, state: dict[str, Any]) -> None:
        self.file = out / STAGES_FILE
        self.state = state
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
            self.state["peak_memory_bytes"] = max(self.state.get("peak_memory_bytes", 0), resident_peak())
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


def supervised(config: DemoConfig, stage: str) -> None:
    found = supervised_recipe(config, stage)
    run_supervised(replace(found, resume=Path(found.out).exists()))


def reinforce(config: DemoConfig) -> None:
    found = rl_recipe(config)
    run_rl(replace(found, resume=Path(found.out).exists()))


def curate(config: DemoConfig) -> None:
    run_curation(curate_recipe(config))
    if has_kept_nothing(config):
        log.warn(f"{STAND_IN}. scale = {config.scale:g} may train too little")


def measure(config: DemoConfig, name: str) -> None:
    """Evaluate a stage's run on the held-out problems, the same at every stage; files go to its evals/."""
    evaluate(eval_config(config, Path(config.out) / name))


def evaluate(config: EvalConfig) -> None:
    """The evaluation, or the rest of it where the demonstration was interrupted in the middle of one."""
    left = find_partial(output_directory(config), file_name(config, config.tasks[0]))
    evaluate_tasks(replace(config, resume=left is not None))


def resident_peak() -> int:
    """Of this process so far. Workers beside it are small, and cannot be told: the system counts a child from its fork
    on, when it still is this process."""
    return peak_memory(torch.device("cpu"))


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
        "peak_memory_bytes": done.state.get("peak_memory_bytes", resident_peak()),
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "notes": [STAND_IN] if has_kept_nothing(config) else [],
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
    flags = _task_flags(config)
    print(f"  kogia chat {out / 'rejection_sft'} --single  # numbers 4 6 15 target 17")
    print(f"  kogia eval {out / 'grpo'} --tasks countdown \\\n      {flags}")
    print(f"  kogia rl --init {out / 'cold_start'} --out runs/mine --tasks countdown \\\n      {flags}")
    print("\nA task of your own, from nothing: docs/your-task.md.")
