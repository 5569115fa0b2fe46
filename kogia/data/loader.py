"""Batches in an order that is a pure function of (seed, epoch), so that a resume needs two integers and no replay.

In every epoch all sequences are permuted; batches take whole sequences in that order up to the token budget, and the
batch at an epoch's end continues into the next epoch, so every batch is full. With `best_fit` a sequence of later on
fills what the next one in order leaves free (`kogia.data.packing`), and an epoch begins with a batch of its own. Where
they are `joined` the order is one row of tokens, of which each batch takes as many as it holds. A source of weight w
contributes each of its sequences floor(w) times and a fresh random subset of share w - floor(w).

All ranks walk through the same batches, and rank r of R takes every R-th: the state is the same on all of them, and a
run may go on with another number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kogia.data.config import Packing
from kogia.data.packing import best_fit, fill, gather_rows
from kogia.data.shards import Shard
from kogia.model.packed import PackedTokens, pack_arrays


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences and the tokens whose log-probability counts (never the first of a sequence)."""

    tokens: PackedTokens
    loss_mask: Bool[Tensor, " tokens"]
    num_loss_tokens: int
    """True entries of the mask, known on the host."""

    @property
    def loss_rows(self) -> Int[Tensor, " rows"]:
        """The tokens that count, in order."""
        return torch.nonzero_static(self.loss_mask, size=self.num_loss_tokens).flatten()

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.tokens.to(device), self.loss_mask.to(device), self.num_loss_tokens)


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where the next batch starts: sequence `cursor` of the order of `epoch`; where they are joined, token `cursor`."""

    epoch: int = 0
    cursor: int = 0


def epoch_order(shard: Shard, weights: tuple[float, ...], seed: int, epoch: int) -> np.ndarray:
    """Sequence numbers of one epoch in visiting order; the same for the same arguments, on any machine."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    parts, begin = [], 0
    for end, weight in zip(shard.source_ends, weights, strict=True):
        members = np.arange(begin, end)
        parts += [members] * int(weight)
        extra = round((weight % 1) * len(members))
        parts.append(rng.permutation(members)[:extra])
        begin = end
    return rng.permutation(np.concatenate(parts))


Stretch = tuple[np.ndarray, int, int]
"""(neighbouring sequences of the order, tokens of the first that are left out, tokens in all)."""


