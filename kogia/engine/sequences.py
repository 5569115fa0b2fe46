"""State of the running sequences as numpy columns, one row each, so that a step costs no Python per token.

Counters of a row, all in tokens: `num_known` are prompt or sampled and read back from the device; `num_pending` more
have been sampled there, or will be by steps in flight, and their values are not known here yet (with drafts that is the
least number, one for each step); `num_computed` have valid cache rows once those steps have run (with drafts that is
the most). `num_drafts` guesses stand in `token_ids` behind the known tokens.
With no step in flight num_pending = 0 and num_computed < num_known: at least the last known token is still to be run.

The scheduler is the only one that writes here.
"""

import sys

import numpy as np
from numpy.typing import NDArray

from kogia.engine.request import Request, num_top
from kogia.engine.step import StepPlan


class Settings:
    """What some rows of the table ask for. It stays as it is from step to step, so it is gathered once for all steps
    of the same rows."""

    def __init__(self, table: "SequenceTable", rows: NDArray[np.int64]) -> None:
        self.rows = rows
        self.max_length = table.max_length[rows]
        self.max_cache_rows = table.max_cache_rows[rows]
        self.stop_ids = table.stop_ids[rows]
        self.temperature, self.seed = table.temperature[rows], table.seed[rows]
        self.ruled: list[int] = table.is_ruled[rows].nonzero()[0].tolist()
        """Which of the rows have rules."""
        self.needs_tokens = bool(table.needs_tokens[rows].any())
        self.has_top = bool(table.num_top[rows].any())
        self.is_traced = bool(table.is_traced[rows].any())
        self.top_k, self.top_p, self.min_p = table.top_k[rows], table.top_p[rows], table.min_p[rows]
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        self.is_filtered = bool((((top_k != 0) | (top_p != 1) | (min_p != 0)) & (self.temperature > 0)).any())
        self.experts = _only(table.active_experts[rows]), _only(table.expert_threshold[rows])
        """(number, threshold) of all these rows; None for what differs among them."""
        self.drawing = np.stack((rows, self.seed, top_k, *map(_packed, (self.temperature, top_p, min_p))))
        """[6, rows] how a recorded step draws for each: its place, its seed, top-k, and end to end the float32
        temperatures, those of top-p and those of min-p."""


