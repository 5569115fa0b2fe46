"""Quantised weights as one type: what is stored, and how to have the numbers back.

A format says how a dense [..., out, in] weight becomes `data`, `scale` and perhaps `zero`, and back. Modules,
checkpoints and the conversion of files all go through the table `FORMATS`, so that each format stands in one place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kogia.ops import fp8, integers

Shape = tuple[int, ...]
ZERO_NAME = "weight_zero_point"
"""What zeros are called beside `weight`, in modules and in files."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A quantised [*stack, out, in] weight."""

    data: Shaped[Tensor, "*stack out stored"]
    scale: Float[Tensor, "*stack scales_out scales_in"]
    zero: Shaped[Tensor, "*stack scales_out scales_in"] | None
    format: str
    """A key of `FORMATS`."""

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "*stack out in"]:
        """The weight it stands for, rounded once to `dtype`."""
        return FORMATS[self.format].unpack(self, dtype)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> "Packed":
        """One of a stack."""
        zero = None if self.zero is None else self.zero[index]
        return Packed(self.data[index], self.scale[index], zero, self.format)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight. Shapes are those of a dense [..., out, in] weight."""

    name: str
    data_dtype: torch.dtype
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype | None
    """None where there are no zeros; a weight of a format that has them may do without."""
    data_shape: Callable[[Shape], Shape]
    scale_shape: Callable[[Shape], Shape]
    """Of the zeros as well."""
    scale_name: str
    """What the scales are called beside `weight`, in modules and in files."""
    row_block: int
    """Rows that share scales: a weight may be cut between, never within."""
    pack: Callable[..., Packed]
    """Of a dense weight, and keywords of the format's own."""
    unpack: Callable[[Packed, torch.dtype], Tensor]
    takes: Callable[[Shape], bool] = lambda shape: True
    """Whether a weight of this shape has the format."""

    def empty(self, shape: Shape, device: torch.device | str, *, zeros: bool = False) -> Packed:
        """Uninitialised storage for a weight of this shape."""
        data = torch.empty(self.data_shape(shape), dtype=self.data_dtype, device=device)
        scale = torch.empty(self.scale_shape(shape), dtype=self.scale_dtype, device=device)
        zero = torch.empty(scale.shape, dtype=self.zero_dtype, device=device) if zeros else None
        return Packed(data, scale, zero, self.name)


def _pack_fp8(weight: Tensor, *, power_of_two: bool = False) -> Packed:
    data, scale = fp8.quantize_blocks(weight, power_of_two=power_of_two)
    return Packed(data, scale, None, "fp8")


def _unpack_fp8(packed: Packed, dtype: torch.dtype) -> Tensor:
    return fp8.dequantize_blocks(packed.data, packed.scale, dtype)


def _pack_int8(weight: Tensor) -> Packed:
    data, scale = integers.quantize_rows(weight)
    return Packed(data, scale, None, "int8")


def _unpack_int8(packed: Packed, dtype: torch.dtype) -> Tensor:
    return integers.dequantize_rows(packed.data, packed.scale, dtype)


def _pack_int4(
    weight: Tensor, *, asymmetric: bool = False, importance: Tensor | None = None, spread: Tensor | None = None
) -> Packed:
    data, scale, zero = integers.quantize_nibbles(weight, asymmetric=asymmetric, importance=importance, spread=spread)
    return Packed(data, scale, zero, "int4")


def _unpack_int4(packed: Packed, dtype: torch.dtype) -> Tensor:
    return integers.dequantize_nibbles(packed.data, packed.scale, packed.zero, dtype)


def _group_shape(shape: Shape) -> Shape:
    group = integers.group_size(shape[-1])
    assert group is not None, "Format.takes says so"
    return (*shape[:-1], shape[-1] // group)


_FP8 = Format(
    name="fp8",
    data_dtype=torch.float8_e4m3fn,
    scale_dtype=torch.float32,
    zero_dtype=None,
    data_shape=lambda shape: shape,
    scale_shape=fp8.scale_shape,
    scale_name="weight_scale_inv",
    row_block=fp8.BLOCK,
    pack=_pack_fp8,
    unpack=_unpack_fp8,
)
_INT8 = Format(
    name="int8",
    data_dtype=torch.int8,
    scale_dtype=torch.float32,
    zero_dtype=None,
    data_shape=lambda shape: shape,
    scale_shape=lambda shape: (*shape[:-1], 1),
    scale_name="weight_scale",
    row_block=1,
    pack=_pack_int8,
    unpack=_unpack_int8,
)
_INT4 = Format(
    name="int4",
    data_dtype=torch.uint8,
    scale_dtype=torch.bfloat16,
    zero_dtype=torch.uint8,
    data_shape=lambda shape: (*shape[:-1], shape[-1] // 2),
    scale_shape=_group_shape,
    scale_name="weight_scale",
    row_block=1,
    pack=_pack_int4,
    unpack=_unpack_int4,
    takes=lambda shape: integers.group_size(shape[-1]) is not None,
)
FORMATS = {each.name: each for each in (_FP8, _INT8, _INT4)}
"""Name -> format. "fp8" is E4M3 in 128 x 128 blocks, as DeepSeek-V3 publishes it; "int8" has a scale per row,
"int4" one per group of a row, and zeros where it is asymmetric (ops/integers.py)."""


def joined(
    first: Tensor | Packed, second: Tensor | Packed, into: Tensor | Packed | None = None
) -> Tensor | Packed | None:
    """The rows of two matrices below each other, written to `into` where that is such a matrix; None where the two are
    stored differently, or where the first ends within a block of rows."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (
            _below(first, second, into if isinstance(into, Tensor) else None) if first.dtype == second.dtype else None
        )
    if not (isinstance(first, Packed) and isinstance(second, Packed) and first.format == second.format):
        return None
    if len(first) % FORMATS[first.format].row_block or (first.zero is None) != (second.zero is None):
        return None
    old = (into.data, into.scale, into.zero) if isinstance(into, Packed) else (None, None, None)
    zero = None if first.zero is None or second.zero is None else _below(first.zero, second.zero, old[2])
    data, scale = _below(first.data, second.data, old[0]), _below(first.scale, second.scale, old[1])
    return Packed(data, scale, zero, first.format)


def _below(first: Tensor, second: Tensor, into: Tensor | None) -> Tensor:
    shape = (len(first) + len(second), *first.shape[1:])
    if into is None or (into.shape, into.dtype, into.device) != (shape, first.dtype, first.device):
        into = first.new_empty(shape)
    into[: len(first)].copy_(first)
    into[len(first) :].copy_(second)
    return into


def format_of(dtype: torch.dtype) -> str | None:
    """The format whose data have this dtype, or None for numbers that stand for themselves."""
    return next((name for name, each in FORMATS.items() if each.data_dtype == dtype), None)
