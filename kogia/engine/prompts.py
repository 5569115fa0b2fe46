"""Prompts as recorded steps, on a CPU: a small model's prompt takes longer between the kernels than in them.

A step in which one sequence alone runs several tokens and samples the next is recorded when its size comes up for the
second time: a prompt, or what is left of one behind a cached prefix or its other chunks. Sizes are few, and what a step
has fewer tokens is filled up by nobody's sequence, which changes no bit of the others: kernels compute row by row.
A recording keeps all memory that its kernels name, so there is a budget, and those used longest ago go.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kogia.engine.activation import ActiveExperts
from kogia.engine.drafting import DraftState, drafts_behind
from kogia.engine.graphs import tokens_on_cpu
from kogia.engine.inputs import Arrived
from kogia.engine.sequences import SequenceTable
from kogia.engine.step import StepPlan
from kogia.engine.views import WholeCache
from kogia.model.packed import PackedTokens
from kogia.model.transformer import Transformer
from kogia.ops.cpu.record import Recording, recording
from kogia.ops.drafts import accept_drafts, most_likely_tokens, put_numbers
from kogia.ops.embed import embed
from kogia.ops.sample import counter_uniforms, sample
from kogia.ops.segments import Segments

MEMORY = 64 << 20
"""Bytes that the recordings of an engine may keep."""
_MOST = 128
"""Tokens up to which all that a step computes is done by kernels, row by row."""


def prompt_sizes(vocab_size: int) -> list[int]:
    """Numbers of tokens of recorded prompts, four from each power of two to the next."""
    sizes = {size for step in (4, 8, 16) for size in range(step, 8 * step + 1, step)}
    return sorted(size for size in sizes if size <= min(_MOST, tokens_on_cpu(vocab_size)))


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What prompts run on and write to."""

    model: Transformer
    view: WholeCache
    newest: Int[Tensor, " rows"]
    """The runner's: what each sequence sampled last."""
    state: DraftState | None
    """Where steps may draft: what they leave of it."""
    experts: ActiveExperts
    longest: int
    """The most tokens of a sequence."""


