"""Which tokens run in the next step, and what a step that has run did to its sequences.

One budget of tokens per step covers prefill chunks, decodes and draft verification alike: each is a run of tokens after
the computed ones of a sequence. Running sequences come first, oldest first, then waiting ones in order of arrival; of
both, those of a lower `priority` go before all others. When blocks run out, the last running sequence gives its blocks
back and is recomputed later; it keeps its tokens. So it does where a waiting request of a lower `priority` finds no row
or no blocks, if that one can be started then.

A full block of known tokens enters the prefix index as soon as the chunk that fills it is scheduled, not when it has
run: every layer writes all new rows of a step before its attention reads any, so a sibling may read them in that step.

    plan     chooses tokens and blocks; from then on the step is in flight
    settle   writes what it sampled, ends sequences, gives back blocks
    propose  writes the guesses that the next step verifies

These three, and `abort`, are all that write the state of sequences. A step may be planned while another is in flight:
it runs on the token that the other samples, whose value only the device knows. With drafts the device alone knows where
it starts as well, so `num_computed` is then the highest that it can be until the flight has settled. What cannot be
planned so makes `plan` return None until then: rules that must know a token to say what may follow it; preemption, as a
row is given up only when nothing in flight runs it; and with drafts whatever is not recorded (`drafts_ahead`).
"""

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kogia.engine.blocks import BlockPool, hash_block
from kogia.engine.config import EngineConfig
from kogia.engine.request import FinishReason, Request, TopLogprobs, num_top
from kogia.engine.sequences import SequenceTable
from kogia.engine.speculative import count_new
from kogia.engine.step import StepPlan, StepResult

