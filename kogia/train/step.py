"""One optimiser step, shared by every stage: the supervised loop and GRPO differ only in their loss function."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kogia.model.transformer import Transformer
from kogia.train.config import OptimConfig
from kogia.train.optim import set_learning_rate
from kogia.train.schedule import learning_rate

Metrics = dict[str, Tensor | float]
"""Of a loss function: sums over the tokens that count. Of train_step: plain floats."""


@runtime_checkable
class CountedBatch(Protocol):
    """All that a step needs to know of a batch."""

    @property
    def num_loss_tokens(self) -> int: ...


B = TypeVar("B", bound=CountedBatch)
LossFn = Callable[[Transformer, B], tuple[Float[Tensor, ""], Metrics]]
"""SUM of the loss over a micro-batch's tokens, and metrics summed likewise."""


@dataclass
class TrainState:
    """What a step changes, and the settings it reads."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    optim: OptimConfig
    num_steps: int
    """Length of the schedule."""
    bias_update_speed: float = 1e-3
    """Change of the router biases per step; 0 leaves them."""
    step: int = 0
    """Steps done."""
    last_checkpoint: Path | None = None
    """For error messages: where to go back to."""


def train_step(
    state: TrainState, batches: Sequence[B], loss_fn: LossFn[B], *, denominator: float | None = None
) -> dict[str, float]:
    """One update from the micro-batches of a step; returns the loss function's metrics per token, and its own.

    The summed loss is divided by `denominator`, by default the tokens that count over all micro-batches, so that the
    split into micro-batches changes nothing. Own metrics: grad_norm before clipping, lr, tokens, max_vio (MaxVio of
    this step's expert load, mean over the mixture layers; arXiv 2408.15664) and max_vio_worst (the largest).
    Raises FloatingPointError on a loss or gradient that is not finite, before anything is updated.
    """
    model = state.model
    num_tokens = sum(batch.num_loss_tokens for batch in batches)
    if num_tokens == 0:
        raise ValueError(f"step {state.step + 1}: none of its tokens counts in the loss; check the data's loss mask")
    for router in model.routers():
        router.load.zero_()
    state.optimizer.zero_grad(set_to_none=True)
    losses, sums = [], {}
    for batch in batches:
        loss, metrics = loss_fn(model, batch)
        (loss / (denominator or num_tokens)).backward()
        losses.append(loss.detach())
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    grad_norm = _clip(state, losses)
    lr = learning_rate(state.optim, state.step, state.num_steps)
    set_learning_rate(state.optimizer, lr)
    state.optimizer.step()
    balance = _update_router_biases(state)
    state.step += 1
    means = {name: float(value) / num_tokens for name, value in sums.items()}
    return {**means, "grad_norm": grad_norm, "lr": lr, "tokens": num_tokens, **balance}


def _clip(state: TrainState, losses: list[Tensor]) -> float:
    """Scale the gradients down to the norm limit; returns the norm before. The step's one finite check."""
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    *loss_values, norm_value = torch.stack([*losses, norm]).tolist()
    if not all(map(math.isfinite, [*loss_values, norm_value])):
        raise FloatingPointError(_not_finite(state, loss_values, norm_value))
    if state.optim.clip:
        clip_grads_with_norm_(parameters, state.optim.clip, norm)
    return norm_value


def _not_finite(state: TrainState, losses: list[float], norm: float) -> str:
    bad = [f"the loss of micro-batch {i} is {value}" for i, value in enumerate(losses) if not math.isfinite(value)]
    if not bad:
        grads = ((name, p.grad) for name, p in state.model.named_parameters() if p.grad is not None)
        first = next((name for name, grad in grads if not grad.isfinite().all()), "all parameters together")
        bad = [f"the gradient norm is {norm} (first in {first})"]
    kept = f"the last good checkpoint is {state.last_checkpoint}" if state.last_checkpoint else "nothing is saved yet"
    return (
        f"step {state.step + 1}: {'; '.join(bad)}. The weights were not updated; {kept}. "
        f"Lower optim.lr = {state.optim.lr} or optim.clip = {state.optim.clip}, lengthen optim.warmup_steps, or look "
        "at this step's data, then go on with --resume"
    )


def _update_router_biases(state: TrainState) -> dict[str, float]:
    routers = state.model.routers()
    violations = [router.max_violation() for router in routers if router.load.any()]
    for router in routers:
        router.update_bias(state.bias_update_speed)
    if not violations:
        return {}
    return {"max_vio": sum(violations) / len(violations), "max_vio_worst": max(violations)}
