"""Log-probabilities of given tokens without ever holding [tokens, vocab].

The output head is applied to a chunk of rows at a time, forward and again backward, so memory is one chunk of logits.
With l = h W^T / temperature:  log p(t) = l_t - logsumexp(l),  d log p(t) / dl = onehot(t) - softmax(l).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op
from kogia.ops.linear import product
from kogia.ops.packed import Packed

CHUNK_ELEMENTS = 1 << 20  # logits held at a time: 4 MiB in float32


def _chunks(rows: int, vocab: int) -> range:
    return range(0, rows, max(1, CHUNK_ELEMENTS // vocab))


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = product(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
        rows, vocab = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(rows, dtype=wide, device=hidden.device)
        entropy, lse = torch.empty_like(logprobs), torch.empty_like(logprobs)
        step = _chunks(rows, vocab).step
        for start in _chunks(rows, vocab):
            part = slice(start, start + step)
            logits = _logits(hidden[part], weight, temperature)
            logprobs[part], entropy[part], lse[part] = predictions(logits, targets[part])
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        step = _chunks(hidden.shape[0], weight.shape[0]).step
        for start in _chunks(hidden.shape[0], weight.shape[0]):
            part = slice(start, start + step)
            grad = grads[0][part] / ctx.temperature
            logits = _logits(hidden[part], weight, ctx.temperature)
            d_logits = prediction_grads(logits, targets[part], lse[part], grad).to(weight.dtype)
            grad_hidden[part] = product(d_logits, weight.T)
            grad_weight += product(d_logits.T, hidden[part].T)
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
