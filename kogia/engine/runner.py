"""One step on the device: plan -> packed tokens and cache slots -> model -> samples and drafts."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.pruning import Pruner
from kogia.engine.scheduler import StepPlan
from kogia.engine.sequences import SequenceTable
from kogia.model.cache import PagedCache, StepCache
from kogia.model.packed import PackedTokens
from kogia.model.transformer import Transformer
from kogia.ops.sample import counter_uniforms, sample


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the model made of a plan."""

    tokens: NDArray[np.int64]
    """Samples of all sequences end to end, `plan.num_samples` of each."""
    logprobs: NDArray[np.float32]
    """Of the samples, unfiltered, at the sequence's temperature."""
    batch: PackedTokens
    cache: StepCache
    hidden: Tensor
    """[tokens, dim] residual stream of every row, which drafting starts from."""
    rows: NDArray[np.int64]
    """Table row of every token that ran."""
    positions: NDArray[np.int64]


class Runner:
    """Runs plans over one model and its paged cache."""

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        table: SequenceTable,
        rank_by_context: tuple[tuple[int, int], ...] = (),
        pruner: Pruner | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.table = table
        self.pruner = pruner
        self.device = model.device
        # one rank for all: the rows are that narrow, and nothing is left to choose
        self._rank_from = np.array(rank_by_context, dtype=np.int64) if len(rank_by_context) > 1 else None

    def run(self, plan: StepPlan) -> StepResult:
        """Forward every planned token, then sample where the plan asks for it; logits exist for those rows only."""
        rows, positions = _flatten(plan)
        batch, step = self._inputs(plan.rows, plan.starts, plan.counts, rows, positions)
        hidden = self.model(batch, step)
        tokens, logprobs = self._sample(plan, hidden)
        return StepResult(tokens, logprobs, batch, step, hidden, rows, positions)

    def draft(self, result: StepResult, plan: StepPlan, num_drafts: int) -> None:
        """Write MTP cache rows for this step's tokens, and up to `num_drafts` guesses behind each sampled sequence.

        Runs after `accept`. Row i joins hidden[i] with the token after it, known by now for every accepted row;
        rejected rows get a stale one, and are overwritten when their positions run again. The last MTP row of a
        prefix block shared by two sequences holds the next token of whoever wrote it first: that can cost a draft,
        never a wrong token, since every draft is verified.
        """
        table = self.table
        next_ids = self._tensor(table.token_ids[result.rows, result.positions + 1])
        hidden = self.model.mtp_hidden(0, result.hidden, next_ids, result.batch, result.cache)
        room = np.where(plan.num_samples > 0, table.max_length[plan.rows] - table.num_known[plan.rows] - 1, 0)
        wanted = np.clip(room, 0, num_drafts)
        chosen = np.flatnonzero(wanted > 0)
        last = np.cumsum(plan.counts)[chosen] - plan.counts[chosen]
        last += table.num_computed[plan.rows[chosen]] - 1 - plan.starts[chosen]
        rows, hidden = plan.rows[chosen], hidden[self._tensor(last)]
        table.num_drafts[rows] = wanted[chosen]
        index = 0
        while len(rows):
            drafts = self.model.mtp_logits(0, hidden).argmax(-1)
            table.token_ids[rows, table.num_known[rows] + index] = drafts.cpu().numpy()
            more = np.flatnonzero(wanted[chosen] > index + 1)
            chosen, rows, kept = chosen[more], rows[more], self._tensor(more)
            if len(rows):
                hidden = self._chain(rows, index, hidden[kept], drafts[kept])
            index += 1

    def _chain(self, rows: NDArray[np.int64], index: int, hidden: Tensor, drafts: Tensor) -> Tensor:
        """One more pass of the module, a position further: its own output and draft stand in for the main model's."""
        positions = self.table.num_known[rows] - 1 + index
        batch, step = self._inputs(rows, positions, np.ones_like(rows), rows, positions)
        return self.model.mtp_hidden(0, hidden, drafts, batch, step)

    def _inputs(
        self,
        seq_rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> tuple[PackedTokens, StepCache]:
        table, size = self.table, self.cache.block_size
        cu_seqlens = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        batch = PackedTokens(
            self._tensor(table.token_ids[rows, positions]),
            self._tensor(positions),
            self._tensor(cu_seqlens),
            int(counts.max()),
        )
        ranks = None
        if self._rank_from is not None:  # a token at position p has a context of p + 1
            tokens, values = self._rank_from.T
            ranks = self._tensor(values[np.searchsorted(tokens, positions + 1, side="right") - 1])
        if self.pruner is not None:
            return batch, self.pruner.step_cache(seq_rows, starts, counts, rows, positions, ranks)
        context_lens = starts + counts
        longest = int(context_lens.max())
        slots = self._tensor(table.blocks[rows, positions // size] * size + positions % size)
        block_tables = self._tensor(table.blocks[seq_rows, : -(-longest // size)])
        return batch, StepCache(self.cache, slots, block_tables, self._tensor(context_lens), longest, ranks)

    def _sample(self, plan: StepPlan, hidden: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        samples = plan.num_samples
        if not samples.any():
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        table, total = self.table, int(samples.sum())
        rows = np.repeat(plan.rows, samples)
        # Sample j of a sequence comes from row count - num_samples + j of its run.
        before = np.cumsum(samples) - samples
        index = np.arange(total) + np.repeat(np.cumsum(plan.counts) - samples - before, samples)
        positions = np.arange(total) - np.repeat(before, samples) + table.num_known[rows]
        logits = self.model.logits(hidden if total == plan.num_tokens else hidden[self._tensor(index)])
        temperature, top_k, top_p, min_p = (x[rows] for x in (table.temperature, table.top_k, table.top_p, table.min_p))
        uniforms = None
        if temperature.any():
            uniforms = counter_uniforms(self._tensor(table.seed[rows]), self._tensor(positions))
        tokens, logprobs = sample(
            logits,
            self._tensor(temperature),
            uniforms,
            self._tensor(top_k) if top_k.any() else None,
            self._tensor(top_p) if (top_p < 1).any() else None,
            self._tensor(min_p) if min_p.any() else None,
        )
        values = logprobs.cpu().numpy()
        if not np.isfinite(values).all():
            raise FloatingPointError("the model produced NaN or infinite logits: its weights or dtype overflow")
        return tokens.cpu().numpy(), values

    def _tensor(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _flatten(plan: StepPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(table row, position) of every token that runs."""
    first = np.cumsum(plan.counts) - plan.counts
    positions = np.arange(plan.num_tokens) + np.repeat(plan.starts - first, plan.counts)
    return np.repeat(plan.rows, plan.counts), positions
