"""One cached row per token of latent attention: normed latent | rotated shared key | index key, in one of two formats.

dense   all numbers in the cache's dtype
FP8     bytes: E4M3 latent, one float32 scale per 128 of it, bfloat16 rotary key, then the index key as the latent.
        The rotary part keeps 16 bits, as the published kernels do: it carries positions. DeepSeek-V3: 512 + 16 + 128 =
        656 bytes, and 132 more for the index key of V3.2 (FlashMLA's and the V3.2 indexer's layouts).

A row may hold only the first `latent` numbers of a wider latent, for models trained with nested ranks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kogia.ops.fp8 import BLOCK, dequantize_groups, quantize_groups


@dataclass(frozen=True, slots=True)
class LatentRow:
    latent: int
    rope: int
    index: int = 0
    """Width of the index key; 0 without sparse attention."""
    fp8: bool = False

    @property
    def width(self) -> int:
        """Elements of a stored row: numbers, or bytes in the FP8 format."""
        if not self.fp8:
            return self.latent + self.rope + self.index
        return _fp8_bytes(self.latent) + 2 * self.rope + _fp8_bytes(self.index)

    def pack(
        self,
        latent: Float[Tensor, "tokens full_latent"],
        rope: Float[Tensor, "tokens rope"],
        index: Float[Tensor, "tokens index"] | None,
    ) -> Tensor:
        """[tokens, width] rows; a latent wider than the row is cut to its prefix."""
        latent = latent[:, : self.latent]
        if not self.fp8:
            return torch.cat((latent, rope) if index is None else (latent, rope, index), -1)
        parts = [*_to_bytes(latent), rope.to(torch.bfloat16).contiguous().view(torch.uint8)]
        return torch.cat(parts if index is None else [*parts, *_to_bytes(index)], -1)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Float[Tensor, "... latent_rope_index"]:
        """Rows as numbers: latent, rotary key, index key."""
        if not self.fp8:
            return rows
        sizes = [_fp8_bytes(self.latent), 2 * self.rope, _fp8_bytes(self.index)]
        latent, rope, index = rows.split(sizes, -1)
        parts = [_from_bytes(latent, self.latent, dtype), rope.contiguous().view(torch.bfloat16).to(dtype)]
        if self.index:
            parts.append(_from_bytes(index, self.index, dtype))
        return torch.cat(parts, -1)


def _fp8_bytes(numbers: int) -> int:
    return numbers + 4 * -(-numbers // BLOCK)


def _to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    quantized, scale = quantize_groups(x)
    return quantized.view(torch.uint8), scale.contiguous().view(torch.uint8)


def _from_bytes(rows: Tensor, numbers: int, dtype: torch.dtype) -> Tensor:
    quantized, scale = rows.split([numbers, rows.shape[-1] - numbers], -1)
    return dequantize_groups(
        quantized.contiguous().view(torch.float8_e4m3fn), scale.contiguous().view(torch.float32), dtype
    )
