"""Decode steps with drafts as recorded graphs: verify, then accept and draft on, without the host.

Every sequence runs its newest token and the k tokens drafted behind it. One graph is the model's part; sampling comes
behind it, as its settings differ from request to request; a second graph counts the drafts that stand (`num_accepted`),
runs the MTP module and leaves newest token, length and next drafts where the next step finds them. So the next step can
be launched before anyone knows how many drafts stood.

A sequence with fewer drafts than k, near its end or after a step without drafts, runs all the same: what is too much is
written to nobody's slot, and its samples do not count.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.activation import ActiveExperts
from kogia.engine.graphs import CONTEXTS, Graph, capture, recorded_sizes
from kogia.engine.sequences import SequenceTable
from kogia.engine.speculative import num_accepted
from kogia.engine.step import StepPlan
from kogia.engine.views import WholeCache
from kogia.model.layers import StepContext
from kogia.model.packed import PackedTokens
from kogia.model.transformer import Transformer
from kogia.ops.prefill import FEW
from kogia.ops.segments import Segments

NUM_FIELDS = 5
"""Numbers of a sequence before its tokens: table row, length, samples that count, greatest length, slots it owns."""


class DraftState:
    """What the device knows of each row of the sequence table; a last row is nobody's."""

    def __init__(self, newest: Int[Tensor, " rows"], num_drafts: int) -> None:
        """`newest` is the runner's: the token that each sequence sampled last."""
        self.newest = newest
        self.lengths = torch.ones_like(newest)
        """[rows] known tokens, the newest included."""
        self.drafts = newest.new_zeros(len(newest), num_drafts)
        """[rows, drafts] guesses at what follows."""

    def write(self, rows: Tensor, newest: Tensor, lengths: Tensor, drafts: Int[Tensor, "rows drafts"]) -> None:
        self.newest.index_copy_(0, rows, newest)
        self.lengths.index_copy_(0, rows, lengths)
        self.drafts.index_copy_(0, rows, drafts)


class Verified(NamedTuple):
    """What the first graph leaves to the sampling and to the second."""

    logits: Float[Tensor, "samples vocab"]
    hidden: Float[Tensor, "samples dim"]
    step: StepContext
    token_ids: Int[Tensor, "seqs width"]
    """The newest token and the drafts."""
    lengths: Int[Tensor, " seqs"]
    num_samples: Int[Tensor, " seqs"]
    positions: Int[Tensor, " samples"]
    """Of the samples, each one behind the token it follows."""


