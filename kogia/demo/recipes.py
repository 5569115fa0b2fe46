"""The settings of every stage of a demonstration: its recipe, under the demonstration's directory, seed and scale."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from kogia.config import from_dict, parse_toml
from kogia.data.config import SourceConfig
from kogia.demo.config import RECIPES, DemoConfig
from kogia.eval.config import EvalConfig
from kogia.rl.config import CurateConfig, RLConfig
from kogia.train.config import SupervisedConfig

T = TypeVar("T")
RUNS_PREFIX = "runs/demo"
"""What the recipes call the demonstration's directory; replaced by `out`."""
SUPERVISED = {"base": "pretrain", "cold_start": "cold_start", "rejection_sft": "rejection_sft", "student": "student"}
"""Recipe by stage, of the stages that are supervised."""
DRAFTING_STAGE = "rejection_sft"
"""The stage whose recipe trains the multi-token-prediction module."""
SIGNAL_SCALE = 1.0
"""Below it a cold start may leave nothing for the signal check to find, and GRPO goes on without."""


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


def supervised_recipe(config: DemoConfig, stage: str) -> SupervisedConfig:
    """The settings of a supervised stage. Where rejection sampling kept nothing, the cold start's traces stand in."""
    found = recipe(config, SUPERVISED[stage], SupervisedConfig)
    if not has_kept_nothing(config):
        return found
    sources = tuple(part for source in found.data.sources for part in _stand_in(config, source))
    return replace(found, data=replace(found.data, sources=sources))


def rl_recipe(config: DemoConfig) -> RLConfig:
    found = recipe(config, "grpo", RLConfig)
    return replace(found, signal_check=found.signal_check and config.scale >= SIGNAL_SCALE)


def curate_recipe(config: DemoConfig) -> CurateConfig:
    return recipe(config, "curate", CurateConfig)


def has_kept_nothing(config: DemoConfig) -> bool:
    """Whether rejection sampling is done and its file is empty."""
    kept = Path(curate_recipe(config).out)
    return kept.exists() and not kept.read_text(encoding="utf-8").strip()


def _stand_in(config: DemoConfig, source: SourceConfig) -> tuple[SourceConfig, ...]:
    if source.spec != curate_recipe(config).out:
        return (source,)
    traces = recipe(config, SUPERVISED["cold_start"], SupervisedConfig).data.sources
    return tuple(replace(each, weight=source.weight) for each in traces)


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
        engines=rl.engines,
        device=config.device,
        threads=config.threads,
        quiet=config.quiet,
    )


def drafting_config(config: DemoConfig) -> EvalConfig:
    """Greedy answers to some of the same questions, with one draft per step; files go to evals/drafting.*."""
    held_out = eval_config(config, Path(config.out) / DRAFTING_STAGE)
    return replace(
        held_out,
        num_questions=min(100, config.num_questions),
        num_samples=0,
        name="drafting",
        engine=replace(held_out.engine, num_draft_tokens=1),
    )
