"""Checkpoints of a running training: a model directory any tool can load, and `train_state/` to go on from exactly.

    RUN/checkpoints/step-000123/    config.json, model.safetensors, tokenizer files
        average/                      the same of averaged weights, where there are any
        train_state/state.json        counters, loader position, Python and NumPy random states
        train_state/tensors.safetensors   optimiser moments by parameter name, PyTorch random states

A name `step-*` is a complete checkpoint at any time. Older checkpoints are deleted only after the new one stands.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kogia.checkpoint.hf import write_model_files
from kogia.files import remove_stale_drafts, replacing_directory
from kogia.model.transformer import Transformer
from kogia.text.tokenizer import Tokenizer

AVERAGE = "average"
RANDOM = "random/"  # prefix of the random states among the tensors


@dataclass(frozen=True)
class ResumeState:
    """What a loop needs beside the weights to continue exactly; the random states are added when it is saved."""

    values: dict[str, Any] = field(default_factory=dict)
    """JSON values."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def count(self, *keys: str) -> int:
        """A number of `values`, found by one key after the other. Raises ValueError if it is no whole one."""
        value = self._value(*keys)
        if type(value) is not int or not 0 <= value < 2**63:
            raise _wrong_value(keys, value, "a whole number")
        return value

    def numbers(self, *keys: str) -> list[float]:
        """Numbers of `values`, found in the same way. Raises ValueError if they are none, or not finite."""
        value = self._value(*keys)
        if not isinstance(value, list) or not all(type(x) in (int, float) and abs(x) < 1e300 for x in value):
            raise _wrong_value(keys, value, "a list of numbers")
        return [float(x) for x in value]

    def _value(self, *keys: str) -> Any:
        value: Any = self.values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def _wrong_value(keys: tuple[str, ...], value: Any, expected: str) -> ValueError:
    return ValueError(
        f"the checkpoint's train_state/state.json: {'.'.join(keys)} = {value!r:.60}: must be {expected}; the file is "
        "damaged, delete the checkpoint to resume from the one before it"
    )


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model: Transformer,
    tokenizer: Tokenizer,
    state: ResumeState,
    *,
    keep: int = 2,
    average: Transformer | None = None,
) -> Path:
    """Write RUN/checkpoints/step-NNNNNN and return it; then delete all but the newest `keep`.

    The `average` of the weights is another model directory in it.

    Raises OSError with the place and the fix when it cannot be written (disk full, no run directory any more), and
    FloatingPointError when a weight or an optimiser moment is not finite; what was there is then untouched.
    """
    parent = Path(run_dir) / "checkpoints"
    final = parent / f"step-{step:06d}"
    _check_finite(final, model.state_dict() | state.tensors)
    if not Path(run_dir).is_dir():
        raise FileNotFoundError(
            f"cannot save {final}: {run_dir} is gone, deleted or moved while the run was at work; leave it in its place"
        )
    try:
        parent.mkdir(exist_ok=True)
        remove_stale_drafts(parent)  # of any step, to have their space
        with replacing_directory(final) as draft:
            write_model_files(model, draft, tokenizer)
            if average is not None:
                (draft / AVERAGE).mkdir()
                write_model_files(average, draft / AVERAGE, tokenizer)
            _save_train_state(draft / "train_state", step, state)
    except (OSError, SafetensorError) as error:
        raise OSError(getattr(error, "errno", None) or 0, _cannot_save(final, error)) from error
    prune(run_dir, keep)
    return final


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, also what a kill left of one that was being written or deleted."""
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    if (parent := Path(run_dir) / "checkpoints").is_dir():
        remove_stale_drafts(parent)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in (Path(run_dir) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def load_train_state(checkpoint: str | Path) -> ResumeState:
    """What `save_checkpoint` stored beside the model. Raises ValueError if it is missing or damaged."""
    directory = Path(checkpoint) / "train_state"
    try:
        values = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        state = ResumeState(values, load_file(directory / "tensors.safetensors"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{checkpoint}: no {error.filename}; it is a model without training state: use it as `init`, not to resume"
        ) from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from None
    try:
        _set_random(state, random.Random(), np.random.RandomState(), torch.Generator())
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
        raise _damaged(checkpoint, f"its random states: {error}") from None
    return state


def _damaged(checkpoint: str | Path, reason: object) -> ValueError:
    return ValueError(
        f"{Path(checkpoint) / 'train_state'}: damaged or truncated ({reason}); delete {checkpoint} to resume from the "
        "checkpoint before it"
    )


def seed_random(seed: int) -> None:
    """Start the random states of Python, NumPy and PyTorch from a seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def restore_random(state: ResumeState) -> None:
    """Set the random states of Python, NumPy and PyTorch to those of the checkpoint."""
    _set_random(state, random, np.random, torch.default_generator)
    for index in range(torch.cuda.device_count()):
        if (saved := state.tensors.get(f"{RANDOM}cuda{index}")) is not None:
            torch.cuda.set_rng_state(saved, index)


def _set_random(state: ResumeState, python: Any, numpy: Any, generator: torch.Generator) -> None:
    version, internal, gauss = state.values["random"]["python"]
    python.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state.values["random"]["numpy"]
    numpy.set_state((kind, np.array(keys, "uint32"), position, has_gauss, cached))
    generator.set_state(state.tensors[RANDOM + "torch"])


def _save_train_state(directory: Path, step: int, state: ResumeState) -> None:
    directory.mkdir()
    kind, keys, *rest = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    values = {
        **state.values,
        "step": step,
        "random": {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    tensors[RANDOM + "torch"] = torch.get_rng_state()
    for index in range(torch.cuda.device_count()):
        tensors[f"{RANDOM}cuda{index}"] = torch.cuda.get_rng_state(index)
    (directory / "state.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    save_file(tensors, directory / "tensors.safetensors")


def _check_finite(final: Path, tensors: Mapping[str, Tensor]) -> None:
    """What is saved must be good to go on from: the checkpoints before it will be deleted."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all().cpu() for tensor in floats.values()])
    if finite.all():
        return
    first = list(floats)[int(finite.int().argmin())]
    older = latest_checkpoint(final.parent.parent)
    kept = f"the last good checkpoint is {older}" if older else "nothing is saved yet"
    raise FloatingPointError(
        f"{final.name}: {first} is not finite, so this step is not saved; {kept}. Lower optim.lr, optim.weight_decay "
        "or optim.clip, lengthen optim.warmup_steps, or look at the data, then go on with --resume"
    )


def _cannot_save(final: Path, error: Exception) -> str:
    older = latest_checkpoint(final.parent.parent)
    kept = f"{older} is intact: continue from it with --resume" if older else "there is no older checkpoint"
    free = shutil.disk_usage(final.parent).free / 2**20 if final.parent.exists() else 0.0
    return f"cannot save {final}: {error} ({free:.0f} MiB free there). Free some space; {kept}"