class Loader:
    """Endless batches over a shard. `state` may be read after any batch and set before any."""

    def __init__(
        self,
        shard: Shard,
        *,
        weights: tuple[float, ...],
        batch_tokens: int,
        seed: int,
        packing: Packing = "in_order",
        rank: int = 0,
        num_ranks: int = 1,
        state: LoaderState | None = None,
        row_tokens: int | None = None,
    ) -> None:
        """`row_tokens`: length of the rows that joined sequences are cut into; None is a batch's."""
        self.shard, self.weights, self.batch_tokens, self.seed = shard, weights, batch_tokens, seed
        self.packing, self.rank, self.num_ranks = packing, rank, num_ranks
        self.row_tokens = row_tokens or batch_tokens
        self.state = state or LoaderState()
        self._epoch = -1
        self._order = self._cumulative = self._bounds = np.zeros(0, "int64")

    @property
    def tokens_per_epoch(self) -> float:
        """Expected tokens of one epoch."""
        return float(np.dot(self.shard.source_tokens, self.weights))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """This rank's next batch, at most `batch_tokens` long, and the state moved past those of all ranks."""
        if self.packing == "joined":
            stretches = [self._next_stretches() for _ in range(self.num_ranks)]
            return _joined_batch(self.shard, stretches[self.rank], self.row_tokens)
        batches = [self._next_sequences() for _ in range(self.num_ranks)]
        return gather_batch(self.shard, batches[self.rank])

    def _next_sequences(self) -> np.ndarray:
        parts, budget = [], self.batch_tokens
        epoch, cursor = self.state.epoch, self.state.cursor
        while True:
            self._load_epoch(epoch)
            if self.packing == "best_fit":
                end = int(self._bounds[np.searchsorted(self._bounds, cursor, side="right")])
                self.state = LoaderState(epoch, end) if end < len(self._order) else LoaderState(epoch + 1)
                return self._order[cursor:end]
            end = fill(self._cumulative, cursor, budget)
            parts.append(self._order[cursor:end])
            budget -= int(self._cumulative[end] - self._cumulative[cursor])
            if end < len(self._order):
                break
            epoch, cursor = epoch + 1, 0
            end = 0
        self.state = LoaderState(epoch, end)
        return np.concatenate(parts)

    def _next_stretches(self) -> list[Stretch]:
        """The next `batch_tokens` of the joined order; more than one stretch where epochs meet."""
        found, left = [], self.batch_tokens
        while left:
            epoch, begin = self.state.epoch, self.state.cursor
            self._load_epoch(epoch)
            end = min(begin + left, int(self._cumulative[-1]))
            first = int(np.searchsorted(self._cumulative, begin, side="right")) - 1
            last = int(np.searchsorted(self._cumulative, end, side="left"))
            found.append((self._order[first:last], begin - int(self._cumulative[first]), end - begin))
            left -= end - begin
            self.state = LoaderState(epoch, end) if end < self._cumulative[-1] else LoaderState(epoch + 1)
        return found

    def _load_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._order = epoch_order(self.shard, self.weights, self.seed, epoch)
        lengths = self.shard.lengths[self._order]
        if len(lengths) == 0 or (lengths.max() > self.batch_tokens and self.packing != "joined"):
            raise ValueError(
                f"data: epoch {epoch} has {len(lengths)} sequences of up to {lengths.max(initial=0)} tokens, "
                f"batch_tokens = {self.batch_tokens}; raise batch_tokens or the source weights {self.weights}"
            )
        if self.packing == "best_fit":
            order, self._bounds = best_fit(lengths, self.batch_tokens)
            self._order = self._order[order]
        self._cumulative = np.concatenate([[0], np.cumsum(lengths)])
        self._epoch = epoch


def validation_batches(shard: Shard, *, batch_tokens: int, max_tokens: int) -> Iterator[Batch]:
    """All sequences of a shard once, in a fixed mixed order, until `max_tokens` are reached."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(shard.num_sequences)
    cumulative = np.concatenate([[0], np.cumsum(shard.lengths[order])])
    cursor = 0
    while cursor < len(order) and cumulative[cursor] < max_tokens:
        end = fill(cumulative, cursor, batch_tokens)
        yield gather_batch(shard, order[cursor:end])
        cursor = end


def gather_batch(shard: Shard, sequences: np.ndarray) -> Batch:
    """The given sequences of a shard, end to end."""
    lengths = shard.lengths[sequences]
    rows = gather_rows(shard.starts[sequences], lengths)
    mask = np.ones(len(rows), bool) if shard.mask is None else shard.mask[rows].astype(bool)
    mask[np.cumsum(lengths) - lengths] = False  # where a long text was cut nothing else keeps it from being predicted
    tokens = pack_arrays(shard.tokens[rows].astype("int64"), lengths)
    return Batch(tokens, torch.from_numpy(mask), int(mask.sum()))


def _joined_batch(shard: Shard, stretches: list[Stretch], row_tokens: int) -> Batch:
    """Rows of one length, the last may be shorter. The first token of a row, and of a sequence, does not count."""
    rows, firsts = [], []
    for sequences, skipped, count in stretches:
        lengths = shard.lengths[sequences]
        kept = slice(skipped, skipped + count)
        rows.append(gather_rows(shard.starts[sequences], lengths)[kept])
        first = np.zeros(int(lengths.sum()), bool)
        first[np.cumsum(lengths) - lengths] = True
        firsts.append(first[kept])
    places = np.concatenate(rows)
    mask = np.ones(len(places), bool) if shard.mask is None else shard.mask[places].astype(bool)
    mask &= ~np.concatenate(firsts)
    mask[::row_tokens] = False
    cut = np.diff([*range(0, len(places), row_tokens), len(places)])
    tokens = pack_arrays(shard.tokens[places].astype("int64"), cut)
    return Batch(tokens, torch.from_numpy(mask), int(mask.sum()))
