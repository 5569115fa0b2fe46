"""Packing whole sequences into batches of a bounded number of tokens: in their given order, or by best fit."""

import numpy as np
from jaxtyping import Int64


def fill(lengths_cumulative: Int64[np.ndarray, " n_plus_1"], cursor: int, budget: int) -> int:
    """The end of the longest run of sequences from `cursor` whose tokens fit into `budget`; `cursor` if none does.

    `lengths_cumulative[i]` is the tokens before sequence i, so the search is one bisection, not a loop.
    """
    limit = lengths_cumulative[cursor] + budget
    return int(np.searchsorted(lengths_cumulative, limit, side="right")) - 1


def best_fit(
    lengths: Int64[np.ndarray, " n"], budget: int, window: int = 512
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " batches_plus_1"]]:
    """(an order of the sequences, where in it each batch begins and the last one ends).

    A batch is what `fill` would take, then of the `window` sequences behind it the longest that fits into what is left,
    again and again. So the order stays as mixed as it was (best fit over all would put the long ones together), and
    batches are nearly full: a sequence that was passed over comes first in the next one.
    """
    left = lengths.copy()  # 0: taken already
    order, bounds, cursor = [], [0], 0
    while cursor < len(left):
        end, gap = _run(left, cursor, budget, window)
        taken = [cursor + np.flatnonzero(left[cursor:end])]
        ahead = left[end : end + window]
        while gap and len(fitting := np.flatnonzero((ahead > 0) & (ahead <= gap))):
            best = fitting[np.argmax(ahead[fitting])]
            taken.append(np.array([end + best]))
            gap -= int(ahead[best])
            ahead[best] = 0
        order += taken
        bounds.append(bounds[-1] + sum(map(len, taken)))
        cursor = end
        while cursor < len(left) and left[cursor] == 0:
            cursor += 1
    return np.concatenate([np.zeros(0, "int64"), *order]), np.array(bounds)


def _run(left: np.ndarray, cursor: int, budget: int, window: int) -> tuple[int, int]:
    """(the end of the longest run from `cursor` whose tokens fit into `budget`, the tokens that are then left)."""
    while True:
        sums = np.cumsum(left[cursor : cursor + window])
        taken = int(np.searchsorted(sums, budget, side="right"))
        if taken < len(sums) or cursor + window >= len(left):
            return cursor + taken, budget - int(sums[taken - 1])
        window *= 2


def gather_rows(
    starts: Int64[np.ndarray, " seqs"], lengths: Int64[np.ndarray, " seqs"]
) -> Int64[np.ndarray, " tokens"]:
    """Row numbers of sequences that begin at `starts`, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
