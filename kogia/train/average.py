"""Averaged weights, kept beside those that are trained.

    w' <- w' + r (w - w'),   r = max(1 - decay, 1 / n)   after the n-th step that counts

The mean of the first 1 / (1 - decay) steps, then an exponential moving average; of the random weights that a run began
with nothing is left in it. With decay = 1 it stays the mean of all steps that count.
"""

import copy
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
    def update(self, model: Transformer) -> None:
        """Take in what a step has made of the weights."""
        self.count += 1
        rate = max(1.0 - self.decay, 1.0 / self.count)
        new = [tensor.float() for tensor in averaged(model)]
        torch._foreach_lerp_(averaged(self.model), new, rate)

    def restore(self, saved: Path, count: int) -> None:
        """Go on from the model directory `saved`, which is there unless `count` is 0."""
        if count:
            self.model.load_state_dict(load_model(saved, device=self.model.device, dtype=torch.float32).state_dict())
        self.count = count


def averaged(model: Transformer) -> list[Tensor]:
    """The parameters, each once, and the router biases."""
    biases = (router.e_score_correction_bias for router in model.routers())
    return [*(p.data for p in model.parameters()), *(bias for bias in biases if bias is not None)]