class DraftStep:
    """The step of one number of sequences and class of context."""

    def __init__(
        self,
        model: Transformer,
        cache: WholeCache,
        state: DraftState,
        experts: ActiveExperts,
        size: int,
        num_blocks: int,
    ) -> None:
        self.model, self.view, self.state = model, cache, state
        self.width = 1 + state.drafts.shape[1]
        device = model.device
        self.numbers = torch.from_numpy(nobody(cache, state, size, num_blocks)).to(device)
        """What the step reads, as `DraftGraphs.layout` makes it."""
        self.samples = torch.zeros(size * self.width, dtype=torch.int64, device=device)
        """What was sampled, for `draft`."""
        self.segments = Segments(
            torch.arange(size + 1, device=device) * self.width, np.full(size, self.width, dtype=np.int64)
        )
        self.contexts = np.full(size, num_blocks * cache.cache.block_size)
        self.active, self.active_drafts = experts.own(size * self.width, device), experts.own(size, device)
        self.verified: Verified | None = None
        self.graphs: tuple[Graph, Graph] | None = None

    @property
    def _tables(self) -> Int[Tensor, "seqs blocks"]:
        return self.numbers[:, NUM_FIELDS + self.width :]

    def verify(self) -> None:
        """Run the newest tokens and the drafts through the model."""
        rows, given, samples, limits, num_slots = self.numbers[:, :NUM_FIELDS].T.contiguous().unbind()
        pending, state = given == 0, self.state
        lengths = torch.where(pending, state.lengths[rows], given)
        newest = torch.cat((state.newest[rows][:, None], state.drafts[rows]), 1)
        token_ids = torch.where(pending[:, None], newest, self.numbers[:, NUM_FIELDS : NUM_FIELDS + self.width])
        samples = torch.minimum(samples, limits - lengths).clamp_min(1)
        column = torch.arange(self.width, device=rows.device)
        positions = lengths[:, None] - 1 + column
        is_real = (column < samples[:, None]) & (positions < num_slots[:, None])
        slots = torch.where(is_real, self._slots(positions), self.view.cache.spare_slot)
        batch = PackedTokens(token_ids.flatten(), positions.flatten(), self.segments)
        seen = lengths + self.width - 1
        view = self.view.cache.step(slots.flatten(), self._tables, seen, self.contexts)
        step = self.model.step(batch, view, activation=self.active)
        hidden = self.model(batch, step=step)
        logits = self.model.logits(hidden)
        self.verified = Verified(logits, hidden, step, token_ids, lengths, samples, (positions + 1).flatten())

    def _slots(self, positions: Int[Tensor, "seqs width"]) -> Int[Tensor, "seqs width"]:
        tables, size = self._tables, self.view.cache.block_size
        return tables.gather(1, (positions // size).clamp_max(tables.shape[1] - 1)) * size + positions % size

    def draft(self) -> None:
        """Accept drafts by `samples`, run the MTP module, and put down the next drafts; see `Runner._draft`."""
        found, model = self.verified, self.model
        assert found is not None, "nothing was verified"
        size = len(found.lengths)
        grid = self.samples.view(size, self.width)
        accepted = num_accepted(grid, found.token_ids.roll(-1, 1), found.num_samples)
        hidden = model.mtp_hidden(0, found.hidden, self.samples, found.step)
        hidden = hidden.view(size, self.width, -1)[torch.arange(size, device=grid.device), accepted]
        drafts = [self.guess(hidden, found.lengths + accepted + 1)]
        for index in range(self.width - 2):
            positions = found.lengths + accepted + index
            cache = self.view.drafting(self._tables, positions, self.numbers[:, 4], self.contexts)
            ones = Segments(torch.arange(size + 1, device=grid.device), np.ones(size, dtype=np.int64))
            step = model.step(PackedTokens(drafts[-1], positions, ones), cache, activation=self.active_drafts)
            hidden = model.mtp_hidden(0, hidden, drafts[-1], step)
            drafts.append(self.guess(hidden, positions + 2))
        newest = grid.gather(1, accepted[:, None]).squeeze(1)
        self.state.write(self.numbers[:, 0], newest, found.lengths + accepted + 1, torch.stack(drafts, 1))

    def guess(self, hidden: Float[Tensor, "seqs dim"], positions: Int[Tensor, " seqs"]) -> Int[Tensor, " seqs"]:
        """The token at each position, as the module says. (A benchmark knows better: hence `positions`.)"""
        return self.model.mtp_logits(0, hidden).argmax(-1)


class DraftGraphs:
    """Records and replays the steps of up to 512 tokens in which every sequence runs its newest token and drafts."""

    make = DraftStep

    def __init__(
        self,
        model: Transformer,
        cache: WholeCache,
        state: DraftState,
        experts: ActiveExperts,
        most: int,
        longest: int,
    ) -> None:
        """Of up to `most` sequences of up to `longest` tokens, with the engine's own number of experts."""
        self.model, self.cache, self.state, self.experts = model, cache, state, experts
        self.width = 1 + state.drafts.shape[1]
        self.sizes = recorded_sizes(most, model.device, model.config.vocab_size, self.width)
        ahead = self.width + cache.lookahead
        """Positions past the known tokens that a step looks at."""
        self.contexts = [length for length in CONTEXTS if length < longest + ahead] + [longest + ahead]
        self._recorded: dict[tuple[int, int], DraftStep] = {}
        self._pool: Any = None

    @property
    def most(self) -> int:
        """Sequences of the largest recorded step."""
        return self.sizes[-1]

    def whole(self, plan: StepPlan) -> StepPlan:
        """The plan as the graphs run it: as many tokens of every sequence, and as many samples."""
        counts = np.full_like(plan.counts, self.width)
        return StepPlan(plan.rows, plan.starts, counts, counts, plan.is_pending)

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """Sequences and longest context of every step, the largest first, whose memory the smaller ones share. None on
        a CPU; see `DecodeGraphs`."""
        if self.model.device.type == "cpu":
            return []
        return [(size, context) for context in reversed(self.contexts) for size in reversed(self.sizes)]

    def record(self, size: int, context: int) -> None:
        """Record one kind, unless that has been done."""
        self._at(size, -(-context // self.cache.cache.block_size))

    def layout(self, plan: StepPlan, table: SequenceTable) -> NDArray[np.int64]:
        """The numbers of a step, as its graphs read them. Length 0 stands for what the device knows."""
        rows, count = plan.rows, len(plan.rows)
        size = next(size for size in self.sizes if size >= count)
        seen = int(plan.starts.max()) + self.width + self.cache.lookahead
        longest = next(length for length in self.contexts if length >= min(seen, self.contexts[-1]))
        num_blocks = -(-longest // self.cache.cache.block_size)
        numbers = nobody(self.cache, self.state, size, num_blocks)
        known = table.num_known[rows]
        fields = rows, np.where(plan.is_pending, 0, known), plan.num_samples, table.max_length[rows]
        numbers[:count, :NUM_FIELDS] = np.stack((*fields, table.num_blocks[rows] * table.block_size), 1)
        columns = np.minimum(known[:, None] - 1 + np.arange(self.width), table.token_ids.shape[1] - 1)
        numbers[:count, NUM_FIELDS : NUM_FIELDS + self.width] = table.token_ids[rows[:, None], columns]
        own = table.blocks[rows, :num_blocks]
        tables = numbers[:count, NUM_FIELDS + self.width :]
        tables[:] = own[:, :1]
        tables[:, : own.shape[1]] = own
        return numbers

    def verify(self, numbers: Tensor) -> Verified:
        """Logits of the step that `layout` laid out, for nobody's sequences too. The next run overwrites them."""
        step = self._of(numbers)
        step.numbers.copy_(numbers)
        assert step.graphs is not None
        step.graphs[0].replay()
        assert step.verified is not None
        return step.verified

    def draft(self, numbers: Tensor, samples: Int[Tensor, " samples"]) -> Int[Tensor, "seqs drafts"]:
        """After `verify`: what was sampled -> the next drafts, of the real sequences."""
        step = self._of(numbers)
        step.samples[: len(samples)].copy_(samples)
        assert step.graphs is not None
        step.graphs[1].replay()
        return self.state.drafts[step.numbers[: len(samples) // self.width, 0]]

    def _of(self, numbers: Tensor) -> DraftStep:
        return self._at(len(numbers), numbers.shape[1] - NUM_FIELDS - self.width)

    def _at(self, size: int, num_blocks: int) -> DraftStep:
        kind = size, num_blocks
        if kind not in self._recorded:
            self._recorded[kind] = self._record(size, num_blocks)
        return self._recorded[kind]

    @torch.no_grad()
    def _record(self, size: int, num_blocks: int) -> DraftStep:
        step = self.make(self.model, self.cache, self.state, self.experts, size, num_blocks)
        first = capture(step.verify, self.model.device, self._pool)
        self._pool = first.pool()
        first.replay()  # what the second one reads while it is recorded
        step.graphs = first, capture(step.draft, self.model.device, self._pool)
        return step


def nobody(cache: WholeCache, state: DraftState, size: int, num_blocks: int) -> NDArray[np.int64]:
    """The numbers of `size` sequences that are nobody's."""
    width, spare = 1 + state.drafts.shape[1], cache.cache.spare_slot
    numbers = np.zeros((size, NUM_FIELDS + width + num_blocks), dtype=np.int64)
    numbers[:, 0], numbers[:, 1:4] = len(state.newest) - 1, (1, 1, 2)
    numbers[:, NUM_FIELDS + width :] = spare // cache.cache.block_size
    return numbers


def why_not_drafts(num_drafts: int) -> str | None:
    """Why steps with so many drafts are not recorded, or None."""
    if num_drafts >= FEW:
        return f"the attention kernel takes {FEW} tokens of a sequence, its newest and {FEW - 1} drafts"
    return None
