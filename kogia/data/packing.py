"""Greedy packing: whole sequences in their given order, laid end to end until the next one no longer fits."""

import numpy as np
from jaxtyping import Int64


def fill(lengths_cumulative: Int64[np.ndarray, " n_plus_1"], cursor: int, budget: int) -> int:
    """The end of the longest run of sequences from `cursor` whose tokens fit into `budget`; `cursor` if none does.

    `lengths_cumulative[i]` is the tokens before sequence i, so the search is one bisection, not a loop.
    """
    limit = lengths_cumulative[cursor] + budget
    return int(np.searchsorted(lengths_cumulative, limit, side="right")) - 1


def gather_rows(
    starts: Int64[np.ndarray, " seqs"], lengths: Int64[np.ndarray, " seqs"]
) -> Int64[np.ndarray, " tokens"]:
    """Row numbers of sequences that begin at `starts`, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
