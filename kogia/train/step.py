"""One optimiser step, shared by every stage: the supervised loop and GRPO differ only in their loss function."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.model.transformer import Transformer
from kogia.ops.linear import rounded_products
from kogia.train.config import OptimConfig
from kogia.train.optim import Optimizer
from kogia.train.schedule import STEADY, Ramp, learning_rate

Metrics = dict[str, Tensor | float]
"""Of a loss function: sums over the tokens that count. Of train_step: plain floats."""


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """What a loss function makes of a micro-batch. Nothing of it is read on the host before the step's end."""

    total: Float[Tensor, ""]
    """SUM of the loss over the micro-batch's tokens, with gradient."""
    metrics: Metrics
    """Sums over the tokens that count."""
    loads: Int[Tensor, "mixtures experts"] | None = None
    """Token copies that each expert got, by which the router biases move; None without mixtures."""
    num_copies: int | None = None
    """Token copies that the routers asked for; None is not told."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Metrics of which a step reports the largest, not the mean."""


@runtime_checkable
class CountedBatch(Protocol):
    """All that a step needs to know of a batch."""

    @property
    def num_loss_tokens(self) -> int: ...


B = TypeVar("B", bound=CountedBatch)
LossFn = Callable[[Transformer, B], Loss]


@runtime_checkable
class Judge(Protocol):
    def judge(self, loss: float, norm: float, trouble: str | None) -> str | None:
        """Why a step of this loss and gradient norm is bad; None if it is good. `trouble` is what is not finite."""
        ...


@dataclass
class TrainState:
    """What a step changes, and the settings it reads."""

    model: Transformer
    optimizer: Optimizer
    optim: OptimConfig
    num_steps: int
    """Length of the schedule."""
    bias_update_speed: float = 1e-3
    """Change of the router biases per step; 0 leaves them."""
    step: int = 0
    """Steps done."""
    last_checkpoint: Path | None = None
    """For error messages: where to go back to."""
    loads: NDArray[np.int64] | None = None
    """[mixtures, experts] token copies of the last step; None without mixtures."""
    ramp: Ramp = STEADY
    """Micro-batches of each step, as far as schedules go by them."""
    guard: Judge | None = None
    """What tells good steps from bad ones; None ends the run at a step that is not finite."""
    rounds_products: bool = False
    """Whether float32 products of its passes may be made of bfloat16."""

    def products(self) -> AbstractContextManager[None]:
        """Within it they are made as the state says."""
        return rounded_products() if self.rounds_products else nullcontext()

    @property
    def done(self) -> float:
        """The share of the run that is done."""
        return self.ramp.share(self.step, self.num_steps)


def train_step(
    state: TrainState, batches: Sequence[B], loss_fn: LossFn[B], *, denominator: float | None = None
) -> dict[str, float]:
    """One update from the micro-batches of a step; returns the loss function's metrics per token, and its own.

    The summed loss is divided by `denominator`, by default the tokens that count over all micro-batches, so that the
    split into micro-batches changes nothing. Own metrics: grad_norm before clipping, lr, tokens, and of the expert load
    of this step max_vio (arXiv 2408.15664, a mean over the mixtures), max_vio_worst (the largest), dead_experts (that
    got nothing), routing_entropy (of the load, 1 is balance) and dropped_tokens (copies that no expert got).
    Raises FloatingPointError on a loss or gradient that is not finite, before anything is updated. With a guard it
    raises none: what the guard finds bad updates nothing, counts as a step, and has the metric skipped = 1.
    """
    model = state.model
    num_tokens = sum(batch.num_loss_tokens for batch in batches)
    if num_tokens == 0:
        raise ValueError(f"step {state.step + 1}: none of its tokens counts in the loss; check the data's loss mask")
    divisor = denominator or num_tokens
    state.optimizer.zero_grad()
    results = []
    for batch in batches:
        with state.products():
            loss = loss_fn(model, batch)
            (loss.total / divisor).backward()
        results.append(replace(loss, total=loss.total.detach()))
    norm = state.optimizer.gradient_norm()
    loads = _total_loads(results)
    values = _read([loss.total for loss in results], norm, loads, _summed(results), _worst(results))
    losses, grad_norm, state.loads, sums, maxima = values
    lr = learning_rate(state.optim, state.step, state.num_steps, state.ramp)
    trouble = _trouble(state.optimizer, losses, grad_norm)
    if state.guard is not None:
        trouble = state.guard.judge(sum(losses) / divisor, grad_norm, trouble)
    elif trouble is not None:
        raise FloatingPointError(explain(state, state.step + 1, trouble))
    if trouble is None:
        _update(state, norm, lr, loads)
    state.step += 1
    means = {name: value / num_tokens for name, value in sums.items()}
    health = _health(state.loads, _copies(results))
    skipped = {} if trouble is None else {"skipped": 1.0}
    return {**means, **maxima, "grad_norm": grad_norm, "lr": lr, "tokens": num_tokens, **health, **skipped}


