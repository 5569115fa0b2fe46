"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight, statistics in at least float32."""

import torch
from jaxtyping import Float
from torch import Tensor

from kogia.ops.dispatch import op


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """Hand-written backward: autograd through the plain formula keeps three more tensors and makes twice the passes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad, factor = _wide(x) * scale, _wide(grads[0]), _wide(weight)
        product = grad * normed
        inner = (product @ factor).div_(-x.shape[-1])[..., None]
        grad_x = (grad * factor).addcmul_(normed, inner).mul_(scale)
        return grad_x.to(x.dtype), product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype), None


@op(
    cuda=("kogia.ops.triton.norm", "kogia.ops.triton.norm_training"),
    invariant_cuda=("kogia.ops.triton.norm",),
    cpu=("kogia.ops.cpu.norm",),
)
def rms_norm(x: Float[Tensor, "... dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "... dim"]:
    """Normalise the last axis. The product with `weight` is taken in the input's dtype, as the published models do."""
    if not torch.is_grad_enabled():
        return _normalise(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


@op(
    cuda=("kogia.ops.triton.norm", "kogia.ops.triton.norm_training"),
    invariant_cuda=("kogia.ops.triton.norm",),
    cpu=("kogia.ops.cpu.norm",),
)
def add_rms_norm(
    x: Float[Tensor, "... dim"], delta: Float[Tensor, "... dim"], weight: Float[Tensor, " dim"], eps: float
) -> tuple[Float[Tensor, "... dim"], Float[Tensor, "... dim"]]:
    """(x + delta, rms_norm of that): the residual stream behind a block, and the next one's input."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


@op(cuda=("kogia.ops.triton.sums",), cpu=("kogia.ops.cpu.norm",))
def residual_sum(
    x: Float[Tensor, "... dim"], delta: Float[Tensor, "... dim"], *more: Float[Tensor, "... dim"]
) -> Float[Tensor, "... dim"]:
    """x plus the sum of the others: the residual stream behind a block that nothing normalises at once."""
    for each in more:
        delta = delta + each
    return x + delta


@op(cuda=("kogia.ops.triton.sums",))
def branches(x: Float[Tensor, "... dim"], number: int) -> tuple[Float[Tensor, "... dim"], ...]:
    """x for so many readers, whose gradients may be added up in one pass."""
    return (x,) * number


@op(cpu=("kogia.ops.cpu.norm",))
def paired_norms(
    first: Float[Tensor, "rows dim"],
    second: Float[Tensor, "rows dim"],
    weights: tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]],
    eps: float,
) -> Float[Tensor, "rows both"]:
    """`rms_norm` of each with its own weight, side by side."""
    return torch.cat((rms_norm(first, weights[0], eps), rms_norm(second, weights[1], eps)), -1)
