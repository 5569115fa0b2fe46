"""Log-probabilities of given tokens, and their summed loss, without ever holding [tokens, vocab].

The output head is applied to a chunk of rows at a time, so memory is one chunk of logits. With l = h W^T / temperature:
    log p(t) = l_t - logsumexp(l),     d log p(t) / dl = onehot(t) - softmax(l)
What becomes of the log-probabilities is not known in general: the backward pass then makes the logits again. Where it
is their sum, the gradient is made with them in the forward pass, and the backward pass only scales it.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kogia.ops.dispatch import op
from kogia.ops.linear import add_product, product
from kogia.ops.packed import Packed

_CACHED = 1 << 17
"""Logits that a CPU's cache holds: half a megabyte in float32."""
_LEAST_ROWS = 256
"""Products of fewer rows are slow."""
_MEMORY_SHARE = 64
"""The share of a GPU's memory that one chunk of logits takes is one part of so many."""


def chunk_rows(vocab: int, weight: Tensor) -> int:
    """Rows of logits held at a time: what a CPU's cache takes, or a small part of a GPU's memory."""
    if weight.device.type != "cuda":
        return max(_LEAST_ROWS, _CACHED // vocab)
    memory = torch.cuda.get_device_properties(weight.device).total_memory
    return max(_LEAST_ROWS, memory // _MEMORY_SHARE // (vocab * weight.element_size()) // _LEAST_ROWS * _LEAST_ROWS)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """As few as may be, and of nearly one size, since each goes over the gradient of the whole weight."""
    rows, most = hidden.shape[0], chunk_rows(weight.shape[0], weight)
    each = max(1, rows) / max(1, math.ceil(rows / most))
    size = min(most, math.ceil(each / _LEAST_ROWS) * _LEAST_ROWS)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = product(hidden, weight)
    logits = logits.to(_wide(logits))
    return logits if temperature == 1 else logits.div_(temperature)


@op(cpu=("kogia.ops.cpu.logprob",))
def predictions(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(log p(target), entropy, log of the sum of powers) of each row, without gradients."""
    lse = logits.logsumexp(-1)
    expected = logits.sub(lse[:, None]).exp_().mul_(logits).sum(-1)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - lse, lse - expected, lse


@op(cpu=("kogia.ops.cpu.logprob",))
def prediction_grads(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    lse: Float[Tensor, " rows"],
    grad: Float[Tensor, " rows"],
) -> Float[Tensor, "rows vocab"]:
    """What the gradient of log p(target) is to the logits, in their place."""
    grads = logits.sub_(lse[:, None]).exp_().mul_(-grad[:, None])
    return grads.scatter_add_(-1, targets[:, None], grad[:, None])


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=_wide(hidden), device=hidden.device)
        entropy, lse = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for part in _chunks(hidden, weight):
            logits = _logits(hidden[part], weight, temperature)
            logprobs[part], entropy[part], lse[part] = predictions(logits, targets[part])
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=_wide(weight))
        for part in _chunks(hidden, weight):
            logits = _logits(hidden[part], weight, ctx.temperature)
            grad = grads[0][part] / ctx.temperature
            d_logits = prediction_grads(logits, targets[part], lse[part], grad).to(weight.dtype)
            grad_hidden[part] = product(d_logits, weight.T)
            add_product(grad_weight, d_logits.T, hidden[part].T)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


@op()
def linear_logprob(
    hidden: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "vocab dim"] | Packed,
    targets: Int[Tensor, " rows"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(log p(target), entropy) per row in nats, at least float32. The entropy is for monitoring, without gradient.

    A packed weight is made dense once, in the dtype of `hidden`.
    """
    weight = weight.dense(hidden.dtype) if isinstance(weight, Packed) else weight
    return _LinearLogprob.apply(hidden, weight, targets, temperature)  # pyright: ignore[reportReturnType]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=_wide(hidden), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=_wide(weight))
        for part in _chunks(hidden, weight):
            counts = None if counted is None else counted[part]
            logprobs[part], entropy[part], d_logits = loss_gradient(
                product(hidden[part], weight), targets[part], counts
            )
            grad_hidden[part] = product(d_logits, weight.T)
            add_product(grad_weight, d_logits.T, hidden[part].T)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logprobs, entropy)
        return _summed_loss(logprobs, counted), logprobs, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = (grad_hidden.to(grad_weight.dtype) * grads[0]).to(grad_hidden.dtype)
        narrow = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
        return scaled, torch.mul(grad_weight, grads[0], out=narrow), None, None


def _summed_loss(logprobs: Tensor, counted: Tensor | None) -> Tensor:
    return -(logprobs if counted is None else logprobs.masked_fill(~counted, 0.0)).sum()


@op()
def linear_loss(
    hidden: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " rows"],
    counted: Bool[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(-sum of log p(target) over the rows that count, all by default; log p(target); entropy), as `linear_logprob`.

    The sum alone has a gradient, which is made at once: logits are computed once instead of twice.
    """
    if torch.is_grad_enabled():
        return _LinearLoss.apply(hidden, weight, targets, counted)  # pyright: ignore[reportReturnType]
    logprobs, entropy = linear_logprob(hidden, weight, targets)
    return _summed_loss(logprobs, counted), logprobs, entropy


@op(cuda=("kogia.ops.triton.logprob",))
def loss_gradient(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"], counted: Bool[Tensor, " rows"] | None = None
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """(log p(target), entropy, gradient of -log p(target) with respect to the logits, 0 in rows that do not count).

    The logits may be overwritten: the gradient is of their dtype, and may take their place.
    """
    wide = logits.to(_wide(logits))
    logprobs, entropy, lse = predictions(wide, targets)
    grad = torch.full_like(lse, -1.0) if counted is None else -counted.to(lse.dtype)
    return logprobs, entropy, prediction_grads(wide, targets, lse, grad).to(logits.dtype)
