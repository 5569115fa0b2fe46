"""What the scheduler asks of the runner, and what comes back."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The runs of tokens of one step, one entry per sequence."""

    rows: NDArray[np.int64]
    """Rows of the sequence table, oldest first."""
    starts: NDArray[np.int64]
    """Position of the first token that runs."""
    counts: NDArray[np.int64]
    """Tokens that run, drafts included; at least one."""
    num_samples: NDArray[np.int64]
    """Tokens to sample, from the last rows of the run: 0 for an unfinished prefill, else 1 + drafts verified."""
    is_pending: NDArray[np.bool_]
    """The last token that runs is one that a step in flight samples: its value is on the device alone."""

    num_tokens: int = field(init=False)
    sampled: NDArray[np.int64] = field(init=False)
    """The entries that sample."""
    only_decodes: bool = field(init=False)
    """Every sequence runs one token and samples the next."""

    def __post_init__(self) -> None:
        num_tokens, sampled = int(self.counts.sum()), self.num_samples.nonzero()[0]
        object.__setattr__(self, "num_tokens", num_tokens)
        object.__setattr__(self, "sampled", sampled)
        object.__setattr__(self, "only_decodes", num_tokens == len(self.rows) == len(sampled))

    @cached_property
    def only_newest(self) -> bool:
        """Every sequence runs its newest token and the drafts behind it, none a prompt."""
        return not np.count_nonzero(self.counts != self.num_samples)

    def grid(self, flat: NDArray, fill: int = -1) -> NDArray:
        """One value per sample, end to end or as a grid already, as [entries, most samples of one]."""
        if flat.ndim == 2:
            return flat
        if len(flat) == len(self.rows) == len(self.sampled):
            return flat[:, None]
        column = np.arange(max(1, int(self.num_samples.max())))
        grid = np.full((len(self.rows), len(column)), fill, dtype=flat.dtype)
        grid[column < self.num_samples[:, None]] = flat
        return grid


class TopTokens(NamedTuple):
    """The likeliest tokens, the best first."""

    ids: NDArray[np.int64]
    """[rows, tokens]"""
    logprobs: NDArray[np.float32]
    """[rows, tokens]"""

    def table(self, row: int, count: int) -> dict[int, float]:
        """Token id -> log-probability of the best `count` of a row."""
        return dict(zip(self.ids[row, :count].tolist(), self.logprobs[row, :count].tolist(), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What the model made of a plan, on the host."""

    tokens: NDArray[np.int64]
    """Samples of all sequences end to end, `plan.num_samples` of each; or where those are equal a grid of them."""
    logprobs: NDArray[np.float32]
    """Of the samples, unfiltered, at the sequence's temperature. Not finite where the model's logits were not."""
    drafts: NDArray[np.int64]
    """[plan.sampled, drafts] guesses at what follows the last accepted sample."""
    top: TopTokens | None = None
    """In place of each sample of a sequence that asks for them, in the order of the samples; None where none does."""
    prompt_logprobs: NDArray[np.float32] | None = None
    """Of the tokens behind those that `SequenceTable.scored` counts; None where there is none."""
    prompt_top: TopTokens | None = None
    """In place of these tokens."""
    routes: NDArray[np.int64] | None = None
    """[tokens, mixtures, topk] experts of the tokens that ran, of sequences that ask for them; None where none does."""
