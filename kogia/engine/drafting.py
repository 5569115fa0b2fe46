"""Decode steps with drafts as recorded graphs: verify, then accept and draft on, without the host.

Every sequence runs its newest token and the k tokens drafted behind it. One graph is the model's part; sampling comes
behind it, as its settings differ from request to request; another graph counts the drafts that stand, runs the MTP
module and leaves newest token, length and next drafts where the next step finds them. So the next step can be launched
before anyone knows how many drafts stood.

On a CPU sampling is recorded as well, and all three are one graph. The host then fills in the numbers where they are
read, and reads the tokens where they stand: between the two there is no Python but one call.

A sequence with fewer drafts than k, near its end or after a step without drafts, runs all the same: what is too much is
written to nobody's slot, and its samples do not count.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.activation import ActiveExperts
from kogia.engine.graphs import CONTEXTS, Drawing, Graph, Recorder, recorded_sizes
from kogia.engine.inputs import Arrived
from kogia.engine.sequences import SequenceTable, Settings
from kogia.engine.step import StepPlan
from kogia.engine.views import WholeCache
from kogia.model.layers import StepContext
from kogia.model.packed import PackedTokens
from kogia.model.transformer import Transformer
from kogia.ops.drafts import (
    NUM_FIELDS,
    DraftInputs,
    accept_drafts,
    draft_inputs,
    most_likely_tokens,
    put_numbers,
)
from kogia.ops.moe import Activation
from kogia.ops.prefill import FEW
from kogia.ops.sample import counter_uniforms, sample
from kogia.ops.segments import Segments


class DraftState:
    """What the device knows of each row of the sequence table; a last row is nobody's."""

    def __init__(self, newest: Int[Tensor, " rows"], num_drafts: int) -> None:
        """`newest` is the runner's: the token that each sequence sampled last."""
        self.newest = newest
        self.lengths = torch.ones_like(newest)
        """[rows] known tokens, the newest included."""
        self.drafts = newest.new_zeros(num_drafts, len(newest))
        """[drafts, rows] guesses at what follows."""

    def write(self, rows: Tensor, newest: Tensor, lengths: Tensor, drafts: list[Int[Tensor, " seqs"]]) -> None:
        targets = (self.newest, self.lengths, *self.drafts.unbind())
        for target, numbers in zip(targets, (newest, lengths, *drafts), strict=True):
            put_numbers(target, rows, numbers)


class Verified(NamedTuple):
    """What the first graph leaves to the sampling and to the last."""

    logits: Float[Tensor, "samples vocab"]
    hidden: Float[Tensor, "samples dim"]
    step: StepContext
    inputs: DraftInputs


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
        self.width = 1 + len(state.drafts)
        device, tokens = model.device, size * self.width
        self.nobody = nobody(cache, state, num_blocks)
        self.numbers = torch.from_numpy(np.tile(self.nobody, (size, 1))).to(device)
        """What the step reads, as `DraftGraphs.layout` makes it."""
        self.host = np.empty(0, dtype=np.int64) if device.type != "cpu" else self.numbers.numpy()
        """The same where a CPU reads it."""
        self.samples = torch.zeros(tokens, dtype=torch.int64, device=device)
        """What was sampled, for `draft`."""
        self.logprobs = torch.zeros(tokens, device=device)
        """What `draw` says of `samples`."""
        self.drawing = Drawing.greedy(tokens, device)
        self._settings: Settings | None = None
        """Those that `drawing` is of."""
        self.segments, self.ones = (
            Segments(torch.arange(size + 1, device=device) * length, np.full(size, length, dtype=np.int64))
            for length in (self.width, 1)
        )
        self.contexts = np.full(size, num_blocks * cache.cache.block_size)
        self.active, self.active_drafts = experts.own(tokens, device), experts.own(size, device)
        self.verified: Verified | None = None
        self.graphs: RecordedDrafts | Graph | None = None
        """A single one where drawing is a part of it."""

    @property
    def _tables(self) -> Int[Tensor, "seqs blocks"]:
        return self.numbers[:, NUM_FIELDS + self.width :]

    def verify(self) -> None:
        """Run the newest tokens and the drafts through the model."""
        state, cache = self.state, self.view.cache
        found = draft_inputs(
            self.numbers, state.newest, state.lengths, state.drafts, cache.block_size, cache.spare_slot
        )
        batch = PackedTokens(found.token_ids.flatten(), found.positions, self.segments)
        view = cache.step(found.slots, self._tables, found.seen, self.contexts)
        step = self.model.step(batch, view, activation=self.active)
        hidden = self.model(batch, step=step)
        self.verified = Verified(self.model.logits(hidden), hidden, step, found)

    def draw(self) -> None:
        """Sample behind every token that was run."""
        found, (seeds, temperature, *filters) = self.verified, self.drawing
        assert found is not None, "nothing was verified"
        uniforms = counter_uniforms(seeds, found.inputs.sample_positions)
        self.samples, self.logprobs = sample(found.logits, temperature, uniforms, *filters)

    def draft(self) -> None:
        """Accept drafts by `samples`, run the MTP module, and put down the next drafts; see `Runner._draft`."""
        found, model, size = self.verified, self.model, len(self.numbers)
        assert found is not None, "nothing was verified"
        inputs = found.inputs
        samples = self.samples.view(size, self.width)
        accepted = accept_drafts(samples, inputs.token_ids, inputs.num_samples, inputs.lengths)
        step = replace(found.step, activation=self.active_drafts)
        hidden = model.mtp_hidden(0, found.hidden, self.samples, step, accepted.places)
        drafts = drafts_behind(
            model,
            self.view,
            hidden,
            accepted.positions,
            self.guess,
            self.width - 1,
            tables=self._tables,
            num_slots=self.numbers[:, 4],
            contexts=self.contexts,
            single=self.ones,
            activation=self.active_drafts,
        )
        self.state.write(inputs.rows, accepted.newest, accepted.lengths, drafts)

    def guess(self, hidden: Float[Tensor, "seqs dim"], positions: Int[Tensor, " seqs"]) -> Int[Tensor, " seqs"]:
        """The token behind each position, as the module says. (A benchmark knows better: hence `positions`.)"""
        return most_likely_tokens(self.model.mtp_logits(0, hidden))

    def whole(self) -> None:
        """All of the step, on a CPU."""
        self.verify()
        self.draw()
        self.draft()

    def take_settings(self, settings: Settings) -> None:
        """Draw as these requests ask for; nobody draws greedily."""
        if settings is self._settings:
            return
        count = len(settings.rows) * self.width
        asked = settings.seed, settings.temperature, settings.top_k, settings.top_p, settings.min_p
        for target, values in zip(self.drawing, asked, strict=True):
            target.numpy()[:count] = np.repeat(values, self.width)
        self.drawing.temperature[count:] = 0
        put_settings(self.host, settings)
        self.host[len(settings.rows) :] = self.nobody
        self._settings = settings