RunLimit = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Position from which a run starts -> most tokens that it may have."""


class Outcome(NamedTuple):
    """What a step did to one request: its end, or news for its listener."""

    request: Request
    token_ids: list[int]
    """Those that had not been reported."""
    logprobs: list[float]
    finish_reason: FinishReason | None
    """None while it goes on."""
    ends_in_stop_token: bool = False
    top_logprobs: list[TopLogprobs] | None = None
    """The likeliest tokens in place of each new one, where they were asked for."""


NO_LIMIT = sys.maxsize


class TokenBudgets(NamedTuple):
    """Tokens of a step at most."""

    prompts: int
    """Where no sequence decodes."""
    mixed: int
    """Where one does: its next token comes when the prompts beside it are done."""

    @classmethod
    def of(cls, config: EngineConfig, *, is_gpu: bool) -> "TokenBudgets":
        """As configured, the same for both; else those of the device. What the host does for a step with prompts takes
        a GPU as long as some thousand tokens, and is to be spread over more than those."""
        if config.max_batch_tokens is not None:
            return cls(config.max_batch_tokens, config.max_batch_tokens)
        return cls(8192 if is_gpu else 2048, 2048)


class Scheduler:
    """Owns the waiting queue, the running order and every block."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        eos_ids: Sequence[int],
        *,
        is_gpu: bool = False,
        run_limit: RunLimit | None = None,
        most_cache_rows: int = sys.maxsize,
    ) -> None:
        """No sequence will hold more than `most_cache_rows` cache rows at once."""
        self.config = config
        self.eos_ids = frozenset(eos_ids)
        self.pool = BlockPool(num_blocks)
        self.table = SequenceTable(
            config.max_sequences, config.block_size, most_cache_rows, spare_columns=1 + config.num_draft_tokens
        )
        self.waiting: deque[Request] = deque()
        self.running = np.empty(0, dtype=np.int64)
        """Table rows in order of priority, then of admission."""
        self.num_flights = 0
        """Steps planned and not yet settled."""
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self.num_drafted = 0
        """Drafts that were verified."""
        self.num_proposals = 0
        """Sequences' steps that verified any."""
        self.lookahead = max(0, config.num_draft_tokens - 1)
        """A chain of k drafts also writes k - 1 rows of its own past the tokens that run."""
        self.budgets = TokenBudgets.of(config, is_gpu=is_gpu)
        self.limit = NO_LIMIT
        """Tokens of a step at most, whatever the budgets: set after a step that did not fit into memory."""
        self.budget = self.budgets.prompts
        """Tokens at most of the step that is planned."""
        self._num_admitted = 0
        """Requests that the last plan started."""
        self._preempted = sys.maxsize
        """Lowest priority that the last plan preempted: it starts only those before it, else they would take turns."""
        self.num_drafts = config.num_draft_tokens
        """Drafts per sequence of the steps that are planned now; see `draft`."""
        self.drafts_ahead: Callable[[NDArray[np.int64]], bool] = lambda rows: False
        """Whether a step of drafts of these rows may be planned while another is in flight: the device finds where it
        starts."""
        self._run_limit = run_limit

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def longest(self) -> int:
        """Most tokens of a sequence that the whole pool can hold: its last one is never run."""
        capacity = self.pool.num_blocks * self.config.block_size
        return sys.maxsize if self.table.most_cache_rows <= capacity else capacity + 1

    def check(self, request: Request) -> None:
        """ValueError if the whole pool could not hold it."""
        capacity = self.pool.num_blocks * self.config.block_size
        rows = self.table.cache_rows_of(request)
        if rows > capacity:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens with max_tokens = {request.params.max_tokens} may need "
                f"{rows} cached tokens, but the whole cache holds {capacity}: lower max_tokens, or "
                "raise engine.num_blocks or engine.cache_memory_bytes"
            )

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if the whole pool could not hold it."""
        self.check(request)
        self._wait(request)

    def _wait(self, request: Request) -> None:
        """Queue behind those of its priority that came earlier, and before those of a later one."""
        if not self.waiting or _turn(self.waiting[-1]) < _turn(request):
            self.waiting.append(request)
        else:
            self.waiting.insert(bisect_left(self.waiting, _turn(request), key=_turn), request)

    # planning ---------------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Choose the next step's tokens and give them blocks; None when there is nothing to run, or not yet."""
        if self.num_flights and (self._waits_for_tokens() or (self.num_drafts and not self._can_draft_ahead())):
            return None
        if self._num_admitted:
            self.running = self.running[np.argsort(self.table.priority[self.running], kind="stable")]
        self._preempted, self._num_admitted = sys.maxsize, 0
        granted = self._grant_running()
        if granted is None:
            return None
        self._name_full_blocks(self.running, granted)
        granted = self._admit(granted)
        chosen = granted.nonzero()[0]
        if not len(chosen):
            assert self.num_flights or not self.num_unfinished, "nothing fits although sequences are unfinished"
            return None
        if len(chosen) == len(granted):  # the very array: what is gathered of its rows serves the next step too
            return self._depart(self.running, granted)
        return self._depart(self.running[chosen], granted[chosen])

    def _waits_for_tokens(self) -> bool:
        """Whether a sequence has rules that must know the token which a step in flight samples for it."""
        table, rows = self.table, self.running
        return table.settings(rows).needs_tokens and bool(
            (table.needs_tokens[rows] & (table.num_pending[rows] > 0)).any()
        )

    def draft(self, num_drafts: int) -> None:
        """From the next step on, verify so many drafts per sequence, `config.num_draft_tokens` or 0. Nothing may be in
        flight."""
        assert not self.num_flights, "the number of drafts changes while a step is in flight"
        if not num_drafts:
            self.table.num_drafts[:] = 0
        self.num_drafts = num_drafts

    def _can_draft_ahead(self) -> bool:
        """Nothing but decodes would run: sequences of the flight, or others that are one token behind."""
        table, rows = self.table, self.running
        decodes = (table.num_pending[rows] > 0) | (table.num_known[rows] - table.num_computed[rows] == 1)
        may_join = bool(self.waiting) and table.num_rows_free > 0
        return not may_join and bool(decodes.all()) and self.drafts_ahead(rows)

    def _depart(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> StepPlan:
        table = self.table
        starts, pending = table.num_computed[rows], table.num_pending[rows]
        ends, is_pending = starts + counts, pending > 0
        num_samples = np.maximum(ends - table.num_known[rows] - pending + 1, 0)
        if self.num_drafts and self.num_flights:  # where those start is not known: all that they run is sampled behind
            num_samples = np.where(is_pending, counts, num_samples)
        table.num_computed[rows] = ends
        table.num_pending[rows] = pending + (num_samples > 0)
        table.num_flights[rows] += 1
        table.is_proved[rows] = False
        self.num_flights += 1
        return StepPlan(rows, starts, counts, num_samples, is_pending)

    def _grant_running(self) -> NDArray[np.int64] | None:
        """Tokens granted to each running row, with the blocks for them; preempts until the blocks suffice."""
        table = self.table
        while True:
            rows, want = self.running, self._wanted(self.running)
            self.budget = self._budget(want)
            set_aside = self._set_aside()
            granted = self._within_budget(rows, want, set_aside)
            missing = self._missing_blocks(rows, granted)
            count = sum(missing.values())
            if count <= self.pool.num_free and not (set_aside and self._crowds_out(granted, count)):
                break
            if self.num_flights:
                return None
            self.num_preemptions += 1
            self._preempted = min(self._preempted, int(table.priority[self.running[-1]]))
            self._preempt_last()
        for row, count in missing.items():
            table.append_blocks(row, self.pool.allocate(count))
        return granted

    def _set_aside(self) -> int:
        """Tokens of the budget kept for the first waiting request, whose priority is lower than that of some that run
        and would make room for it; 0 where it cannot be started by that."""
        table, rows = self.table, self.running
        if not self.waiting or not len(rows) or table.priority[rows[-1]] <= self.waiting[0].params.priority:
            return 0
        gives_way = table.priority[rows] > self.waiting[0].params.priority
        tokens = min(self.budget, len(self.waiting[0].token_ids))
        needed = self._free_blocks_for(self.waiting[0], tokens) + int((~gives_way).sum())
        return tokens if needed <= self.pool.num_free + int(table.num_blocks[rows[gives_way]].sum()) else 0

    def _crowds_out(self, granted: NDArray[np.int64], missing: int) -> bool:
        """Whether no row, or too few blocks, are left for the first waiting request once these are given out."""
        budget = self.budget - int(granted.sum())
        needed = self._free_blocks_for(self.waiting[0], budget) + len(granted) + missing
        return budget > 0 and (not self.table.num_rows_free or needed > self.pool.num_free)

    def _free_blocks_for(self, request: Request, budget: int) -> int:
        """Blocks that are free now and not when `request` has been started with so many tokens."""
        free = self.pool.num_free
        shared = self._acquire_prefix(request)
        revived = free - self.pool.num_free
        self.pool.release(shared)
        return revived + self._blocks_to_open(request, len(shared), budget)

    def _wanted(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each row that may run: those known or being sampled that have not, and drafts."""
        table, pending = self.table, self.table.num_pending[rows]
        least = table.num_known[rows] + pending
        want = least - table.num_computed[rows]
        if self.num_drafts:
            want += table.num_drafts[rows]
            if self.num_flights:
                want = np.where(pending > 0, 1 + self.num_drafts, want)
        want *= least < table.settings(rows).max_length
        if self._run_limit is not None:
            want = np.minimum(want, self._run_limit(table.num_computed[rows]))
        return want

    def _budget(self, want: NDArray[np.int64]) -> int:
        """Of a step beside running rows that want so many tokens: one that decodes wants its newest and drafts."""
        prompts, mixed = self.budgets
        decodes = mixed < prompts and bool(((want > 0) & (want <= 1 + self.num_drafts)).any())
        return min(self.limit, mixed if decodes else prompts)

    def _within_budget(self, rows: NDArray[np.int64], want: NDArray[np.int64], set_aside: int) -> NDArray[np.int64]:
        """The first rows get what they want, one of them the rest of the budget, the others nothing; `set_aside` of it
        are not for rows that come after the first waiting request."""
        if not set_aside and want.sum() <= self.budget:
            return want
        left = self.budget - (np.cumsum(want) - want)
        if set_aside:
            left -= np.where(self.table.priority[rows] > self.waiting[0].params.priority, set_aside, 0)
        return np.minimum(np.maximum(left, 0), want)

    def _missing_blocks(self, rows: NDArray[np.int64], granted: NDArray[np.int64]) -> dict[int, int]:
        """Row -> blocks that it has to be given, of those that have too few."""
        table, size = self.table, self.config.block_size
        ends = table.num_computed[rows] + granted
        if self.lookahead:
            ends += np.where((granted > 0) & (ends >= table.num_known[rows]), self.lookahead, 0)
        ends = np.minimum(ends, table.settings(rows).max_cache_rows)
        owned = table.num_blocks[rows]
        short = (ends > owned * size).nonzero()[0]
        if not len(short):
            return {}
        missing = -(-ends[short] // size) - owned[short]
        return dict(zip(rows[short].tolist(), missing.tolist(), strict=True))

    def _preempt_last(self) -> None:
        row = int(self.running[-1])
        self._wait(self.table.write_back(row))
        self.running = self.running[:-1]
        self._free(row)

    def _admit(self, granted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Start waiting requests while budget, rows and blocks last; returns `granted` with theirs appended."""
        if not self._may_admit():
            return granted
        budget = self.budget - int(granted.sum())
        rows, counts = [], []
        while self._may_admit() and budget > 0:
            most = budget if self._run_limit is None else min(budget, int(self._run_limit(np.zeros(1, np.int64))[0]))
            # One spare block per running sequence: else the newcomer is preempted as soon as the others grow.
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
        self._num_admitted = len(rows)
        self.running = np.concatenate([self.running, np.array(rows, dtype=np.int64)])
        return np.concatenate([granted, np.array(counts, dtype=np.int64)])

    def _may_admit(self) -> bool:
        has_next = bool(self.waiting) and self.waiting[0].params.priority < self._preempted
        return has_next and self.table.num_rows_free > 0

    def _open(self, request: Request, budget: int, *, spare: int) -> int | None:
        """Give a waiting request a row, its cached prefix and blocks for its first chunk; None if it does not fit."""
        shared = self._acquire_prefix(request)
        cached = len(shared) * self.config.block_size
        missing = self._blocks_to_open(request, len(shared), budget)
        if missing + spare > self.pool.num_free:
            self.pool.release(shared)
            return None
        try:
            row = self.table.open(request, request.params.stop_ids(self.eos_ids))
        except BaseException:
            self.pool.release(shared)
            raise
        self.table.append_blocks(row, shared + self.pool.allocate(missing))
        self.table.num_computed[row] = cached
        self.table.num_named[row] = len(shared)
        if request.num_cached_tokens is None:  # a prefix found again after preemption is not the caller's saving
            request.num_cached_tokens, request.started = cached, perf_counter()
            self.num_prefix_hit_tokens += cached
        return row

    def _blocks_to_open(self, request: Request, num_shared: int, budget: int) -> int:
        """Blocks for the first `budget` tokens of a waiting request behind those that it shares."""
        known, size = len(request.token_ids), self.config.block_size
        end = min(num_shared * size + budget, known)
        end = min(end + (self.lookahead if end == known else 0), self.table.cache_rows_of(request))
        return max(0, -(-end // size) - num_shared)

    def _acquire_prefix(self, request: Request) -> list[int]:
        """Shares of the cached blocks that the request starts with, never all its tokens: the last one must run."""
        shared: list[int] = []
        if not self.config.prefix_cache or _runs_whole(request):
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
        for where in (full > table.num_named[rows]).nonzero()[0].tolist():
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
            names.append(hash_block(names[-1] if names else request.salt, token_ids[start : start + size]))
        return names[index]

    def retreat(self, plan: StepPlan) -> None:
        """Take back the last plan, which the device had no memory for, and plan half as many tokens until all sequences
        have ended: the youngest wait. Requests that it started go back to the queue, as they may share blocks that
        were to be filled."""
        table, rows, size = self.table, plan.rows, self.config.block_size
        table.num_computed[rows] -= plan.counts
        table.num_pending[rows] -= plan.num_samples > 0
        table.num_flights[rows] -= 1
        self.num_flights -= 1
        for row in rows.tolist():
            full = int(table.num_computed[row]) // size
            self.pool.forget(table.row_blocks(row)[full : int(table.num_named[row])])
            table.num_named[row] = min(int(table.num_named[row]), full)
        for _ in range(self._num_admitted):
            self._preempt_last()
        self.limit = max(1, plan.num_tokens // 2)

    # settling ---------------------------------------------------------------------------------------------------------

    def settle(self, plan: StepPlan, result: StepResult) -> tuple[list[Outcome], NDArray[np.int64]]:
        """Write what the oldest step in flight sampled. Returns the news, and the tokens gained per entry of the plan.

        A sequence that got a stop token or string, or is full, ends; so does one whose logits were not finite, alone:
        its reason is "error". Blocks that only rejected drafts needed go back. What was sampled for a sequence that
        has ended meanwhile is dropped.
        """
        table, rows = self.table, plan.rows
        settings, has_ended, known = table.settings(rows), table.has_ended[rows], table.num_known[rows]
        samples = self._num_verified(plan, known)
        tokens, logprobs = plan.grid(result.tokens), plan.grid(result.logprobs, fill=0)
        place = rows[:, None], known[:, None] + np.arange(tokens.shape[1])
        drafts = tokens if tokens.shape[1] == 1 else table.token_ids[place]
        num_new, stopped = count_new(tokens, drafts, samples, settings.stop_ids)
        is_finite = np.isfinite(logprobs)
        are_finite = bool(np.count_nonzero(is_finite) == is_finite.size)
        failed = self._failed(plan, None if are_finite else is_finite, num_new)
        num_new[has_ended | failed] = 0
        self._note_scores(plan, result, num_new)
        if result.routes is not None:
            self._note_routes(plan, result.routes)
        table.token_ids[place], table.logprobs[place] = tokens, logprobs  # what is not gained stands behind the known
        self._advance(plan, samples, num_new, are_finite or np.logical_and.reduce(is_finite, axis=1))
        full, gains = known + num_new >= settings.max_length, num_new > 0
        done = failed | (gains & (stopped | full))
        news = (done | (table.watched[rows] & gains)).nonzero()[0]
        outcomes: list[Outcome] = []
        if len(news):
            facts = rows, known, tokens, logprobs, num_new, failed, gains & stopped, full
            found = [self._outcome(*each) for each in zip(*(fact[news].tolist() for fact in facts), strict=True)]
            outcomes += [each for each in found if each is not None]
        for index in has_ended.nonzero()[0].tolist():
            if table.num_flights[rows[index]] == 0:
                self._free(int(rows[index]))
        return outcomes, num_new

    def _failed(
        self, plan: StepPlan, is_finite: NDArray[np.bool_] | None, num_new: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Per entry that has not ended, whether a token that it gained comes from logits that were not finite, or its
        rules have none; None says that all were finite."""
        table, rows = self.table, plan.rows
        failed = np.zeros(len(rows), dtype=bool)
        if is_finite is not None:
            failed = (~is_finite & (np.arange(is_finite.shape[1]) < num_new[:, None])).any(axis=1)
            failed &= ~table.has_ended[rows]
        for index in table.settings(rows).ruled:
            if num_new[index] and not table.has_ended[rows[index]]:
                rules = self._request(int(rows[index])).rules
                failed[index] |= rules is not None and rules.error is not None
        return failed

    def _note_scores(self, plan: StepPlan, result: StepResult, num_new: NDArray[np.int64]) -> None:
        """Hand the likeliest tokens and the log-probabilities of prompts to the requests that want them."""
        table = self.table
        if result.top is not None:
            asked, first = np.where(table.num_top[plan.rows] > 0, plan.num_samples, 0), 0
            for index in np.flatnonzero(asked).tolist():
                row = int(plan.rows[index])
                best = [result.top.table(first + i, int(table.num_top[row])) for i in range(int(num_new[index]))]
                if best:
                    self._request(row).note_top(int(table.num_known[row]), best)
                first += int(asked[index])
        if result.prompt_logprobs is not None:
            scored, first = table.scored(plan), 0
            for index in np.flatnonzero(scored).tolist():
                last, start = first + int(scored[index]), int(plan.starts[index]) + 1
                request = self._request(int(plan.rows[index]))
                request.note_prompt(start, result.prompt_logprobs[first:last], result.prompt_top, first)
                first = last

    def _note_routes(self, plan: StepPlan, routes: NDArray[np.int64]) -> None:
        """Hand experts to the requests that want them. Those of drafts that are not accepted are overwritten later."""
        counts, first = np.where(self.table.is_traced[plan.rows], plan.counts, 0), 0
        for index in np.flatnonzero(counts).tolist():
            last = first + int(counts[index])
            self._request(int(plan.rows[index])).note_routes(int(plan.starts[index]), routes[first:last])
            first = last

    def _request(self, row: int) -> Request:
        request = self.table.requests[row]
        assert request is not None, f"row {row} is empty"
        return request

    def _num_verified(self, plan: StepPlan, known: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples that count, per entry of a plan that settles next, which has so many known tokens: none past the
        greatest length, which a step that was planned ahead could not know."""
        if not self.config.num_draft_tokens:
            return plan.num_samples
        room = self.table.settings(plan.rows).max_length - known
        if not np.count_nonzero(room < plan.num_samples):
            return plan.num_samples
        return np.minimum(np.maximum(room, 0), plan.num_samples)

    def _advance(
        self,
        plan: StepPlan,
        samples: NDArray[np.int64],
        num_new: NDArray[np.int64],
        is_finite: NDArray[np.bool_] | bool,
    ) -> None:
        """Move the counters, and each block tail back to what the known tokens need; `samples` are those that count."""
        table, rows, sampled = self.table, plan.rows, plan.num_samples > 0
        flights = table.num_flights[rows] - 1
        rejected = None
        if self.config.num_draft_tokens:
            table.num_drafted[rows] += samples - (samples > 0)
            table.num_accepted[rows] += num_new - (num_new > 0)
            self.num_drafted += int(samples.sum()) - int(np.count_nonzero(samples))
            self.num_proposals += int(np.count_nonzero(samples > 1))
            table.num_drafts[rows] = 0
            rejected = plan.num_samples - num_new
        table.num_known[rows] += num_new
        table.num_pending[rows] -= sampled
        table.num_flights[rows] = flights
        table.is_proved[rows] = sampled & is_finite & (flights == 0)
        self.num_flights -= 1
        if rejected is not None and np.count_nonzero(rejected):
            table.num_computed[rows] -= rejected
            self._trim(rows[sampled])

    def _trim(self, rows: NDArray[np.int64]) -> None:
        """Give back the blocks that only rejected drafts needed."""
        table = self.table
        ends = np.maximum(table.num_known[rows] + table.num_pending[rows], table.num_computed[rows]) + self.lookahead
        owned = table.num_blocks[rows]
        if not np.count_nonzero(owned * table.block_size - ends >= table.block_size):
            return
        needed = -(-np.minimum(ends, table.max_cache_rows[rows]) // table.block_size)
        for where in np.flatnonzero(owned > needed).tolist():
            row, keep = int(rows[where]), int(needed[where])
            self._release(row, table.row_blocks(row)[keep:])
            table.keep_blocks(row, keep)

    def _outcome(
        self,
        row: int,
        known: int,
        tokens: list[int],
        logprobs: list[float],
        num_new: int,
        has_failed: bool,
        has_stopped: bool,
        is_full: bool,
    ) -> Outcome | None:
        """Of a row that gained the first `num_new` of these behind what was known, the last of them a stop token if it
        `has_stopped`. None where it goes on and nobody waits for its tokens."""
        table, request = self.table, self._request(row)
        reason: FinishReason | None = (
            "error" if has_failed else "stop" if has_stopped else "length" if is_full else None
        )
        if num_new and request.output is not None and request.output.watches:
            fresh = tokens[:num_new]
            matched = request.output.push(request.without_stop(fresh) if has_stopped else fresh)
            if matched is not None:  # tokens after the stop string, accepted in the same step, never were
                table.num_known[row] -= num_new - matched
                num_new, has_stopped, reason = matched, False, "stop"
        if reason is None and not request.is_awaited:
            return None
        is_all = known == len(request.prompt) + request.num_reported
        fresh = (tokens[:num_new], logprobs[:num_new]) if is_all else self._unreported(request)
        outcome = self._news(request, *fresh, reason, has_stopped)
        if reason is not None:
            self._end(row, failed=has_failed)
        return outcome

    def _unreported(self, request: Request) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities."""
        token_ids, logprobs = self.table.known(request)
        start = len(request.prompt) + request.num_reported
        return token_ids[start:].tolist(), logprobs[start:].tolist()

    def _news(
        self,
        request: Request,
        fresh: list[int],
        logprobs: list[float],
        reason: FinishReason | None = None,
        has_stopped: bool = False,
    ) -> Outcome:
        """What has not been reported of a request."""
        if fresh and request.output is not None and not request.output.watches:
            request.output.push(request.without_stop(fresh) if has_stopped else fresh)
        top = None
        if num_top(request.params.logprobs):
            top = request.top_logprobs[request.num_reported : request.num_reported + len(fresh)]
        request.num_reported += len(fresh)
        is_awaited = request.stream and not request.on_demand
        if is_awaited != request.is_awaited:
            self.table.await_news(request, is_awaited)
        return Outcome(request, fresh, logprobs, reason, has_stopped, top)

    def report(self, request: Request) -> Outcome | None:
        """The tokens of an unfinished request that have not been reported. Where there are none, None, and the next
        step that brings some reports them."""
        if len(self.table.known(request)[0]) > len(request.prompt) + request.num_reported:
            return self._news(request, *self._unreported(request))
        self.table.await_news(request, True)
        return None

    def propose(self, plan: StepPlan, drafts: NDArray[np.int64]) -> None:
        """Note guesses behind the known tokens of what the plan sampled, as far as there is room; to be verified."""
        table, rows, most = self.table, plan.rows, drafts.shape[1]
        if len(plan.sampled) < len(rows):
            rows = rows[plan.sampled]
        known = table.num_known[rows]
        table.num_drafts[rows] = np.minimum(np.maximum(table.max_length[rows] - 1 - known, 0), most)
        table.token_ids[rows[:, None], known[:, None] + np.arange(most)] = drafts  # there are columns for all

    # leaving ----------------------------------------------------------------------------------------------------------

    def abort(self, request_id: int) -> Request | None:
        """Take out a waiting or running request; None if there is none of that id."""
        for request in self.waiting:
            if request.id == request_id:
                self.waiting.remove(request)
                return request
        for row in self.running.tolist():
            request = self.table.requests[row]
            if request is not None and request.id == request_id:
                self._end(row)
                return request
        return None

    def find(self, request_id: int) -> Request | None:
        """The waiting or running request of that id."""
        running = [self._request(row) for row in self.running.tolist()]
        return next((request for request in (*running, *self.waiting) if request.id == request_id), None)

    def generated(self, request: Request) -> NDArray[np.int64]:
        """The tokens of its completion that are known."""
        return self.table.known(request)[0][len(request.prompt) :]

    def recompute_all(self) -> None:
        """Send every running sequence back to the queue and forget all prefixes: no cache row is valid any more.

        Steps in flight are forgotten: their samples are drawn again, and are the same. Whatever an interrupt has left
        half written, all is made anew from the sequences that have a row and those that wait.
        """
        table = self.table
        taken = [row for row, request in enumerate(table.requests) if request is not None]
        for row in taken:
            if not table.is_proved[row]:
                self.pool.taint(table.row_blocks(row))
        going = [row for row in dict.fromkeys([*self.running.tolist(), *taken]) if not table.has_ended[row]]
        self.waiting = deque(sorted(dict.fromkeys([*map(table.write_back, going), *self.waiting]), key=_turn))
        self.running, self.num_flights = self.running[:0], 0
        table.clear()
        self.pool = self.pool.renewed()

    def take_preemptions(self) -> int:
        """Preemptions since the last call."""
        count, self.num_preemptions = self.num_preemptions, 0
        return count

    def take_prefix_hit_tokens(self) -> int:
        """Prompt tokens found in the prefix cache since the last call."""
        count, self.num_prefix_hit_tokens = self.num_prefix_hit_tokens, 0
        return count

    def take_drafted(self) -> tuple[int, int]:
        """Drafts verified since the last call, and how many sequences' steps they were of."""
        counts = self.num_drafted, self.num_proposals
        self.num_drafted = self.num_proposals = 0
        return counts

    def _end(self, row: int, *, failed: bool = False) -> None:
        """A running sequence is over. Its row and blocks are free when no step in flight runs it."""
        self.table.write_back(row)
        self.table.has_ended[row] = True
        self.running = self.running[self.running != row]
        if failed:
            self.pool.forget(self.table.row_blocks(row))
        if self.table.num_flights[row] == 0:
            self._free(row)

    def _free(self, row: int) -> None:
        self._release(row, self.table.row_blocks(row))
        self.table.close(row)

    def _release(self, row: int, blocks: list[int]) -> None:
        if not self.table.is_proved[row]:
            self.pool.taint(blocks)
        self.pool.release(blocks)


def _turn(request: Request) -> tuple[int, int]:
    """What requests wait in order of. Ids count up as requests arrive."""
    return request.params.priority, request.id


def _runs_whole(request: Request) -> bool:
    """Whether all its tokens must run, since something is told of each."""
    return bool(request.params.prompt_logprobs) or request.params.return_routed_experts
