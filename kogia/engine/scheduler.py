"""Which tokens run in the next step.

One budget of tokens per step covers prefill chunks, decodes and draft verification alike: each is a run of tokens after
the computed ones of a sequence. Running sequences come first, oldest first, then waiting ones in order of arrival. When
blocks run out, the youngest running sequence gives its blocks back and is recomputed later; it keeps its tokens.

A full block of known tokens enters the prefix index as soon as the chunk that fills it is scheduled, not when it has
run: every layer writes all new rows of a step before its attention reads any, so a sibling may read them in that step.
"""

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kogia.engine.blocks import BlockPool, hash_block
from kogia.engine.config import EngineConfig
from kogia.engine.request import Request
from kogia.engine.sequences import SequenceTable


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The runs of tokens of one step, one entry per sequence."""

    rows: NDArray[np.int64]
    """Rows of the sequence table, oldest first."""
    starts: NDArray[np.int64]
    """Position of the first token that runs."""
    counts: NDArray[np.int64]
    """Tokens that run, drafts included."""
    num_samples: NDArray[np.int64]
    """Tokens to sample, from the last rows of the run: 0 for an unfinished prefill, else 1 + drafts verified."""

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


class Scheduler:
    """Owns the waiting queue, the running order and every block."""

    def __init__(self, config: EngineConfig, num_blocks: int, eos_ids: Sequence[int]) -> None:
        self.config = config
        self.eos_ids = frozenset(eos_ids)
        self.pool = BlockPool(num_blocks)
        most_rows = sys.maxsize if config.prune is None else config.prune.most_rows
        self.table = SequenceTable(config.max_sequences, config.block_size, most_rows)
        self.waiting: deque[Request] = deque()
        self.running = np.empty(0, dtype=np.int64)
        """Table rows in order of admission."""
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self.lookahead = max(0, config.num_draft_tokens - 1)
        """A chain of k drafts also writes k - 1 rows of its own past the tokens that run."""

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if the whole pool could not hold it."""
        capacity = self.pool.num_blocks * self.config.block_size
        rows = self.table.cache_rows_of(request)
        if rows > capacity:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens with max_tokens = {request.params.max_tokens} may need "
                f"{rows} cached tokens, but the whole cache holds {capacity}: lower max_tokens, or "
                "raise engine.num_blocks or engine.cache_memory_bytes"
            )
        self.waiting.append(request)

    def plan(self) -> StepPlan | None:
        """Choose this step's tokens and give them blocks; None when there is nothing to run."""
        preemptions = self.num_preemptions
        granted = self._grant_running()
        self._name_full_blocks(self.running, granted)
        if self.num_preemptions == preemptions:  # else an admission would only be thrown out again
            granted = self._admit(granted)
        chosen = granted > 0
        if not chosen.any():
            assert not self.num_unfinished, "nothing fits although sequences are unfinished"
            return None
        rows, counts = self.running[chosen], granted[chosen]
        starts = self.table.num_computed[rows]
        num_samples = np.maximum(starts + counts - self.table.num_known[rows] + 1, 0)
        return StepPlan(rows, starts, counts, num_samples)

    def finish(self, row: int) -> Request:
        """Take a running sequence out and release its blocks."""
        self.running = self.running[self.running != row]
        self.pool.release(self.table.row_blocks(row))
        return self.table.close(row)

    def abort(self, request_id: int) -> Request | None:
        """Take out a waiting or running request; None if there is none of that id."""
        for request in self.waiting:
            if request.id == request_id:
                self.waiting.remove(request)
                return request
        for row in self.running.tolist():
            request = self.table.requests[row]
            if request is not None and request.id == request_id:
                return self.finish(row)
        return None

    def recompute_all(self) -> None:
        """Send every running sequence back to the queue and forget all prefixes: no cache row is valid any more."""
        while len(self.running):
            self._preempt_last()
        self.pool.flush()

    def take_preemptions(self) -> int:
        """Preemptions since the last call."""
        count, self.num_preemptions = self.num_preemptions, 0
        return count

    def take_prefix_hit_tokens(self) -> int:
        """Prompt tokens found in the prefix cache since the last call."""
        count, self.num_prefix_hit_tokens = self.num_prefix_hit_tokens, 0
        return count

    def _grant_running(self) -> NDArray[np.int64]:
        """Tokens granted to each running row, with the blocks for them; preempts until the blocks suffice."""
        table = self.table
        while True:
            rows = self.running
            want = table.num_known[rows] - table.num_computed[rows] + table.num_drafts[rows]
            want = self._until_cut(table.num_computed[rows], want)
            granted = np.clip(self.config.max_batch_tokens - (np.cumsum(want) - want), 0, want)
            missing = self._blocks_to_cover(rows, granted) - table.num_blocks[rows]
            if int(missing.clip(0).sum()) <= self.pool.num_free:
                break
            self.num_preemptions += 1
            self._preempt_last()
        for index in np.flatnonzero(missing > 0).tolist():
            table.append_blocks(int(rows[index]), self.pool.allocate(int(missing[index])))
        return granted

    def _until_cut(self, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """No run goes past the position where pruning is next due, so that the cuts do not depend on the runs."""
        prune = self.config.prune
        if prune is None:
            return counts
        return np.minimum(counts, np.maximum((starts // prune.slack + 1) * prune.slack, prune.first_cut) - starts)

    def _blocks_to_cover(self, rows: NDArray[np.int64], granted: NDArray[np.int64]) -> NDArray[np.int64]:
        table = self.table
        ends = table.num_computed[rows] + granted
        ahead = np.where((granted > 0) & (ends >= table.num_known[rows]), self.lookahead, 0)
        return -(-np.minimum(ends + ahead, table.max_cache_rows[rows]) // self.config.block_size)

    def _preempt_last(self) -> None:
        self.waiting.appendleft(self.finish(int(self.running[-1])))

    def _admit(self, granted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Start waiting requests while budget, rows and blocks last; returns `granted` with theirs appended."""
        budget = self.config.max_batch_tokens - int(granted.sum())
        rows, counts = [], []
        while self.waiting and budget > 0 and self.table.num_rows_free:
            # One spare block per running sequence: else the newcomer is preempted as soon as the others grow.
            most = budget if self.config.prune is None else min(budget, self.config.prune.first_cut)
            row = self._open(self.waiting[0], most, spare=len(self.running) + len(rows))
            if row is None:
                break
            self.waiting.popleft()
            count = min(most, int(self.table.num_known[row] - self.table.num_computed[row]))
            self._name_full_blocks(np.array([row]), np.array([count]))
            rows.append(row)
            counts.append(count)
            budget -= count
        if not rows:
            return granted
        self.running = np.concatenate([self.running, np.array(rows, dtype=np.int64)])
        return np.concatenate([granted, np.array(counts, dtype=np.int64)])

    def _open(self, request: Request, budget: int, *, spare: int) -> int | None:
        """Give a waiting request a row, its cached prefix and blocks for its first chunk; None if it does not fit."""
        shared = self._acquire_prefix(request)
        cached, known = len(shared) * self.config.block_size, len(request.token_ids)
        end = min(cached + budget, known)
        end = min(end + (self.lookahead if end == known else 0), self.table.cache_rows_of(request))
        missing = max(0, -(-end // self.config.block_size) - len(shared))
        if missing + spare > self.pool.num_free:
            self.pool.release(shared)
            return None
        stops = set(request.params.stop_token_ids) | (set() if request.params.ignore_eos else self.eos_ids)
        row = self.table.open(request, sorted(stops))
        self.table.append_blocks(row, shared + self.pool.allocate(missing))
        self.table.num_computed[row] = cached
        self.table.num_named[row] = len(shared)
        if request.num_cached_tokens is None:  # a prefix found again after preemption is not the caller's saving
            request.num_cached_tokens = cached
            self.num_prefix_hit_tokens += cached
        return row

    def _acquire_prefix(self, request: Request) -> list[int]:
        """Shares of the cached blocks that the request starts with, never all its tokens: the last one must run."""
        shared: list[int] = []
        if not self.config.prefix_cache:
            return shared
        for index in range((len(request.token_ids) - 1) // self.config.block_size):
            block = self.pool.acquire(self._block_name(request, request.token_ids, index))
            if block is None:
                break
            shared.append(block)
        return shared

    def _name_full_blocks(self, rows: NDArray[np.int64], granted: NDArray[np.int64]) -> None:
        """Enter blocks that this step fills with known tokens into the prefix index; drafts never count."""
        if not self.config.prefix_cache:
            return
        table = self.table
        full = np.minimum(table.num_computed[rows] + granted, table.num_known[rows]) // self.config.block_size
        for where in np.flatnonzero(full > table.num_named[rows]).tolist():
            row = int(rows[where])
            request = table.requests[row]
            assert request is not None
            for index in range(int(table.num_named[row]), int(full[where])):
                name = self._block_name(request, table.token_ids[row], index)
                self.pool.register(int(table.blocks[row, index]), name)
            table.num_named[row] = full[where]

    def _block_name(self, request: Request, token_ids: NDArray[np.int64], index: int) -> bytes:
        names, size = request.block_hashes, self.config.block_size
        while len(names) <= index:
            start = len(names) * size
            names.append(hash_block(names[-1] if names else b"", token_ids[start : start + size]))
        return names[index]
