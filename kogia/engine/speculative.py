"""Draft verification: how far a step moved each sequence (DeepSeek-V3 section 2.2.3; Leviathan et al. 2023).

Every position that the step verified was sampled as if nothing had been drafted, with the uniform number of its own
position, and a draft is accepted if and only if it EQUALS the token sampled there. For drafts chosen without chance
this is lossless rejection sampling (acceptance probability p(draft), the rest of the distribution otherwise), and more:
the tokens are the very ones that decoding without drafts gives for the same seed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kogia.engine.blocks import BlockPool
from kogia.engine.scheduler import StepPlan
from kogia.engine.sequences import SequenceTable


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a step added, one entry per sequence of the plan."""

    num_new: NDArray[np.int64]
    """Tokens that became known; 0 for an unfinished prefill."""
    stopped: NDArray[np.bool_]
    """A stop token is the last of them."""
    full: NDArray[np.bool_]
    """The sequence has reached its maximum length."""


def accept(
    table: SequenceTable,
    pool: BlockPool,
    plan: StepPlan,
    tokens: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    *,
    lookahead: int = 0,
) -> Accepted:
    """Move the counters of every planned sequence, and its block tail back to what its known tokens need.

    `tokens` and `logprobs` are the samples of all sequences end to end, `plan.num_samples` of each. `lookahead` more
    positions keep their blocks: a chain of drafts is about to write there. After this, num_computed = num_known - 1 for
    every sequence that sampled, and no draft is left.
    """
    rows, samples = plan.rows, plan.num_samples
    num_new, stopped = _count_accepted(table, plan, tokens)
    _write(table, plan, num_new, tokens, logprobs)
    sampled = samples > 0
    table.num_drafted[rows] += np.maximum(samples - 1, 0)
    table.num_accepted[rows] += np.maximum(num_new - 1, 0)
    table.num_known[rows] += num_new
    table.num_computed[rows] = np.where(sampled, table.num_known[rows] - 1, plan.starts + plan.counts)
    table.num_drafts[rows[sampled]] = 0
    needed = -(-np.minimum(table.num_known[rows] + lookahead, table.max_cache_rows[rows]) // table.block_size)
    for where in np.flatnonzero(sampled & (table.num_blocks[rows] > needed)).tolist():
        row, keep = int(rows[where]), int(needed[where])
        pool.release(table.row_blocks(row)[keep:])
        table.num_blocks[row] = keep
    return Accepted(num_new, stopped, table.num_known[rows] >= table.max_length[rows])


def _count_accepted(
    table: SequenceTable, plan: StepPlan, tokens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens gained per sequence (accepted drafts and one more, cut after a stop token) and whether one stopped it."""
    rows, samples = plan.rows, plan.num_samples
    width = int(samples.max())
    if width == 0:
        return np.zeros_like(samples), np.zeros(len(rows), dtype=bool)
    column = np.arange(width)
    grid = np.full((len(rows), width), -1, dtype=np.int64)
    grid[column < samples[:, None]] = tokens
    # Column j is the token at num_known + j. It counts if the drafts before it, at num_known + 0..j-1, were all right.
    where = np.minimum(table.num_known[rows][:, None] + column, table.token_ids.shape[1] - 1)
    right = (grid == table.token_ids[rows[:, None], where]) & (column < samples[:, None] - 1)
    num_new = np.where(samples > 0, np.cumprod(right, axis=1).sum(axis=1) + 1, 0)
    stops = (grid[..., None] == table.stop_ids[rows][:, None, :]).any(axis=-1) & (column < num_new[:, None])
    stopped = stops.any(axis=1)
    return np.where(stopped, stops.argmax(axis=1) + 1, num_new), stopped


def _write(
    table: SequenceTable,
    plan: StepPlan,
    num_new: NDArray[np.int64],
    tokens: NDArray[np.int64],
    logprobs: NDArray[np.float32],
) -> None:
    """Store the accepted samples behind the known tokens, over the drafts."""
    samples = plan.num_samples
    owner = np.repeat(np.arange(len(samples)), samples)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(samples) - samples, samples)
    keep = offset < num_new[owner]
    row = plan.rows[owner[keep]]
    column = table.num_known[row] + offset[keep]
    table.token_ids[row, column] = tokens[keep]
    table.logprobs[row, column] = logprobs[keep]