def _update(state: TrainState, norm: Tensor, lr: float, loads: Int[Tensor, "mixtures experts"] | None) -> None:
    """Clip, move the weights, move the router biases."""
    clip = state.optim.clip
    state.optimizer.step(lr, (clip / (norm + 1e-6)).clamp(max=1.0) if clip else None)
    if loads is not None:
        state.model.update_router_biases(loads, state.bias_update_speed)


def _total_loads(results: Sequence[Loss]) -> Int[Tensor, "mixtures experts"] | None:
    loads = [loss.loads for loss in results if loss.loads is not None]
    return torch.stack(loads).sum(0) if loads else None


def _summed(results: Sequence[Loss]) -> Metrics:
    sums: Metrics = {}
    for loss in results:
        for name, value in loss.metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _worst(results: Sequence[Loss]) -> Metrics:
    names = {name for loss in results for name in loss.maxima}
    return {name: torch.stack([loss.maxima[name] for loss in results if name in loss.maxima]).max() for name in names}


def _health(loads: NDArray[np.int64] | None, num_copies: int | None) -> dict[str, float]:
    """What the loads of a step say of its routing, over the mixtures that ran: an MTP module's may not."""
    loads = None if loads is None else loads[loads.sum(-1) > 0]
    if loads is None or len(loads) == 0:
        return {}
    violations, shares = loads.max(-1) / loads.mean(-1) - 1, loads / loads.sum(-1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1) / math.log(max(2, loads.shape[1]))
    dropped = {} if num_copies is None else {"dropped_tokens": float(num_copies - loads.sum())}
    return {
        "max_vio": float(violations.mean()),
        "max_vio_worst": float(violations.max()),
        "dead_experts": float((loads == 0).sum()),
        "routing_entropy": float(entropy.mean()),
        **dropped,
    }


def _copies(results: Sequence[Loss]) -> int | None:
    counted = [loss.num_copies for loss in results if loss.num_copies is not None]
    return sum(counted) if counted else None


def _read(
    losses: list[Tensor], norm: Tensor, loads: Int[Tensor, "mixtures experts"] | None, *metrics: Metrics
) -> tuple[list[float], float, NDArray[np.int64] | None, dict[str, float], dict[str, float]]:
    """Everything that a step tells, read from the device at once: the one time that a step waits for it."""
    tensors = [*losses, norm, *(v for part in metrics for v in part.values() if isinstance(v, Tensor))]
    flat = torch.stack([tensor.detach().double() for tensor in tensors])
    everything = (flat if loads is None else torch.cat((flat, loads.flatten().double()))).tolist()
    numbers: Iterator[float] = iter(everything)
    loss_values, norm_value = [next(numbers) for _ in losses], next(numbers)

    def read(part: Metrics) -> dict[str, float]:
        return {name: next(numbers) if isinstance(value, Tensor) else value for name, value in part.items()}

    sums, maxima = (read(part) for part in metrics)
    counted = None if loads is None else np.array(everything[len(flat) :], np.int64).reshape(loads.shape)
    return loss_values, norm_value, counted, sums, maxima


def _trouble(optimizer: Optimizer, losses: list[float], norm: float) -> str | None:
    """What of a step is not finite."""
    if all(map(math.isfinite, [*losses, norm])):
        return None
    bad = [f"the loss of micro-batch {i} is {value}" for i, value in enumerate(losses) if not math.isfinite(value)]
    if not bad:
        grads = ((name, weight.grad) for name, weight in optimizer.weights.items() if weight.grad is not None)
        first = next((name for name, grad in grads if not grad.isfinite().all()), "all parameters together")
        bad = [f"the gradient norm is {norm} (first in {first})"]
    return "; ".join(bad)


def explain(state: TrainState, step: int, trouble: str) -> str:
    """Why a run ends at a step (1-based), and what to do."""
    kept = f"the last good checkpoint is {state.last_checkpoint}" if state.last_checkpoint else "nothing is saved yet"
    return (
        f"step {step}: {trouble}. The weights were not updated; {kept}. "
        f"Lower optim.lr = {state.optim.lr} or optim.clip = {state.optim.clip}, lengthen optim.warmup_steps, or look "
        "at this step's data, then go on with --resume"
    )