class RecordedDrafts(NamedTuple):
    """A step's parts in their order; the host draws in between."""

    verify: Graph
    draft: Graph


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
        self.draws = model.device.type == "cpu"
        """Whether `run` makes steps whole: drawing is recorded with them."""
        self.width = 1 + len(state.drafts)
        self._columns = np.arange(-1, self.width - 1)
        self.sizes = recorded_sizes(most, model.device, model.config.vocab_size, self.width)
        ahead = self.width + cache.lookahead
        """Positions past the known tokens that a step looks at."""
        self.contexts = [length for length in CONTEXTS if length < longest + ahead] + [longest + ahead]
        self._recorded: dict[tuple[int, int], DraftStep] = {}
        self.recorder = Recorder(model.device)
        self._drafts = state.drafts.numpy() if self.draws else np.empty((0, 0), dtype=np.int64)
        """Those of `state`, where the host may read them."""

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
        if self.draws:
            return []
        return [(size, context) for context in reversed(self.contexts) for size in reversed(self.sizes)]

    def record(self, size: int, context: int) -> None:
        """Record one kind, unless that has been done."""
        self._at(size, self._num_blocks(context))

    def rehearse(self, size: int, context: int, recorder: Recorder) -> None:
        """Go through the recording of one kind."""
        self._record(size, self._num_blocks(context), recorder)

    def run(self, plan: StepPlan, table: SequenceTable) -> Arrived:
        """A whole step on a CPU: tokens and log-probabilities of the real sequences, as many of each, and their next
        drafts."""
        size, num_blocks = self._kind(plan)
        step = self._at(size, num_blocks)
        step.take_settings(table.settings(plan.rows))
        self._fill(step.host, plan, table)
        assert not (step.graphs is None or isinstance(step.graphs, RecordedDrafts)), "recorded in one"
        step.graphs.replay()
        count = len(plan.rows) * self.width
        tokens, logprobs = step.samples.numpy()[:count].copy(), step.logprobs.numpy()[:count].copy()
        return Arrived({"tokens": tokens, "logprobs": logprobs, "drafts": self._drafts[:, plan.rows].T})

    def layout(self, plan: StepPlan, table: SequenceTable) -> NDArray[np.int64]:
        """The numbers of a step, as its graphs read them."""
        size, num_blocks = self._kind(plan)
        numbers = np.tile(nobody(self.cache, self.state, num_blocks), (size, 1))
        put_settings(numbers, table.settings(plan.rows))
        self._fill(numbers, plan, table)
        return numbers

    def _kind(self, plan: StepPlan) -> tuple[int, int]:
        """Sequences and blocks of the step that a plan runs as."""
        size, context = self.sizes[bisect_left(self.sizes, len(plan.rows))], self.contexts[-1]
        if len(self.contexts) > 1:
            seen = min(int(plan.starts.max()) + self.width + self.cache.lookahead, context)
            context = self.contexts[bisect_left(self.contexts, seen)]
        return size, self._num_blocks(context)

    def _num_blocks(self, context: int) -> int:
        return -(-context // self.cache.cache.block_size)

    def _fill(self, numbers: NDArray[np.int64], plan: StepPlan, table: SequenceTable) -> None:
        """Lay out what differs from step to step. Length 0 stands for what the device knows."""
        rows, known, tokens = plan.rows, table.num_known[plan.rows], slice(NUM_FIELDS, NUM_FIELDS + self.width)
        fields = numbers[: len(rows)]
        fields[:, 1], fields[:, 2] = known, plan.num_samples
        fields[plan.is_pending, 1] = 0
        fields[:, 4] = table.num_blocks[rows] * table.block_size
        fields[:, tokens] = table.token_ids[rows[:, None], known[:, None] + self._columns]
        tables = fields[:, tokens.stop :]
        own = table.blocks[rows, : tables.shape[1]]
        width = own.shape[1]
        tables[:, :width] = own
        if width < tables.shape[1]:
            tables[:, width:] = own[:, :1]

    def verify(self, numbers: Tensor) -> Verified:
        """Logits of the step that `layout` laid out, for nobody's sequences too. The next run overwrites them."""
        step = self._of(numbers)
        step.numbers.copy_(numbers)
        assert isinstance(step.graphs, RecordedDrafts)
        step.graphs.verify.replay()
        assert step.verified is not None
        return step.verified

    def draft(self, numbers: Tensor, samples: Int[Tensor, " samples"]) -> Int[Tensor, "seqs drafts"]:
        """After `verify`: what was sampled -> the next drafts, of the real sequences."""
        step = self._of(numbers)
        step.samples[: len(samples)].copy_(samples)
        assert isinstance(step.graphs, RecordedDrafts)
        step.graphs.draft.replay()
        return self.state.drafts[:, step.numbers[: len(samples) // self.width, 0]].T

    def _of(self, numbers: Tensor) -> DraftStep:
        return self._at(len(numbers), numbers.shape[1] - NUM_FIELDS - self.width)

    def _at(self, size: int, num_blocks: int) -> DraftStep:
        kind = size, num_blocks
        if kind not in self._recorded:
            self._recorded[kind] = self._record(size, num_blocks, self.recorder)
        return self._recorded[kind]

    @torch.no_grad()
    def _record(self, size: int, num_blocks: int, recorder: Recorder) -> DraftStep:
        step = self.make(self.model, self.cache, self.state, self.experts, size, num_blocks)
        if self.draws:
            step.graphs = recorder.capture(step.whole)
            return step
        verify = recorder.capture(step.verify)
        verify.replay()  # what the other reads while it is recorded
        step.graphs = RecordedDrafts(verify, recorder.capture(step.draft))
        return step


def drafts_behind(
    model: Transformer,
    view: WholeCache,
    hidden: Float[Tensor, "seqs dim"],
    positions: Int[Tensor, " seqs"],
    guess: Callable[[Tensor, Tensor], Tensor],
    number: int,
    *,
    tables: Int[Tensor, "seqs blocks"],
    num_slots: Int[Tensor, " seqs"],
    contexts: NDArray[np.int64],
    single: Segments,
    activation: Activation | None,
) -> list[Int[Tensor, " seqs"]]:
    """`number` tokens behind the newest ones, which stand at `positions` and of which the MTP module made `hidden`.
    `single` has one token of each sequence; the rest is as in `CacheView.drafting`."""
    drafts = [guess(hidden, positions)]
    for _ in range(number - 1):
        cache = view.drafting(tables, positions, num_slots, contexts)
        step = model.step(PackedTokens(drafts[-1], positions, single), cache, activation=activation)
        hidden = model.mtp_hidden(0, hidden, drafts[-1], step)
        positions = cache.layers[0].context_lens  # the next one stands where this context ends
        drafts.append(guess(hidden, positions))
    return drafts


def put_settings(numbers: NDArray[np.int64], settings: Settings) -> None:
    """Lay out what stays as it is while the same sequences run."""
    count = len(settings.rows)
    numbers[:count, 0], numbers[:count, 3] = settings.rows, settings.max_length


def nobody(cache: WholeCache, state: DraftState, num_blocks: int) -> NDArray[np.int64]:
    """The numbers of a sequence that is nobody's."""
    width, spare = 1 + len(state.drafts), cache.cache.spare_slot
    numbers = np.zeros(NUM_FIELDS + width + num_blocks, dtype=np.int64)
    numbers[0], numbers[1:4] = len(state.newest) - 1, (1, 1, 2)
    numbers[NUM_FIELDS + width :] = spare // cache.cache.block_size
    return numbers


def why_not_drafts(num_drafts: int) -> str | None:
    """Why steps with so many drafts are not recorded, or None."""
    if num_drafts >= FEW:
        return f"the attention kernel takes {FEW} tokens of a sequence, its newest and {FEW - 1} drafts"
    return None