class PromptStep:
    """The step of one number of tokens."""

    def __init__(self, around: Surroundings, size: int, *, drafts: bool) -> None:
        self.model, self.view, self.newest = around.model, around.view, around.newest
        self.state = around.state if drafts else None
        cache, experts, longest = around.view.cache, around.experts, around.longest + 1 + around.view.lookahead
        self.inputs = torch.zeros(4, size, dtype=torch.int64)
        """Tokens, positions, slots and next tokens."""
        self.numbers = torch.zeros(5, 1, dtype=torch.int64)
        """Table row, known tokens, slots owned, place of the last token, seed."""
        self.top_k, self.drawing = torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1)
        """How the sample is drawn: top-k; and temperature, top-p, min-p."""
        self.bounds, self.lens = torch.tensor([0, size, size]), torch.ones(2, dtype=torch.int64)
        """Of the sequence and of nobody's: where they begin and end, and their contexts."""
        num_blocks = -(-max(longest, size) // cache.block_size)
        self.tables = torch.full((2, num_blocks), cache.spare_slot // cache.block_size)
        """The same for their blocks."""
        self.contexts = np.full(2, num_blocks * cache.block_size)
        self.active, self.active_drafts = (experts.own(count, around.model.device) for count in (size, 1))
        self.single, self.one = Segments(torch.arange(2), np.ones(1, dtype=np.int64)), torch.ones(1, dtype=torch.int64)
        self.found: list[Tensor] = []
        """Token, log-probability and drafts."""
        self.recording: Recording | None = None

    @property
    def num_bytes(self) -> int:
        """Kept by the recording."""
        return 0 if self.recording is None else self.recording.num_bytes

    def fill(self, plan: StepPlan, table: SequenceTable) -> None:
        """Lay out what a plan runs."""
        row, start, count = int(plan.rows[0]), int(plan.starts[0]), int(plan.counts[0])
        end, block_size, settings = start + count, table.block_size, table.settings(plan.rows)
        inputs, tables, positions = self.inputs.numpy(), self.tables.numpy(), np.arange(start, end)
        inputs[:2, count:], inputs[2, count:], inputs[3, count:] = 0, self.view.cache.spare_slot, 0
        inputs[0, :count], inputs[1, :count] = table.token_ids[row, start:end], positions
        inputs[2, :count] = table.blocks[row, positions // block_size] * block_size + positions % block_size
        inputs[3, :count] = table.token_ids[row, start + 1 : end + 1]
        own = table.blocks[row, : tables.shape[1]]
        tables[0, : len(own)], tables[0, len(own) :] = own, own[0]
        self.bounds.numpy()[1], self.lens.numpy()[:] = count, (end, max(1, inputs.shape[1] - count))
        asked = row, end, int(table.num_blocks[row]) * block_size, count - 1, int(settings.seed[0])
        self.numbers.numpy()[:, 0], self.top_k.numpy()[0] = asked, settings.top_k[0]
        self.drawing.numpy()[:, 0] = settings.temperature[0], settings.top_p[0], settings.min_p[0]

    def play(self) -> None:
        """Run what was laid out: recorded the first time, replayed from then on."""
        if self.recording is None:
            with recording() as made:
                self._run()
            self.recording = made
        else:
            self.recording.replay()

    def _run(self) -> None:
        model, state = self.model, self.state
        (tokens, positions, slots, next_ids), (row, known, num_slots, place, seed) = self.inputs, self.numbers
        temperature, top_p, min_p = self.drawing
        bound = Segments(self.bounds, np.array([len(tokens) - 1, 1]))  # lengths in all; kernels read `bounds`
        batch, view = (
            PackedTokens(tokens, positions, bound),
            self.view.cache.step(slots, self.tables, self.lens, self.contexts),
        )
        step = model.step(batch, view, activation=self.active)
        hidden = model(batch, step=step)
        logits = model.logits(embed(place, hidden))
        token, logprob = sample(logits, temperature, counter_uniforms(seed, known), self.top_k, top_p, min_p)
        self.found = [token, logprob]
        if state is None:
            put_numbers(self.newest, row, token)
            return
        put_numbers(next_ids, place, token)
        step = replace(step, activation=self.active_drafts)
        hidden = model.mtp_hidden(0, hidden, next_ids, step, place)
        accepted = accept_drafts(token[:, None], token[:, None], self.one, known)
        drafts = drafts_behind(
            model,
            self.view,
            hidden,
            accepted.positions,
            lambda hidden, _: most_likely_tokens(model.mtp_logits(0, hidden)),
            len(state.drafts),
            tables=self.tables[:1],
            num_slots=num_slots,
            contexts=self.contexts[:1],
            single=self.single,
            activation=self.active_drafts,
        )
        self.found += drafts
        state.write(row, accepted.newest, accepted.lengths, drafts)


class Prompts:
    """Records and replays the steps of single prompts."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.sizes = prompt_sizes(around.model.config.vocab_size)
        self._seen: set[tuple[int, bool]] = set()
        """Sizes, with drafts and without, that were asked for and are not recorded."""
        self._recorded: dict[tuple[int, bool], PromptStep] = {}
        """Those used longest ago first."""

    @property
    def num_bytes(self) -> int:
        """Kept by the recordings."""
        return sum(step.num_bytes for step in self._recorded.values())

    def takes(self, plan: StepPlan, table: SequenceTable, *, drafts: bool) -> bool:
        """Whether a step is recorded or replayed. The first of its size is not: it may be the only one, and what is
        made once for all steps must not be a part of one."""
        if len(plan.rows) != 1 or plan.num_samples[0] != 1 or not 1 < plan.num_tokens <= self.sizes[-1]:
            return False
        settings = table.settings(plan.rows)
        is_plain = not (settings.ruled or settings.has_top or settings.is_traced or table.scored(plan).any())
        if not is_plain or plan.is_pending[0] or not self.around.experts.are_own(table, plan.rows):
            return False
        kind = self._size(plan), drafts
        if kind in self._recorded or kind in self._seen:
            return True
        self._seen.add(kind)
        return False

    def run(self, plan: StepPlan, table: SequenceTable, *, drafts: bool) -> Arrived:
        """A step that `takes` said yes to, as a whole: token, log-probability and the next drafts."""
        kind = size, _ = self._size(plan), drafts
        step = self._recorded.pop(kind, None)
        if step is None:
            step = PromptStep(self.around, size, drafts=drafts)
        step.fill(plan, table)
        step.play()
        self._keep(kind, step)
        token, logprob, *guesses = (each.numpy().copy() for each in step.found)
        found = {"tokens": token, "logprobs": logprob}
        return Arrived(found | {"drafts": np.stack(guesses, 1)} if drafts else found)

    def _size(self, plan: StepPlan) -> int:
        return self.sizes[bisect_left(self.sizes, plan.num_tokens)]

    def _keep(self, kind: tuple[int, bool], step: PromptStep) -> None:
        """As the one used last, and within the budget."""
        self._seen.discard(kind)
        self._recorded[kind] = step
        if step.num_bytes > MEMORY:
            self.sizes = [size for size in self.sizes if size < kind[0]]
        while self.num_bytes > MEMORY:
            del self._recorded[next(iter(self._recorded))]
