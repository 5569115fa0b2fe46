"""The paged cache as one attention layer sees it, and the two operations that write to it.

A row holds what a token leaves to later ones. Grouped-query attention stores the keys and then the values of all its
key/value heads. Latent attention stores normed latent | rotated shared key | index key, in one of two formats:

dense   all numbers in the cache's dtype
FP8     bytes: E4M3 latent, one float32 scale per 128 of it, bfloat16 rotary key, then the index key as the latent.
        The rotary part keeps 16 bits, as the published kernels do: it carries positions. DeepSeek-V3: 512 + 16 + 128 =
        656 bytes, and 132 more for the index key of V3.2 (FlashMLA's and the V3.2 indexer's layouts).

A row may hold only the first `latent` numbers of a wider latent, for models trained with nested ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kogia.ops.dispatch import op
from kogia.ops.fp8 import BLOCK, dequantize_groups, quantize_groups
from kogia.ops.norm import rms_norm
from kogia.ops.rope import rotate_interleaved


@dataclass(frozen=True, slots=True)
class KVRow:
    """Keys of all key/value heads, then their values."""

    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers of a stored row."""
        return 2 * self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LatentRow:
    """One key head, whose value is the first `latent` numbers of the key itself (DeepSeek-V2 section 2.1.2)."""

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


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """What one attention layer reads and writes in one step."""

    rows: Shaped[Tensor, "slots row"]
    """This layer's storage; slot `block * block_size + i` is row i of a block."""
    slots: Int[Tensor, " tokens"]
    """Where each new token's row is written."""
    block_tables: Int[Tensor, "seqs blocks"]
    """Blocks of each sequence, padded with any block of its own."""
    context_lens: Int[Tensor, " seqs"]
    """Visible tokens of each sequence, this step's included."""
    contexts: Int[np.ndarray, " seqs"]
    """The same on the host, or bounds above it."""
    block_size: int
    row: LatentRow | KVRow
    shared: dict[Any, Any] = field(default_factory=dict)
    """What the reference attention makes once for all layers that see the cache alike, by bucket."""
    expands: bool = False
    """Sequences that run many tokens attend in the expanded form (`kogia.ops.prefill`)."""
    attend: Callable[..., Tensor] | None = None
    """Called instead of `paged_attention`, with the same arguments: where an option changes or watches attention."""


@op(cuda=("kogia.ops.triton.latent",), invariant_cuda=("kogia.ops.triton.latent",), cpu=("kogia.ops.cpu.latent",))
def write_latent(
    kv: Float[Tensor, "tokens latent_rope"],
    cache: LayerCache,
    norm_weight: Float[Tensor, " latent"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    *,
    eps: float,
    index_key: Float[Tensor, "tokens index"] | None = None,
) -> None:
    """Norm the latents, rotate the shared keys, and write both (with index keys) to their slots.

    `kv` is the output of the down-projection, latent first. The norm is `rms_norm` with `norm_weight` and `eps`.
    """
    row = cache.row
    assert isinstance(row, LatentRow), "a latent layer has latent rows"
    latent, rope = kv.split([norm_weight.shape[0], row.rope], -1)
    rope = rotate_interleaved(rope[:, None], cos, sin)[:, 0]
    packed = row.pack(rms_norm(latent, norm_weight, eps), rope, index_key)
    cache.rows.index_copy_(0, cache.slots, packed.to(cache.rows.dtype))


@op(cuda=("kogia.ops.triton.kv",))
def write_kv(k: Float[Tensor, "tokens heads dim"], v: Float[Tensor, "tokens heads dim"], cache: LayerCache) -> None:
    """Write rotated keys, and values, to their slots."""
    cache.rows.index_copy_(0, cache.slots, torch.cat((k.flatten(1), v.flatten(1)), -1).to(cache.rows.dtype))


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
