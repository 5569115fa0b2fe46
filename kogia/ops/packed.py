"""Quantised weights as one type: what is stored, and how to have the numbers back.

A format says how a dense [..., out, in] weight becomes `data`, `scale` and perhaps `zero`, and back. Modules,
checkpoints and the conversion of files all go through the table `FORMATS`, so that each format stands in one place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kogia.ops import fp8

Shape = tuple[int, ...]


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

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> "Packed":
        """One of a stack."""
        zero = None if self.zero is None else self.zero[index]
        return Packed(self.data[index], self.scale[index], zero, self.format)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight. Shapes are those of a dense [..., out, in] weight."""

    data_dtype: torch.dtype
    data_shape: Callable[[Shape], Shape]
    scale_shape: Callable[[Shape], Shape]
    scale_name: str
    """What the scales are called beside `weight`, in modules and in files."""
    row_block: int
    """Rows that share scales: a weight may be cut between, never within."""
    pack: Callable[..., Packed]
    """Of a dense weight, and keywords of the format's own."""
    unpack: Callable[[Packed, torch.dtype], Tensor]

    def empty(self, shape: Shape, device: torch.device | str) -> Packed:
        """Uninitialised storage for a weight of this shape."""
        data = torch.empty(self.data_shape(shape), dtype=self.data_dtype, device=device)
        scale = torch.empty(self.scale_shape(shape), dtype=torch.float32, device=device)
        return Packed(data, scale, None, next(name for name, each in FORMATS.items() if each is self))


def _pack_fp8(weight: Tensor, *, power_of_two: bool = False) -> Packed:
    data, scale = fp8.quantize_blocks(weight, power_of_two=power_of_two)
    return Packed(data, scale, None, "fp8")


def _unpack_fp8(packed: Packed, dtype: torch.dtype) -> Tensor:
    return fp8.dequantize_blocks(packed.data, packed.scale, dtype)


FORMATS = {
    "fp8": Format(
        data_dtype=torch.float8_e4m3fn,
        data_shape=lambda shape: shape,
        scale_shape=fp8.scale_shape,
        scale_name="weight_scale_inv",
        row_block=fp8.BLOCK,
        pack=_pack_fp8,
        unpack=_unpack_fp8,
    )
}
"""Name -> format. "fp8" is E4M3 in 128 x 128 blocks, as DeepSeek-V3 publishes it."""


def format_of(dtype: torch.dtype) -> str | None:
    """The format whose data have this dtype, or None for numbers that stand for themselves."""
    return next((name for name, each in FORMATS.items() if each.data_dtype == dtype), None)
