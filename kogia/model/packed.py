"""The one batch format: sequences laid end to end, no batch axis, no padding, no mask tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Token sequences laid end to end. Attention never crosses a boundary of `cu_seqlens`."""

    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    """0-based within each sequence; a chunk of a longer sequence starts at its own offset."""
    cu_seqlens: Int[Tensor, " seqs_plus_1"]
    """Sequence i is rows cu_seqlens[i] to cu_seqlens[i+1]; the first entry is 0, the last is `tokens`."""
    max_seqlen: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device | str) -> "PackedTokens":
        return PackedTokens(
            self.token_ids.to(device), self.positions.to(device), self.cu_seqlens.to(device), self.max_seqlen
        )


def pack(sequences: Sequence[Sequence[int]]) -> PackedTokens:
    """Lay whole sequences end to end, positions starting at 0 in each. Empty sequences are a caller's bug."""
    lengths = [len(s) for s in sequences]
    assert min(lengths, default=0) > 0, f"pack needs non-empty sequences, got lengths {lengths}"
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.tensor([t for s in sequences for t in s], dtype=torch.long)
    positions = torch.arange(len(ids)) - torch.repeat_interleave(ends[:-1], torch.tensor(lengths))
    return PackedTokens(ids, positions, ends, max(lengths))
