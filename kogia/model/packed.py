"""The one batch format: sequences laid end to end, no batch axis, no padding, no mask tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.ops.segments import Segments, segments_of


@dataclass(frozen=True, slots=True, eq=False)
class PackedTokens:
    """Token sequences laid end to end. Attention never crosses from one to the next."""

    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    """0-based within each sequence; a chunk of a longer sequence starts at its own offset."""
    segments: Segments

    def __post_init__(self) -> None:
        """Raise ValueError where the three are not of as many tokens."""
        counts = (self.token_ids.shape[0], self.positions.shape[0], self.segments.num_tokens)
        if len(set(counts)) > 1:
            raise ValueError(
                f"PackedTokens: {counts[0]} token ids, {counts[1]} positions, sequences of {counts[2]} tokens in all: "
                "give equally many"
            )

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device | str) -> "PackedTokens":
        return PackedTokens(self.token_ids.to(device), self.positions.to(device), self.segments.to(device))


def pack(sequences: Sequence[Sequence[int]]) -> PackedTokens:
    """Lay whole sequences end to end, positions starting at 0 in each. Empty sequences are a caller's bug."""
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    return pack_arrays(np.array([t for s in sequences for t in s], dtype=np.int64), lengths)


def pack_arrays(token_ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> PackedTokens:
    """Sequences already laid end to end as a `PackedTokens`, positions starting at 0 in each."""
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(token_ids)) - np.repeat(starts, lengths)
    return PackedTokens(torch.from_numpy(token_ids), torch.from_numpy(positions), segments_of(lengths))
