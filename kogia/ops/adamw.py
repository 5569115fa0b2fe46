"""AdamW (Loshchilov & Hutter 2019), and gradients added up before it.

    m <- m + (1 - b1) (g - m),   v <- b2 v + (1 - b2) g^2
    w <- (1 - lr decay) w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Weights are float32. A weight may have a copy of 16 bits that models multiply with, moments may be kept in bfloat16, and
gradients may be of 16 bits: all are widened for the moment of the update alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from kogia.ops.dispatch import op

WIDENED_AT_ONCE = 2**26
"""Numbers of moments that the reference holds in float32 at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """One weight and what its update reads and writes; all of one shape, but `step`."""

    weight: Float[Tensor, "..."]
    grad: Float[Tensor, "..."]
    first: Float[Tensor, "..."]
    """Mean of the gradients."""
    second: Float[Tensor, "..."]
    """Mean of their squares."""
    step: Float[Tensor, ""]
    """Updates until now, on the device."""
    copy: Float[Tensor, "..."] | None = None
    """Gets the new weight."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainedGroup:
    """Weights that are updated alike, at least one."""

    members: Sequence[Trained]

    @property
    def device(self) -> torch.device:
        return self.members[0].weight.device


@op(cuda=("kogia.ops.triton.adamw",))
def adamw(
    group: TrainedGroup,
    scale: Float[Tensor, ""] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update of all of them, in place, of gradients times `scale`, which stays on the device. The gradients mean
    nothing after it."""
    for part in _in_parts(group.members):
        _update(part, scale, lr, betas, eps, weight_decay)


def _update(
    part: list[Trained],
    scale: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    grads, first, second = ([getattr(each, name).float() for each in part] for name in ("grad", "first", "second"))
    if scale is not None:
        torch._foreach_mul_(grads, scale)
    fused_adamw(
        [each.weight for each in part], grads, first, second, [], [each.step for each in part],
        fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
        maximize=False,
    )  # fmt: skip
    for each, m, v in zip(part, first, second, strict=True):
        if m is not each.first:
            each.first.copy_(m)
        if v is not each.second:
            each.second.copy_(v)
        if each.copy is not None:
            each.copy.copy_(each.weight)


def _in_parts(members: Sequence[Trained]) -> Iterator[list[Trained]]:
    """Runs of weights of no more than `WIDENED_AT_ONCE` numbers, or of one that is larger."""
    part: list[Trained] = []
    for each in members:
        if part and sum(one.weight.numel() for one in part) + each.weight.numel() > WIDENED_AT_ONCE:
            yield part
            part = []
        part.append(each)
    if part:
        yield part


@op(cuda=("kogia.ops.triton.adamw",))
def added_up(total: Float[Tensor, "..."], more: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """total + more in float32; where that is the dtype of `total`, in its place."""
    return total.float().add_(more)
