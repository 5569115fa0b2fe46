"""Steps that go wrong: what a bad one is, and its batch on disk for looking at it.

A step is bad whose loss or gradient norm is not finite, or, where `sigmas` says so, far above those of the good steps
before it. Nothing is updated by it. What follows is the loop's part (kogia.train.supervised): up to `skips` in a row
are left out; after one more the run goes back to its last good checkpoint and on with the data behind the bad ones.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kogia import log
from kogia.checkpoint.resume import ResumeState
from kogia.data.loader import Batch
from kogia.files import replacing_directory, write_json
from kogia.model.packed import PackedTokens, pack_arrays
from kogia.train.config import GuardConfig
from kogia.train.step import TrainState, explain

BAD_STEPS = "bad_steps"
"""Where in a run directory they are kept."""
REPORT = "report.json"


class Guard:
    """Judges steps by those before them. What it knows goes through checkpoints, so that a resumed run judges alike."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.recent = {name: deque[float](maxlen=config.window) for name in ("loss", "gradient norm")}
        """Of the good steps."""
        self.reason: str | None = None
        """Why the last step was bad; None if it was not."""
        self.streak = 0
        """Bad steps in a row until now."""
        self.rollbacks = 0

    @property
    def has_had_enough(self) -> bool:
        return self.streak > self.config.skips

    def judge(self, loss: float, norm: float, trouble: str | None) -> str | None:
        """Why the step with these is bad, which `trouble` says of one that is not finite; None if it is good."""
        seen = {"loss": loss, "gradient norm": norm}
        self.reason = trouble or next(filter(None, map(self._spike, seen.items())), None)
        self.streak = self.streak + 1 if self.reason else 0
        if self.reason is None:
            for name, value in seen.items():
                self.recent[name].append(value)
        return self.reason

    def _spike(self, seen: tuple[str, float]) -> str | None:
        name, value = seen
        before = self.recent[name]
        if not self.config.sigmas or len(before) < max(2, self.config.window // 2):
            return None
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / (len(before) - 1))
        if value <= mean + self.config.sigmas * deviation:
            return None
        return (
            f"the {name} of {value:.4g} is {(value - mean) / max(deviation, 1e-30):.1f} deviations above the mean of "
            f"{mean:.4g} of the {len(before)} good steps before (guard.sigmas = {self.config.sigmas:g})"
        )

    def values(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "recent": {name: list(before) for name, before in self.recent.items()},
            "streak": self.streak,
            "rollbacks": self.rollbacks,
        }

    def restore(self, resume: ResumeState) -> None:
        """Put back what `values` gave; nothing where a checkpoint has none. Raises ValueError for a damaged one."""
        if "guard" not in resume.values:
            return
        for name, before in self.recent.items():
            before.clear()
            before.extend(resume.numbers("guard", "recent", name))
        self.streak, self.rollbacks = resume.count("guard", "streak"), resume.count("guard", "rollbacks")


@runtime_checkable
class KeptBatch(Protocol):
    """What is kept of a micro-batch."""

    @property
    def tokens(self) -> PackedTokens: ...

    @property
    def loss_mask(self) -> Bool[Tensor, " tokens"]: ...


def heed(
    guard: Guard, state: TrainState, out: Path, batches: Sequence[KeptBatch], metrics: Mapping[str, float], **where: Any
) -> None:
    """Keep the batch of the bad step that was just done, and `where` its data stood; raises FloatingPointError where it
    is one too many."""
    place = out / BAD_STEPS / f"step-{state.step:06d}-{guard.rollbacks}"
    figures = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    try:
        write_bad_step(place, batches, {"step": state.step, "reason": guard.reason, **where, "metrics": figures})
        kept = f"its batch is in {place}"
    except (OSError, SafetensorError) as error:
        kept = f"its batch could not be kept: {error}"
    if guard.has_had_enough:
        raise FloatingPointError(explain(state, state.step, f"{guard.reason}; {kept}"))
    log.warn(f"step {state.step} is left out: {guard.reason}; {kept}")


def write_bad_step(directory: Path, batches: Sequence[KeptBatch], report: dict[str, Any]) -> None:
    """Keep the micro-batches of a step, and `report`, in a directory of its own."""
    directory.parent.mkdir(exist_ok=True)
    with replacing_directory(directory) as draft:
        for number, batch in enumerate(batches):
            segments = batch.tokens.segments
            tensors = {"lengths": torch.from_numpy(segments.lengths.astype("int64"))}
            tensors |= {"token_ids": batch.tokens.token_ids.cpu(), "loss_mask": batch.loss_mask.cpu()}
            save_file(tensors, draft / f"micro-batch-{number:03d}.safetensors")
        write_json(draft / REPORT, report)


def read_bad_step(directory: str | Path) -> list[Batch]:
    """The micro-batches that `write_bad_step` kept, to run a model on."""
    batches = []
    for file in sorted(Path(directory).glob("micro-batch-*.safetensors")):
        tensors = load_file(file)
        lengths = np.asarray(tensors["lengths"].numpy())
        mask = tensors["loss_mask"]
        batches.append(Batch(pack_arrays(tensors["token_ids"].numpy(), lengths), mask, int(mask.sum())))
    return batches
