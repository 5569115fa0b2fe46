"""Rotary position embedding and its YaRN extension (DeepSeek-V2 section 3.1.4).

    theta_i = base^(-2i/dim);   rotate pair i of position t by t * theta_i

MLA checkpoints pair neighbours (x0,x1), (x2,x3) ...: *interleaved*. Llama and Qwen checkpoints pair x_i with
x_{i + dim/2}: *half-split*. Using one on the weights of the other is silently wrong at every distance but zero.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op


def inverse_frequencies(dim: int, base: float) -> Float[Tensor, " half"]:
    """theta_i for i = 0 .. dim/2 - 1, in radians per position."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_inverse_frequencies(
    dim: int, base: float, *, factor: float, original_max_position: int, beta_fast: float, beta_slow: float
) -> Float[Tensor, " half"]:
    """YaRN: keep fast-turning pairs, divide slow ones by `factor`, ramp linearly between the two corrections.

    corr(r) = dim * ln(original_max_position / (2 pi r)) / (2 ln base) is the pair that turns r times over the
    original context.
    """
    theta = inverse_frequencies(dim, base)

    def correction(rotations: float) -> float:
        return dim * math.log(original_max_position / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(correction(beta_fast)), 0)
    high = min(math.ceil(correction(beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return theta * (1 - ramp) + theta / factor * ramp


def llama3_inverse_frequencies(
    dim: int,
    base: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position: int,
) -> Float[Tensor, " half"]:
    """Llama 3.1: divide the pairs that turn less than `low_freq_factor` times over the original context by `factor`,
    keep those that turn more than `high_freq_factor` times, blend linearly in between."""
    theta = inverse_frequencies(dim, base)
    turns = original_max_position * theta / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return theta * kept + theta / factor * (1 - kept)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1; squared it multiplies the softmax scale. 1 when the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@op(cpu=("kogia.ops.cpu.rope",))
def rope_angles(
    positions: Int[Tensor, " tokens"], theta: Float[Tensor, " half"], scale: float = 1.0
) -> tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]]:
    """cos and sin of position * theta in float32, times `scale` (YaRN's mscale ratio, 1 in every released config)."""
    angles = positions[:, None].to(torch.float32) * theta
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate_interleaved(
    x: Float[Tensor, "tokens heads rope"], cos: Float[Tensor, "tokens half"], sin: Float[Tensor, "tokens half"]
) -> Float[Tensor, "tokens heads rope"]:
    """Rotate neighbouring pairs (MLA): complex numbers times e^(i angle).

    Written with real numbers where the compiler is to fuse it, which knows no complex ones.
    """
    cos, sin = cos[:, None], sin[:, None]
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        pairs = pairs if _is_even(pairs) else pairs.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def _is_even(pairs: Tensor) -> bool:
    """Whether pairs lie as complex numbers do."""
    return pairs.stride(-1) == 1 and not any(step % 2 for step in (*pairs.stride()[:-1], pairs.storage_offset()))


@op(cuda=("kogia.ops.triton.rope",))
def rotate_half_split(
    x: Float[Tensor, "tokens heads rope"], cos: Float[Tensor, "tokens half"], sin: Float[Tensor, "tokens half"]
) -> Float[Tensor, "tokens heads rope"]:
    """Rotate pairs (x_i, x_{i + rope/2}) (Llama, Qwen)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
