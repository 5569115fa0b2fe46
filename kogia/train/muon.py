"""Muon: momentum whose matrices are made orthogonal before they move the weights (Jordan 2024; arXiv 2502.16982).

    M <- M + (1 - mu) (G - M),   U = G + mu (M - G),   W <- (1 - lr wd) W - lr 0.2 sqrt(max(out, in)) O(U)

O(U) is near U's polar factor: about equal singular values, the same directions. The factor of Moonlight makes updates
as large as AdamW's, so that both take the same learning rates. Axes in front of [out, in], as experts have, are
matrices beside each other, and go through the iteration as one batch.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic a x + b x^3 + c x^5: five times over it brings singular values from 0.01 to 1 near 1, to within about
a third."""
ITERATIONS = 5
UPDATE_SIZE = 0.2
"""Root mean square of the updates, as AdamW's usually is."""


def orthogonalised(x: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
    """Each matrix with its singular values brought near 1, by Newton-Schulz iteration. A matrix of zeros stays.

    Computed in bfloat16 on a GPU, which is enough, and in float32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    y = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    is_tall = y.shape[-2] > y.shape[-1]
    if is_tall:
        y = y.mT
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if is_tall else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Over matrices alone; `moments` is the type that the momentum is kept in."""

    keys = ("momentum",)
    """What is kept of a parameter."""

    def __init__(
        self,
        params: Iterable[Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, scale: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update, of gradients times `scale`, which may stay on the device."""
        assert closure is None, "a training step has the gradients already"
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                grad = weight.grad.float() if scale is None else weight.grad.float().mul_(scale)
                self._move(weight, grad, group["lr"], group["momentum"], group["weight_decay"])

    def _move(self, weight: Parameter, grad: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight, dtype=self.moments)
        mean = state["momentum"].float().lerp(grad, 1 - momentum)
        state["momentum"].copy_(mean)
        update = orthogonalised(grad.lerp(mean, momentum))
        weight.mul_(1 - lr * weight_decay)
        weight.add_(update, alpha=-lr * UPDATE_SIZE * max(weight.shape[-2:]) ** 0.5)
