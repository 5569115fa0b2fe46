"""How the layers of one step see the cache, as the published models do: every layer the same rows, all of them.

What changes or watches that (kogia.engine.pruning, kogia.engine.ranks) is a view of its own.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.inputs import Upload
from kogia.engine.sequences import SequenceTable
from kogia.engine.step import StepPlan
from kogia.model.cache import PagedCache, StepCache
from kogia.ops.drafts import next_slots


@dataclass(frozen=True, slots=True, eq=False)
class TokenRuns:
    """The tokens of a plan, one by one."""

    seq_rows: NDArray[np.int64]
    """Table row of each sequence."""
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    rows: NDArray[np.int64]
    """Table row of every token."""
    positions: NDArray[np.int64]


def token_runs(plan: StepPlan) -> TokenRuns:
    if plan.only_decodes:
        return TokenRuns(plan.rows, plan.starts, plan.counts, plan.rows, plan.starts)
    first = np.cumsum(plan.counts) - plan.counts
    positions = np.arange(plan.num_tokens) + np.repeat(plan.starts - first, plan.counts)
    return TokenRuns(plan.rows, plan.starts, plan.counts, np.repeat(plan.rows, plan.counts), positions)


@runtime_checkable
class CacheView(Protocol):
    def put(self, upload: Upload, table: SequenceTable, runs: TokenRuns) -> None:
        """Add to the step's upload what `step_cache` will need."""
        ...

    def step_cache(self, upload: Upload, runs: TokenRuns) -> StepCache:
        """The view of every layer, from what was sent. The runner sends "positions" as well."""
        ...

    def drafting(
        self,
        block_tables: Int[Tensor, "seqs blocks"],
        positions: Int[Tensor, " seqs"],
        num_slots: Int[Tensor, " seqs"],
        contexts: NDArray[np.int64],
    ) -> StepCache:
        """One more token of each sequence at `positions`, which only the device knows; `contexts` bound them.

        A sequence has blocks for `num_slots` rows: what goes beyond is written to nobody's slot.
        """
        ...


class WholeCache:
    """Every layer sees all rows of a sequence."""

    def __init__(self, cache: PagedCache, lookahead: int = 0) -> None:
        """`lookahead` rows past a step's own may be written by drafts."""
        self.cache, self.lookahead = cache, lookahead

    def put(self, upload: Upload, table: SequenceTable, runs: TokenRuns) -> None:
        for name, array in zip(("slots", "context_lens", "block_tables"), self.numbers(table, runs), strict=True):
            upload.put(name, array)

    def numbers(
        self, table: SequenceTable, runs: TokenRuns
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Slots of the new rows, context lengths and block tables, as `LayerCache` has them."""
        size, contexts = self.cache.block_size, runs.starts + runs.counts
        slots = table.blocks[runs.rows, runs.positions // size] * size + runs.positions % size
        num_blocks = -(-(int(contexts.max()) + self.lookahead) // size)
        return slots, contexts, table.blocks[runs.seq_rows, :num_blocks]

    def step_cache(self, upload: Upload, runs: TokenRuns) -> StepCache:
        tables, lens = upload["block_tables"], upload["context_lens"]
        return self.cache.step(upload["slots"], tables, lens, runs.starts + runs.counts)

    def drafting(
        self,
        block_tables: Int[Tensor, "seqs blocks"],
        positions: Int[Tensor, " seqs"],
        num_slots: Int[Tensor, " seqs"],
        contexts: NDArray[np.int64],
    ) -> StepCache:
        spare = self.cache.spare_slot
        slots, lens = next_slots(block_tables, positions, num_slots, self.cache.block_size, spare)
        return self.cache.step(slots, block_tables, lens, contexts)
