"""Opening a run directory: new, resumed or overwritten, the same for every training stage."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.resume import latest_checkpoint, prune
from kogia.config import load_toml, parse_toml, save_toml, to_dict
from kogia.files import check_directory, empty_directory, is_draft
from kogia.train.lock import sole_writer

RECIPE = "run.toml"
HARMLESS = ("out", "resume", "overwrite", "quiet", "threads", "sinks")
"""Settings that change nothing of what a run computes."""


@contextmanager
def hold_run_dir(config: Any) -> Iterator[None]:
    """Keep other runs out of `config.out`, which is made, while the block lasts. Raises as `open_run_dir`, or if one is
    at work there."""
    out = Path(config.out)
    _check_place(out, config)
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        yield


def check_run_dir(config: Any) -> Path | None:
    """The checkpoint that a run of `config` would go on from, if any; nothing is written.

    `config` is a stage's configuration with `out`, `init`, `resume` and `overwrite`. Raises ValueError, with the fix,
    when another run is at work there, or the directory holds something else, or a run and neither resume nor overwrite
    is set, or the model to begin with and overwrite is set. A run that never finished a step has nothing to lose and is
    started over.
    """
    out = Path(config.out)
    if out.is_dir():
        with sole_writer(out):
            pass
    return _checkpoint(config)


def open_run_dir(config: Any) -> Path | None:
    """Make `config.out` ready, with its run.toml; returns the checkpoint to resume from, if any. Of such a run the
    settings are to be recorded once it goes on.

    Raises ValueError as `check_run_dir` does, but for another run, which `hold_run_dir` keeps out.
    """
    out = Path(config.out)
    recipe = out / RECIPE
    checkpoint = _checkpoint(config)
    if recipe.exists() and config.resume:
        _warn_of_changes(recipe, config)
        prune(out, config.keep_checkpoints)  # a kill may have come while the last save did
    elif recipe.exists():
        empty_directory(out, last=RECIPE)
    if config.resume and checkpoint is None:
        log.info(f"{out} has no checkpoint to resume from: starting at the first step")
    if checkpoint is None:
        record_settings(config)
    return checkpoint


def record_settings(config: Any) -> None:
    """Write run.toml. Of a run that goes on, once nothing refuses its settings any more: it tells those of the run."""
    save_toml(replace(config, resume=False, overwrite=False), Path(config.out) / RECIPE)


def _checkpoint(config: Any) -> Path | None:
    """The checkpoint to resume from, if any, where `out` may be used so."""
    out = Path(config.out)
    _check_place(out, config)
    checkpoint = latest_checkpoint(out)
    if config.resume:
        if checkpoint is not None:
            _check_architecture(out / RECIPE, config)
        return checkpoint
    if config.overwrite and config.init and Path(config.init).resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"overwrite: would delete init = {config.init!r}, which lies in out = {config.out!r}; name another --out"
        )
    if (out / RECIPE).exists() and not config.overwrite and (checkpoint is not None or log.read_metrics(out)):
        found = f"a run up to {checkpoint.name}" if checkpoint else "a run without checkpoint"
        raise ValueError(
            f"out = {config.out!r}: already holds {found}; add --resume to continue it, --overwrite to delete it, or "
            "name another --out"
        )
    return None


def was_measured(out: Path, step: int, prefix: str) -> bool:
    """Whether metrics.jsonl has the evaluation of a step, whose metrics begin with `prefix`.

    A run that was ended between a checkpoint and its evaluation still owes it.
    """
    return any(
        line.get("step") == step and any(name.startswith(prefix) for name in line) for line in log.read_metrics(out)
    )


def _check_place(out: Path, config: Any) -> None:
    if not out.exists():
        if config.resume:
            raise ValueError(
                f"out = {config.out!r}: there is no run to resume; correct --out, or leave --resume out to start one"
            )
        return check_directory(out)
    if not out.is_dir():
        raise ValueError(f"out = {config.out!r}: is a file; name a directory")
    check_directory(out)
    # a start that was killed leaves at most a draft
    if not (out / RECIPE).exists() and any(not is_draft(path, RECIPE) for path in out.iterdir()):
        raise ValueError(f"out = {config.out!r}: holds other files and no {RECIPE}; name a new directory")


def _check_architecture(recipe: Path, now: Any) -> None:
    """Raise ValueError where a run would go on with another model than it has."""
    changed = [] if _is_damaged(recipe) else changes(load_toml(recipe, type(now)), now, HARMLESS)
    if model := [words for words in changed if words.startswith("model.")]:
        raise ValueError(
            f"{', '.join(model)}: the model of a run cannot change; leave it as it was, or begin another run, with "
            "--init where it may start from this one's weights"
        )


def _warn_of_changes(recipe: Path, now: Any) -> None:
    """A resume is exact only under the same settings; say which ones differ, and how."""
    if _is_damaged(recipe):
        return log.warn(f"{recipe} is empty or damaged: whether the run began with these settings cannot be told")
    if changed := changes(load_toml(recipe, type(now)), now, HARMLESS):
        log.warn(f"resuming with other settings than the run began with: {', '.join(changed)}: no exact continuation")


def changes(old: Any, new: Any, harmless: Collection[str]) -> list[str]:
    """The settings that differ between two configurations of a kind, in words, but for those that are harmless."""
    before, now = (dict(_entries(to_dict(config))) for config in (old, new))
    return [
        f"{key} = {now.get(key, 'none')!r} (was {before.get(key, 'none')!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in harmless
    ]


def _is_damaged(recipe: Path) -> bool:
    """Whether the file says nothing: a power cut may leave a name without its content."""
    try:
        return not parse_toml(recipe.read_text(encoding="utf-8"))
    except ValueError:
        return True


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in nested tables and lists of tables."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entries(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _entries(inner, f"{name}[{index}]")
    else:
        yield name, value
