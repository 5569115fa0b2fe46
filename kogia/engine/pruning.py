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

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.config import PruneConfig
from kogia.engine.scheduler import StepPlan
from kogia.engine.sequences import SequenceTable
from kogia.model.cache import PagedCache, StepCache


class Pruner:
    """Knows which rows each layer still holds of the running sequences, and drops some after a step."""

    def __init__(self, config: PruneConfig, cache: PagedCache, table: SequenceTable) -> None:
        self.config, self.cache, self.table = config, cache, table
        num_layers, num_slots = cache.rows.shape[:2]
        self.budgets = np.linspace(config.first_budget, config.last_budget, num_layers).round().astype(np.int64)
        self.mass = torch.zeros(num_layers, num_slots, dtype=torch.float32, device=cache.rows.device)
        """Attention that each row of the cache has received."""
        self.dropped = np.zeros((num_layers, len(table.requests)), dtype=np.int64)
        """Rows that each layer no longer has of each row of the table."""

    def step_cache(
        self,
        seq_rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        ranks: Tensor | None,
    ) -> StepCache:
        """What each layer sees when the sequences `seq_rows` run `counts` tokens from `starts`.

        `rows` and `positions` are the table row and position of every token.
        """
        self.dropped[:, seq_rows[starts == 0]] = 0  # new, or to be recomputed
        contexts = starts + counts - self.dropped[:, seq_rows]
        slots = self._tensor(self._slots(rows, positions - self.dropped[:, rows]))
        self.mass.scatter_(1, slots, 0.0)
        longest: list[int] = contexts.max(axis=1).tolist()
        tables = self._tensor(self.table.blocks[seq_rows, : -(-max(longest) // self.cache.block_size)])
        lens = self._tensor(contexts)
        layers = [
            StepCache(self.cache, slots[layer], tables, lens[layer], longest[layer], ranks, self.mass[layer])
            for layer in range(len(longest))
        ]
        return replace(layers[0], layers=tuple(layers))

    def prune(self, plan: StepPlan) -> int:
        """Cut back every layer of the planned sequences that have come to a cut; returns how many rows were dropped."""
        ends = plan.starts + plan.counts
        due = ends % self.config.slack == 0
        rows = plan.rows[due]
        held = ends[due] - self.dropped[:, rows]
        excess = np.maximum(held - self.budgets[:, None], 0)
        if not excess.any():
            return 0
        slots = self._tensor(self._slots(rows[:, None], np.arange(held.max())))
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

    def _slots(self, rows: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slot of the `index`-th row that a sequence holds in a layer."""
        size = self.cache.block_size
        return self.table.blocks[rows, index // size] * size + index % size

    def _tensor(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.cache.rows.device)
