"""Block-scaled FP8 weights, as DeepSeek-V3 publishes them (DeepSeek-V3 section 3.3, README_WEIGHTS).

    W[a, b] = q[a, b] * scale_inv[a // 128, b // 128]         q in E4M3, one float32 scale per 128 x 128 block

Despite its name the stored `scale_inv` multiplies. Blocks at the lower and right edge are cut where the matrix ends.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
_LEAST = 2.0**-149  # float32's smallest number
_LEAST_NORMAL = 2.0**-126
_LEAST_POWER = 2.0**-127  # the smallest scale of the ue8m0 format


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a [..., out, in] weight: one per block, edges included."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """[..., blocks, blocks] -> [..., rows, columns], each scale over its block."""
    return scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]


def _float32(x: Tensor) -> Tensor:
    """`x.float()` of E4M3 numbers; on a CPU by moving their bits into a float16, whose exponent is biased by 8 more.

    torch's own cast there goes number by number and takes five times as long.
    """
    if x.device.type != "cpu":
        return x.float()
    halves = x.view(torch.int8).short().bitwise_left_shift_(7).bitwise_and_(-0x4080)  # the sign was spread to bit 14
    values = halves.view(torch.float16).float().mul_(2.0**8)
    if x.numel() and bool((x.view(torch.uint8).bitwise_and(0x7F)).max() == 0x7F):
        values.masked_fill_(values.abs() == 480, torch.nan)  # the pattern that E4M3 has for NaN
    return values


def dequantize_blocks(
    weight: Float[Tensor, "*stack out in"], scale_inv: Float[Tensor, "*stack out_blocks in_blocks"], dtype: torch.dtype
) -> Float[Tensor, "*stack out in"]:
    """The dense weight; the product is taken in float32 and rounded once."""
    assert tuple(scale_inv.shape) == scale_shape(weight.shape), f"{weight.shape} does not fit scales {scale_inv.shape}"
    return _float32(weight).mul_(_spread(scale_inv.float(), *weight.shape[-2:])).to(dtype)


def quantize_blocks(
    weight: Float[Tensor, "*stack out in"], *, power_of_two: bool = False
) -> tuple[Float[Tensor, "*stack out in"], Float[Tensor, "*stack out_blocks in_blocks"]]:
    """(E4M3 weight, float32 scales): each block's largest magnitude maps to 448; a block of zeros gets scale 1.

    `power_of_two` rounds scales up to powers of two (the ue8m0 format of DeepSeek-V3.1 and later).
    """
    rows, columns = weight.shape[-2:]
    *stack, down, across = scale_shape(weight.shape)
    whole = (down * BLOCK, across * BLOCK)
    new = weight.new_empty if whole == (rows, columns) else weight.new_zeros
    padded = new(*stack, *whole, dtype=torch.float32)
    padded[..., :rows, :columns] = weight
    tiles = padded.unflatten(-1, (across, BLOCK)).unflatten(-3, (down, BLOCK))
    scale = _scales(tiles.abs().amax((-3, -1)), power_of_two)
    tiles.div_(scale[..., :, None, :, None])
    if power_of_two:
        limit = _largest_code(scale)[..., :, None, :, None]
        tiles.clamp_(-limit, limit)
    else:  # the largest float32 number has a scale below 2^120
        tiles.clamp_(-E4M3_MAX, E4M3_MAX)
    return padded[..., :rows, :columns].to(torch.float8_e4m3fn), scale


def _scales(amax: Tensor, power_of_two: bool = False) -> Tensor:
    """The scale that maps `amax` to 448, 1 for zeros. Below float32's normal numbers, where a quotient would be rounded
    to 0 or far off, it is rounded up to the next number there is; `power_of_two` rounds up to those."""
    ordinary = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    rounded_up = torch.ceil(amax / (E4M3_MAX * _LEAST)) * _LEAST
    scale = torch.where(ordinary < _LEAST_NORMAL, rounded_up, ordinary)
    return torch.exp2(torch.ceil(torch.log2(scale))).clamp_min(_LEAST_POWER) if power_of_two else scale


def _largest_code(scale: Tensor) -> Tensor:
    """The largest E4M3 number whose product with `scale` is finite: 448, or 240 beside 2^120, the largest scale."""
    return torch.where(scale >= 2.0**120, 240.0, E4M3_MAX)


def quantize_groups(
    x: Float[Tensor, "... width"], *, power_of_two: bool = False
) -> tuple[Float[Tensor, "... width"], Float[Tensor, "... groups"]]:
    """(E4M3 numbers, float32 scales) with one scale per 128 neighbours of a row; the last group may be shorter.

    This is how activations and cache rows are scaled (DeepSeek-V3 section 3.3.2: tiles of 1 x 128).
    """
    width, groups = x.shape[-1], -(-x.shape[-1] // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, groups * BLOCK - width)).unflatten(-1, (groups, BLOCK))
    scale = _scales(padded.abs().amax(-1), power_of_two)
    rounded = (padded / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return rounded.flatten(-2)[..., :width].contiguous(), scale


def dequantize_groups(
    x: Float[Tensor, "... width"], scale: Float[Tensor, "... groups"], dtype: torch.dtype
) -> Float[Tensor, "... width"]:
    """The numbers `quantize_groups` rounded."""
    return (_float32(x) * scale.repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]).to(dtype)
