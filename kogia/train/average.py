"""Averaged weights, kept beside those that are trained.

    w' <- w' + r (w - w'),   r = max(1 - decay, 1 / n)   after the n-th step that counts

The mean of the first 1 / (1 - decay) steps, then an exponential moving average; of the random weights that a run began
with nothing is left in it. With decay = 1 it stays the mean of all steps that count.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kogia.checkpoint.hf import load_model
from kogia.model.transformer import Transformer


class Average:
    """A model in float32 with averaged weights and router biases."""

    def __init__(self, model: Transformer, decay: float) -> None:
        self.model = copy.deepcopy(model).float().requires_grad_(False)
        self.decay = decay
        self.count = 0
        """Steps in it; none yet makes it no model to use."""

    @torch.no_grad()
    def update(self, model: Transformer, weights: Sequence[Tensor]) -> None:
        """Take in what a step has made of the model, of whose parameters `weights` are the float32 masters, if any."""
        self.count += 1
        rate = max(1.0 - self.decay, 1.0 / self.count)
        new = [weight.float() for weight in weights]
        torch._foreach_lerp_([*self.model.parameters(), *biases(self.model)], [*new, *biases(model)], rate)

    def restore(self, saved: Path, count: int) -> None:
        """Go on from the model directory `saved`, which is there unless `count` is 0."""
        if count:
            self.model.load_state_dict(load_model(saved, device=self.model.device, dtype=torch.float32).state_dict())
        self.count = count


def biases(model: Transformer) -> list[Tensor]:
    """Those of the routers that have one."""
    found = (router.e_score_correction_bias for router in model.routers())
    return [bias for bias in found if bias is not None]