class SequenceTable:
    """Rows for `max_sequences` sequences. Token and block columns grow to the longest sequence seen."""

    def __init__(
        self, max_sequences: int, block_size: int, most_cache_rows: int = sys.maxsize, spare_columns: int = 0
    ) -> None:
        """No sequence will hold more than `most_cache_rows` at once. Behind the longest there are
        `spare_columns` for tokens: a step looks and writes past the end."""
        self.block_size, self.most_cache_rows, self._spare = block_size, most_cache_rows, spare_columns
        self.requests: list[Request | None] = [None] * max_sequences
        self._free = list(range(max_sequences - 1, -1, -1))
        self.token_ids = np.zeros((max_sequences, 0), dtype=np.int64)
        self.logprobs = np.zeros((max_sequences, 0), dtype=np.float32)
        self.blocks = np.zeros((max_sequences, 0), dtype=np.int64)
        """Block tables. Behind its own blocks a row has its first one again: what is masked is read all the same and
        multiplied by 0, and another's rows, if not finite, would spoil the sum."""
        self.num_blocks = np.zeros(max_sequences, dtype=np.int64)
        self.num_named = np.zeros(max_sequences, dtype=np.int64)
        """Full blocks that are in the prefix index."""
        self.num_known = np.zeros(max_sequences, dtype=np.int64)
        self.num_pending = np.zeros(max_sequences, dtype=np.int64)
        self.num_computed = np.zeros(max_sequences, dtype=np.int64)
        self.num_drafts = np.zeros(max_sequences, dtype=np.int64)
        self.num_flights = np.zeros(max_sequences, dtype=np.int64)
        """Steps in flight that run tokens of the row. It is not given to another sequence before they have settled."""
        self.has_ended = np.zeros(max_sequences, dtype=bool)
        """The sequence is over, and what steps in flight still sample for it is dropped."""
        self.is_proved = np.ones(max_sequences, dtype=bool)
        """All cache rows are finite: so was what the last of them sampled, and that is no step in flight's."""
        self.num_drafted = np.zeros(max_sequences, dtype=np.int64)
        self.num_accepted = np.zeros(max_sequences, dtype=np.int64)
        self.max_length = np.zeros(max_sequences, dtype=np.int64)
        self.max_cache_rows = np.zeros(max_sequences, dtype=np.int64)
        self.temperature = np.zeros(max_sequences, dtype=np.float32)
        self.top_k = np.zeros(max_sequences, dtype=np.int64)
        self.top_p = np.zeros(max_sequences, dtype=np.float32)
        self.min_p = np.zeros(max_sequences, dtype=np.float32)
        self.active_experts = np.zeros(max_sequences, dtype=np.int64)
        self.expert_threshold = np.zeros(max_sequences, dtype=np.float32)
        self.seed = np.zeros(max_sequences, dtype=np.int64)
        self.stop_ids = np.full((max_sequences, 1), -1, dtype=np.int64)
        self.is_ruled = np.zeros(max_sequences, dtype=bool)
        """Its request has rules for its tokens."""
        self.needs_tokens = np.zeros(max_sequences, dtype=bool)
        """These rules must know every token before they say what may be next."""
        self.num_top = np.zeros(max_sequences, dtype=np.int64)
        """Likeliest tokens that come with each sample."""
        self.num_scored = np.zeros(max_sequences, dtype=np.int64)
        """Tokens of the prompt that the next one's log-probability is wanted of; 0 for none."""
        self.is_traced = np.zeros(max_sequences, dtype=bool)
        """The experts of its tokens are wanted."""
        self.priority = np.zeros(max_sequences, dtype=np.int64)
        self.watched = np.zeros(max_sequences, dtype=bool)
        """The next tokens are looked at: for stop strings, or as somebody waits for them."""
        self._settings: Settings | None = None
        """Of the rows that were asked for last."""

    def settings(self, rows: NDArray[np.int64]) -> Settings:
        """What open rows ask for. Cheap for the same array as last time, which must not be written to."""
        if self._settings is None or self._settings.rows is not rows:
            self._settings = Settings(self, rows)
        return self._settings

    @property
    def num_rows_free(self) -> int:
        return len(self._free)

    def cache_rows_of(self, request: Request) -> int:
        """Most cache rows that it will hold: the last token is never run."""
        return min(request.max_length - 1, self.most_cache_rows)

    def open(self, request: Request, stop_ids: list[int]) -> int:
        """Give `request` a row with nothing computed and no blocks."""
        self._grow(request.max_length, len(stop_ids))
        row = self._free[-1]
        known, params = len(request.token_ids), request.params
        self.token_ids[row, :known] = request.token_ids
        self.logprobs[row, :known] = request.logprobs
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids
        self.num_known[row] = known
        for counter in (self.num_pending, self.num_computed, self.num_drafts, self.num_blocks, self.num_named):
            counter[row] = 0
        self.has_ended[row], self.is_proved[row] = False, True
        self.num_drafted[row], self.num_accepted[row] = request.num_drafted, request.num_accepted
        self.max_length[row], self.seed[row] = request.max_length, request.seed
        self.max_cache_rows[row] = self.cache_rows_of(request)
        self.temperature[row], self.top_k[row] = params.temperature, params.top_k
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.active_experts[row], self.expert_threshold[row] = request.active_experts, request.expert_threshold
        self.num_top[row] = num_top(params.logprobs)
        self.is_traced[row], self.priority[row] = params.return_routed_experts, params.priority
        self.num_scored[row] = len(request.prompt) - 1 if params.prompt_logprobs else 0
        self.requests[row], request.row = request, row
        self.note_rules(request)
        self.await_news(request, request.is_awaited)
        return self._free.pop()

    def await_news(self, request: Request, is_awaited: bool) -> None:
        """Whether the next tokens of a request are to be reported."""
        request.is_awaited = is_awaited
        if request.row is not None:
            self.watched[request.row] = is_awaited or (request.output is not None and request.output.watches)

    def known(self, request: Request) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All tokens that are known of a request, and their log-probabilities; views."""
        if request.row is None:
            return request.token_ids, request.logprobs
        end = self.num_known[request.row]
        return self.token_ids[request.row, :end], self.logprobs[request.row, :end]

    def note_rules(self, request: Request) -> None:
        """Take in that a request's rules have changed; nothing where it has no row."""
        self._settings = None
        if request.row is not None:
            self.is_ruled[request.row] = request.rules is not None
            self.needs_tokens[request.row] = request.rules is not None and request.rules.needs_tokens

    def scored(self, plan: StepPlan) -> NDArray[np.int64]:
        """Per entry of a plan, how many of the tokens that run are followed by one whose log-probability is wanted."""
        return np.clip(self.num_scored[plan.rows] - plan.starts, 0, plan.counts)

    def write_back(self, row: int) -> Request:
        """Hand a row's tokens and counters to its request."""
        request = self.requests[row]
        assert request is not None, f"row {row} is empty"
        known = self.num_known[row]
        request.token_ids = self.token_ids[row, :known].copy()
        request.logprobs = self.logprobs[row, :known].copy()
        request.num_drafted, request.num_accepted = int(self.num_drafted[row]), int(self.num_accepted[row])
        return request

    def close(self, row: int) -> None:
        """Empty a row that no step in flight runs."""
        request = self.requests[row]
        assert request is not None, f"row {row} is empty"
        assert self.num_flights[row] == 0, f"row {row} has {self.num_flights[row]} steps in flight"
        self.requests[row] = request.row = None
        self._free.append(row)

    def clear(self) -> None:
        """Empty all rows. Steps in flight are forgotten."""
        for request in filter(None, self.requests):
            request.row = None
        self.requests = [None] * len(self.requests)
        self._free = list(range(len(self.requests) - 1, -1, -1))
        self.num_flights[:] = 0

    def row_blocks(self, row: int) -> list[int]:
        return self.blocks[row, : self.num_blocks[row]].tolist()

    def append_blocks(self, row: int, blocks: list[int]) -> None:
        start = self.num_blocks[row]
        if start == 0 and blocks:
            self.blocks[row] = blocks[0]
        self.blocks[row, start : start + len(blocks)] = blocks
        self.num_blocks[row] += len(blocks)

    def keep_blocks(self, row: int, count: int) -> None:
        """Forget those behind the first `count`."""
        self.blocks[row, count : self.num_blocks[row]] = self.blocks[row, 0]
        self.num_blocks[row] = count

    def _grow(self, length: int, num_stops: int) -> None:
        width = self.token_ids.shape[1]
        if length + self._spare > width:
            width = max(length + self._spare, 2 * width)
            self.blocks = _widen(self.blocks, -(-width // self.block_size), repeats_first=True)
            self.logprobs = _widen(self.logprobs, width)
            self.token_ids = _widen(self.token_ids, width)  # last: after an interrupt the others are widened again
        if num_stops > self.stop_ids.shape[1]:
            added = num_stops - self.stop_ids.shape[1]
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, added)), constant_values=-1)


def _packed(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """As many int64 numbers, of whose memory the floats fill the first half."""
    numbers = np.zeros(len(values), dtype=np.int64)
    numbers.view(np.float32)[: len(values)] = values
    return numbers


def _only(values: NDArray) -> float | None:
    """What all values are, or None."""
    return values[0].item() if len(values) and (values == values[0]).all() else None


def _widen(columns: NDArray, width: int, *, repeats_first: bool = False) -> NDArray:
    wider = np.zeros((columns.shape[0], width), dtype=columns.dtype)  # untouched pages of a long context cost nothing
    if repeats_first and columns.size:
        wider[:] = columns[:, :1]
    wider[:, : columns.shape[1]] = columns
    return wider
