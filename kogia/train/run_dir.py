"""Opening a run directory: new, resumed or overwritten, the same for every training stage."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.resume import latest_checkpoint
from kogia.config import load_toml, save_toml, to_dict

RECIPE = "run.toml"


def open_run_dir(config: Any) -> Path | None:
    """Make `config.out` ready and write its run.toml; returns the checkpoint to resume from, if any.

    `config` is a stage's configuration with `out`, `resume` and `overwrite`. Raises ValueError, with the fix, when the
    directory holds something else, or a run and neither resume nor overwrite is set. A run that never finished a step
    has nothing to lose and is started over.
    """
    out = Path(config.out)
    recipe = out / RECIPE
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {config.out!r}: is a file; name a directory")
    if out.exists() and any(out.iterdir()) and not recipe.exists():
        raise ValueError(f"out = {config.out!r}: holds other files and no {RECIPE}; name a new directory")
    checkpoint = latest_checkpoint(out)
    started = checkpoint is not None or bool(log.read_metrics(out))
    if recipe.exists() and (config.overwrite or not (started or config.resume)):
        shutil.rmtree(out)
        checkpoint = None
    elif recipe.exists() and not config.resume:
        found = f"a run up to {checkpoint.name}" if checkpoint else "a run without checkpoint"
        raise ValueError(
            f"out = {config.out!r}: already holds {found}; add --resume to continue it, --overwrite to delete it, or "
            "name another --out"
        )
    elif recipe.exists():
        _warn_of_changes(load_toml(recipe, type(config)), config)
    save_toml(replace(config, resume=False, overwrite=False), recipe)
    return checkpoint


def _warn_of_changes(before: Any, now: Any) -> None:
    """A resume is exact only under the same settings; say which ones differ."""
    old, new = to_dict(before), to_dict(now)
    harmless = {"resume", "overwrite", "quiet", "threads"}
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key not in harmless)
    if changed:
        log.warn(
            f"resuming with other settings than the run began with ({', '.join(changed)}): not an exact continuation"
        )
