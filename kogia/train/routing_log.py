"""The load of every expert over a run, on disk: what the report draws."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kogia.checkpoint.resume import ResumeState
from kogia.log import ROUTING_FILE

LINES = 100
"""Of a whole run, about."""
SUM = "routing/loads"  # among the tensors of a checkpoint


class RoutingLog:
    """Lines {"step", "steps", "loads"}: token copies per mixture and expert, added up over the last `steps` steps."""

    def __init__(self, run_dir: Path, num_steps: int) -> None:
        self.path = run_dir / ROUTING_FILE
        self.num_steps, self.every = num_steps, -(-num_steps // LINES)
        self.loads: NDArray[np.int64] | None = None
        """[mixtures, experts] since the last line."""
        self.steps = 0

    def add(self, step: int, loads: NDArray[np.int64] | None) -> None:
        """Count what a step did, and write a line where one is due."""
        if loads is None:
            return
        if self.loads is None or self.loads.shape != loads.shape:
            self.loads, self.steps = np.zeros_like(loads), 0
        self.loads = self.loads + loads
        self.steps += 1
        if step % self.every == 0 or step == self.num_steps:
            line = {"step": step, "steps": self.steps, "loads": self.loads.tolist()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self.loads, self.steps = None, 0

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: what no line has yet, and of how many steps it is."""
        if self.loads is None:
            return {}
        steps = np.full_like(self.loads[:, :1], self.steps)
        return {SUM: torch.from_numpy(np.concatenate((steps, self.loads), 1))}

    def restore(self, resume: ResumeState) -> None:
        """Put back what `tensors` gave. Raises ValueError for a damaged one."""
        saved = resume.tensors.get(SUM)
        if saved is not None and (saved.ndim != 2 or saved.is_floating_point() or 0 in saved.shape):
            raise ValueError(
                f"the checkpoint's train_state/tensors.safetensors: {SUM} is no table of counts; the file is damaged, "
                "delete the checkpoint to resume from the one before it"
            )
        self.loads, self.steps = (None, 0) if saved is None else (saved[:, 1:].numpy().copy(), int(saved[0, 0]))
