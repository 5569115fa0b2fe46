"""What would end a demonstration after minutes of work, found before it begins; `--dry-run` finds the same."""

from collections.abc import Container, Sequence
from pathlib import Path

import torch

from kogia.checkpoint.open import pick_device
from kogia.data.sources import has_document
from kogia.demo.config import DemoConfig
from kogia.demo.recipes import (
    DRAFTING_STAGE,
    SUPERVISED,
    curate_recipe,
    drafting_config,
    eval_config,
    rl_recipe,
    supervised_recipe,
)
from kogia.engine.limits import check_engine
from kogia.eval.config import TaskOptions
from kogia.eval.sample import choose_problems
from kogia.model.config import ModelConfig
from kogia.tasks.task import load_task
from kogia.text.tokenizer import check_vocab_size
from kogia.train.checks import check_sizes


def check_demo(config: DemoConfig, done: Container[str]) -> None:
    """Raise ValueError for a setting or a recipe that a stage which is not `done` would fail at; writes nothing."""
    pick_device(config.device)
    base = supervised_recipe(config, "base").model
    if base is None:
        raise ValueError("the recipe pretrain.toml has no [model] table: the demonstration begins with a new model")
    for stage in SUPERVISED:
        if stage not in done:
            _check_supervised(config, stage, base)
    if "grpo" not in done:
        rl = rl_recipe(config)
        _check_problems(rl.tasks, rl.task_options, "train", 1)
        check_engine(base, rl.engine, torch.float32)
    if "curated" not in done:
        curate = curate_recipe(config)
        _check_problems(curate.tasks, curate.task_options, curate.split, curate.num_problems)
        check_engine(base, curate.engine, torch.float32)
    if "report" not in done:
        _check_measurements(config, base, done)


def _check_supervised(config: DemoConfig, stage: str, base: ModelConfig) -> None:
    recipe = supervised_recipe(config, stage)
    recipe.check_complete()
    model = recipe.model or base
    check_sizes(recipe, model)
    if recipe.tokenizer is None and recipe.init is None:
        check_vocab_size(model.vocab_size)
    for source in recipe.data.sources:
        if source.spec != curate_recipe(config).out:
            has_document(source)


def _check_measurements(config: DemoConfig, base: ModelConfig, done: Container[str]) -> None:
    measured = eval_config(config, Path(config.out) / "base")
    _check_problems(measured.tasks, measured.task_options, measured.split, measured.num_questions)
    student = supervised_recipe(config, "student").model or base
    for model in (base, student):
        check_engine(model, measured.engine, torch.float32)
    if DRAFTING_STAGE not in done:
        check_engine(base, drafting_config(config).engine, torch.float32)


def _check_problems(tasks: Sequence[str], options: TaskOptions, split: str, num: int) -> None:
    for spec in tasks:
        choose_problems(load_task(spec, options.get(spec)), split, num, 0)
