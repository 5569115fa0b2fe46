"""Progressive cache pruning: in long contexts every layer keeps a budget of rows per sequence, deeper layers fewer.

An option that is off by default, for latent attention. It is an approximation, and no part of DeepSeek's releases: V2
and V3 keep every latent, and the sparse attention of V3.2 selects rows per query but drops none.

Which rows stay is the heavy-hitter rule of H2O (arXiv 2306.14048): the newest `recent` and, of the others, those with
the largest *attention mass*, the attention that a row has received so far, summed over queries and averaged over heads.
H2O's accounts are per head; here all heads share one latent row, so they share its account. Budgets in a straight line
from the first layer to the last follow PyramidKV (arXiv 2406.02069), which saw attention narrow with depth.

Layers are cut back to their budgets where a sequence's length reaches a multiple of `slack`, and the scheduler ends
every run of tokens there at the latest. So what a token sees depends on its own sequence alone, not on how prefill was
chunked, on the company in the batch, or on having been preempted and recomputed.

Kept rows are compacted: in layer l the first length - dropped[l] slots of a sequence's block list hold its rows, in the
order of their positions, and new rows follow. The rotary position is inside a row, so moving it changes nothing, and
attention reads only what is kept. Blocks span all layers; a sequence never needs more than `PruneConfig.most_rows`.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.config import PruneConfig
from kogia.engine.inputs import Upload
from kogia.engine.sequences import SequenceTable
from kogia.engine.step import StepPlan
from kogia.engine.views import TokenRuns
from kogia.model.cache import PagedCache, StepCache
from kogia.ops.attention import cached_attention
from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.mass import attention_mass
from kogia.ops.segments import Segments


class Pruner:
    """Knows which rows each layer still holds of the running sequences, and drops some behind a step.

    It is a `CacheView` whose layers differ, and a limit on the runs of tokens that the scheduler plans.
    """

    def __init__(self, config: PruneConfig, cache: PagedCache, max_sequences: int) -> None:
        assert isinstance(cache.row, LatentRow), "check_engine has seen to it"
        self.config, self.cache = config, cache
        num_layers, num_slots = cache.rows.shape[:2]
        self.budgets = np.linspace(config.first_budget, config.last_budget, num_layers).round().astype(np.int64)
        self.mass = torch.zeros(num_layers, num_slots, dtype=torch.float32, device=cache.rows.device)
        """Attention that each row of the cache has received."""
        self.dropped = np.zeros((num_layers, max_sequences), dtype=np.int64)
        """Rows that each layer no longer has of each row of the table."""

    def limits(self) -> dict[str, Any]:
        """What the scheduler must keep to, as its keyword arguments."""
        return {"run_limit": self.run_limit, "most_cache_rows": self.config.most_rows}

    def run_limit(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """No run goes past the position where pruning is next due, so that the cuts do not depend on the runs."""
        slack = self.config.slack
        return np.maximum((starts // slack + 1) * slack, self.config.first_cut) - starts

    def put(self, upload: Upload, table: SequenceTable, runs: TokenRuns) -> None:
        self.dropped[:, runs.seq_rows[runs.starts == 0]] = 0  # new, or to be recomputed
        contexts = runs.starts + runs.counts - self.dropped[:, runs.seq_rows]
        num_blocks = -(-int(contexts.max()) // self.cache.block_size)
        upload.put("slots", self._slots(table, runs.rows, runs.positions - self.dropped[:, runs.rows]))
        upload.put("block_tables", table.blocks[runs.seq_rows, :num_blocks])
        upload.put("context_lens", contexts)

    def step_cache(self, upload: Upload, runs: TokenRuns) -> StepCache:
        self.mass.scatter_(1, upload["slots"], 0.0)
        contexts = runs.starts + runs.counts - self.dropped[:, runs.seq_rows]
        lens, slots, tables = upload["context_lens"], upload["slots"], upload["block_tables"]
        return StepCache(
            tuple(
                LayerCache(
                    *(rows, slots[i], tables, lens[i], contexts[i], self.cache.block_size, self.cache.row),
                    attend=partial(_attend_and_count, mass=self.mass[i]),
                )
                for i, rows in enumerate(self.cache.rows)
            )
        )

    def drafting(self, block_tables: Tensor, positions: Tensor, num_slots: Tensor, contexts: NDArray) -> StepCache:
        raise AssertionError("EngineConfig allows no drafts beside pruning")

    def prune(self, table: SequenceTable, plan: StepPlan) -> int:
        """Behind a step that was launched: cut back every layer of its sequences that have come to a cut.

        It depends on lengths alone, so nothing waits, and a step planned while this one is in flight finds the rows
        where they will be. Returns how many rows were dropped.
        """
        ends = plan.starts + plan.counts
        due = ends % self.config.slack == 0
        rows = plan.rows[due]
        held = ends[due] - self.dropped[:, rows]
        excess = np.maximum(held - self.budgets[:, None], 0)
        if not excess.any():
            return 0
        slots = self._tensor(self._slots(table, rows[:, None], np.arange(held.max())))
        for layer in np.flatnonzero(excess.any(axis=1)).tolist():
            over = np.flatnonzero(excess[layer])
            longest = int(held[layer, over].max())
            self._compact(layer, slots[self._tensor(over), :longest], self._tensor(held[layer, over]))
        self.dropped[:, rows] += excess
        return int(excess.sum())

    def _compact(self, layer: int, slots: Int[Tensor, "seqs rows"], held: Int[Tensor, " seqs"]) -> None:
        """Move the rows that stay to the front of each sequence's `slots`, of which it holds the first `held`."""
        budget, mass, rows = int(self.budgets[layer]), self.mass[layer], self.cache.rows[layer]
        age = held[:, None] - 1 - torch.arange(slots.shape[1], device=slots.device)
        worth = mass[slots].masked_fill(age < self.config.recent, float("inf")).masked_fill(age < 0, float("-inf"))
        stay = worth.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(dim=1).values
        source, target = slots.gather(1, stay), slots[:, :budget]
        rows[target], mass[target] = rows[source], mass[source]  # copied before any is overwritten

    def _slots(self, table: SequenceTable, rows: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slot of the `index`-th row that a sequence holds in a layer."""
        size = self.cache.block_size
        return table.blocks[rows, index // size] * size + index % size

    def _tensor(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.cache.rows.device)


def _attend_and_count(q: Tensor, cache: LayerCache, segments: Segments, *, mass: Tensor, **options: Any) -> Tensor:
    """`paged_attention` that also notes how much attention each row gets."""
    attention_mass(q, cache, segments, mass, **options)
    return cached_attention(q, cache, segments, **options)
