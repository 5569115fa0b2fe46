"""`kogia demo`: pretrain, cold start, GRPO, rejection sampling, distillation, each measured on held-out problems.

Every stage is one of kogia's own commands with one of the recipes in `kogia/recipes/demo`; this file only puts them in
a row, measures between them and writes summary.json. OUT/stages.json remembers the seconds of what is done, so that an
interrupted demonstration goes on where it stopped.
"""

import json
import resource
import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from kogia import log
from kogia.config import from_dict
from kogia.demo.config import RECIPES, STAGES, DemoConfig
from kogia.engine.config import EngineConfig
from kogia.eval.config import EvalConfig
from kogia.eval.run import main as run_eval
from kogia.report.build import main as run_report
from kogia.report.config import ReportConfig
from kogia.rl.config import CurateConfig, RLConfig
from kogia.rl.curate import main as run_curate
from kogia.rl.grpo import main as run_rl
from kogia.train.config import SupervisedConfig
from kogia.train.supervised import main as run_supervised

T = TypeVar("T")
RUNS_PREFIX = "runs/demo"
"""What the recipes call the demonstration's directory; replaced by `out`."""


def main(config: DemoConfig) -> None:
    """Run all stages that are not done yet, then write summary.json and report.html."""
    stages: list[tuple[str, str, Callable[[], None]]] = [
        ("base", "pretraining a base model on arithmetic", lambda: supervised(config, "pretrain")),
        ("cold_start", "cold start: the form of reasoning, from noisy traces", lambda: supervised(config, "cold_start")),
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
    out = Path(config.out)
    if config.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    done = Stages(out, config)
    for number, (name, what, action) in enumerate(stages, start=1):
        log.info(f"[{number}/{len(stages)}] {what}")
        done.run(name, action)
        if name in STAGES:
            done.run(f"{name}_eval", lambda name=name: measure(config, name))
            log.info(f"      {_score_line(out, name)}")
    done.run("report", lambda: summarise_and_report(config, done))
    _farewell(config, done)


class Stages:
    """What is done, and how long it took, kept in OUT/stages.json."""

    def __init__(self, out: Path, config: DemoConfig) -> None:
        self.file = out / "stages.json"
        self.state: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        settings = {"seed": config.seed, "scale": config.scale}
        if self.state.setdefault("settings", settings) != settings:
            raise ValueError(
                f"{out} holds a demonstration with {self.state['settings']}, not {settings}: add --overwrite to delete "
                "it, or name another --out"
            )

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
            log.write_json(self.file, self.state)

    @property
    def seconds(self) -> float:
        return sum(entry["seconds"] for entry in self.state.values() if isinstance(entry, dict) and "seconds" in entry)


def recipe(config: DemoConfig, name: str, cls: type[T]) -> T:
    """A stage's configuration: its recipe, under this demonstration's directory, seed, scale and threads."""
    file = Path(config.recipes or RECIPES) / f"{name}.toml"
    data = tomllib.loads(file.read_text(encoding="utf-8").replace(RUNS_PREFIX, config.out))
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
    run_supervised(replace(recipe(config, name, SupervisedConfig), resume=True))


def reinforce(config: DemoConfig) -> None:
    rl = recipe(config, "grpo", RLConfig)
    # a scaled-down cold start has nothing for the signal check to find
    run_rl(replace(rl, resume=True, signal_check=rl.signal_check and config.scale >= 0.5))


def curate(config: DemoConfig) -> None:
    curated = recipe(config, "curate", CurateConfig)
    Path(curated.out).parent.mkdir(parents=True, exist_ok=True)
    run_curate(curated)


def measure(config: DemoConfig, name: str) -> None:
    """pass@1 (temperature 1), pass@8, maj@8 and greedy on the same held-out problems at every stage."""
    rl = recipe(config, "grpo", RLConfig)
    run = Path(config.out) / name
    run_eval(
        EvalConfig(
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
            engine=replace(rl.engine, num_draft_tokens=0),
            device=config.device,
            threads=config.threads,
            quiet=config.quiet,
        )
    )
    if name in ("rejection_sft", "base"):
        return
    

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
        entry = {"name": name, "seconds": done.state[name]["seconds"], "eval_seconds": done.state[f"{name}_eval"]["seconds"]}
        skipped = {"name", "task", "split", "checkpoint", "sampling", "seconds"}
        stages.append(entry | {key: value for key, value in result.items() if key not in skipped})
    summary = {
        "seconds": round(done.seconds, 1),
        "peak_memory_bytes": done.state.get("peak_memory_bytes", peak_memory_bytes()),
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "stages": stages,
    }
    log.write_json(out / "summary.json", summary)
    run_report(ReportConfig(str(out)))


def _score_line(out: Path, name: str) -> str:
    result = json.loads((out / name / "evals" / "heldout.json").read_text(encoding="utf-8"))
    mean, low, high = result["pass@1"]
    return (
        f"{name}: pass@1 {mean:.1%} ({low:.1%} to {high:.1%}), greedy {result['greedy'][0]:.1%}, pass@8 "
        f"{result['pass@8'][0]:.1%}, thinks {result['think_tokens']:.0f} tokens, truncated {result['truncated']:.1%}"
        if result["pass@8"] is not None
        else f"{name}: pass@1 {mean:.1%} ({low:.1%} to {high:.1%})"
    )


def _farewell(config: DemoConfig, done: Stages) -> None:
    out = Path(config.out)
    print(f"\nDone in {done.seconds / 60:.1f} minutes. The report is {out / 'report.html'}. Next:\n")
    print(f"  kogia chat {out / 'grpo'} --single            # type: numbers 4 6 15 target 17")
    print(f"  kogia eval {out / 'grpo'} --tasks countdown    # measure it again, with your own settings")
    print(f"  kogia rl {Path(config.recipes or RECIPES) / 'grpo.toml'} --out runs/mine --tasks my_tasks:MyTask")
