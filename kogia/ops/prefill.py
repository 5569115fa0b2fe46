"""Which sequences of a step attend in the expanded form although there is a cache, and what they read of it.

With keys and values of several heads there is nothing to expand; there, rows are laid out side by side for a kernel
that is made for many queries, by the same rule.
The absorbed form reads a row once for all heads, but computes with latents, which are wider than keys and values: it is
for few queries. Sequences that run many tokens take keys and values of every head out of their cached rows instead, the
rows that they have just written included, so that a prompt has the same numbers whole and in chunks.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from kogia.ops.cache import LayerCache
from kogia.ops.dispatch import is_batch_invariant
from kogia.ops.segments import Segments

FEW = 4
"""Most queries of a sequence that stay absorbed: a token and its drafts."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """The sequences of a step from `first` on."""

    first: int
    """Sequences before that attend in the absorbed form."""
    num_rows: int
    """Their tokens."""
    segments: Segments
    keys: Segments
    """Cached tokens of each, this step's included."""
    slots: Int[Tensor, " keys"]
    """Where they are stored."""


def prefill_of(cache: LayerCache, segments: Segments) -> Prefill | None:
    """The part of a step that expands: the sequences from the first one on that runs more than a few tokens. What
    stands behind it with fewer is expanded too, unless its contexts are the greater part: then none is.

    It is the same for all layers, and made once for them.
    """
    if not cache.expands or cache.attend is not None or is_batch_invariant():  # that has one form for all
        return None
    if "prefill" not in cache.shared:
        cache.shared["prefill"] = _prefill(cache, segments)
    return cache.shared["prefill"]


def _prefill(cache: LayerCache, segments: Segments) -> Prefill | None:
    long = segments.lengths > FEW
    first = int(long.argmax()) if long.any() else len(long)
    contexts = cache.contexts[first:]
    if contexts[~long[first:]].sum() >= contexts[long[first:]].sum():
        return None
    tail, num_rows = segments, int(segments.lengths[:first].sum())
    if first:
        tail = Segments(segments.cu_seqlens[first:] - num_rows, segments.lengths[first:])
    lens = cache.context_lens[first:]
    keys = Segments(torch.nn.functional.pad(lens.cumsum(0), (1, 0)), cache.contexts[first:])
    size = cache.block_size
    blocks = cache.block_tables[first:][keys.owner, keys.offsets // size]
    return Prefill(first, num_rows, tail, keys, blocks * size + keys.offsets % size)


def absorbed_part(cache: LayerCache, segments: Segments, prefill: Prefill) -> tuple[LayerCache, Segments]:
    """The sequences before `prefill`, as a step of their own."""
    if "absorbed" not in cache.shared:
        first = prefill.first
        part = replace(
            cache,
            slots=cache.slots[: prefill.num_rows],
            block_tables=cache.block_tables[:first],
            context_lens=cache.context_lens[:first],
            contexts=cache.contexts[:first],
            shared={},
        )
        cache.shared["absorbed"] = part, Segments(segments.cu_seqlens[: first + 1], segments.lengths[:first])
    part, head = cache.shared["absorbed"]
    return replace(part, rows=cache.rows), head
