"""What stands around the model's part of a step with drafts: what runs and where, which drafts stood, the next guesses.

Each is an operation or two on a handful of numbers, so that calling it takes longer than doing it. On a CPU they are
kernels of their own for that reason.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op

NUM_FIELDS = 5
"""Numbers of a sequence before its tokens, in this order: table row, length, samples that count, greatest length,
slots that it owns."""


class DraftInputs(NamedTuple):
    """What a step runs in which every sequence has its newest token and the drafts behind it."""

    rows: Int[Tensor, " seqs"]
    """Table rows."""
    token_ids: Int[Tensor, "seqs width"]
    positions: Int[Tensor, " tokens"]
    slots: Int[Tensor, " tokens"]
    seen: Int[Tensor, " seqs"]
    """Length of the context, the drafts included."""
    lengths: Int[Tensor, " seqs"]
    """Known tokens, the newest included."""
    num_samples: Int[Tensor, " seqs"]
    """Those that count; at least one."""
    sample_positions: Int[Tensor, " tokens"]
    """Each one behind the token that the sample follows."""


class Accepted(NamedTuple):
    """What a step made of its drafts."""

    places: Int[Tensor, " seqs"]
    """Of the last token that stands, among the tokens of the step: what follows it is sampled, and not yet run."""
    newest: Int[Tensor, " seqs"]
    """What was sampled there."""
    positions: Int[Tensor, " seqs"]
    """Of the newest."""
    lengths: Int[Tensor, " seqs"]
    """Known tokens now, the newest included."""


@op(cpu=("kogia.ops.cpu.drafts",))
def draft_inputs(
    numbers: Int[Tensor, "seqs fields"],
    newest: Int[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    drafts: Int[Tensor, "drafts rows"],
    block_size: int,
    spare_slot: int,
) -> DraftInputs:
    """Lay out a step from the `numbers` of its sequences: `NUM_FIELDS`, then the newest token and the drafts, then the
    block table. Where the length is 0, it and the tokens are what stands in `newest`, `lengths` and `drafts` in the
    sequence's table row. What goes beyond the samples that count, or the slots that a sequence owns, is nobody's."""
    width = 1 + len(drafts)
    rows, given, samples, limits, num_slots = numbers[:, :NUM_FIELDS].T.contiguous().unbind()
    is_pending = given == 0
    known = torch.where(is_pending, lengths[rows], given)
    own = torch.cat((newest[rows][:, None], drafts[:, rows].T), 1)
    token_ids = torch.where(is_pending[:, None], own, numbers[:, NUM_FIELDS : NUM_FIELDS + width])
    samples = torch.minimum(samples, limits - known).clamp_min(1)
    column = torch.arange(width, device=rows.device)
    positions = known[:, None] - 1 + column
    bounds = torch.minimum(known - 1 + samples, num_slots)
    slots = _slots(numbers[:, NUM_FIELDS + width :], positions, bounds, block_size, spare_slot)
    seen, sample_positions = known + width - 1, (positions + 1).flatten()
    return DraftInputs(rows, token_ids, positions.flatten(), slots.flatten(), seen, known, samples, sample_positions)


@op(cpu=("kogia.ops.cpu.drafts",))
def next_slots(
    block_tables: Int[Tensor, "seqs blocks"],
    positions: Int[Tensor, " seqs"],
    num_slots: Int[Tensor, " seqs"],
    block_size: int,
    spare_slot: int,
) -> tuple[Int[Tensor, " seqs"], Int[Tensor, " seqs"]]:
    """(slots, context lengths) of one more token of each sequence, which owns `num_slots`: beyond is nobody's."""
    slots = _slots(block_tables, positions[:, None], num_slots, block_size, spare_slot)
    return slots.squeeze(1), positions + 1


@op(cpu=("kogia.ops.cpu.drafts",))
def accept_drafts(
    samples: Int[Tensor, "seqs width"],
    token_ids: Int[Tensor, "seqs width"],
    num_samples: Int[Tensor, " seqs"],
    lengths: Int[Tensor, " seqs"],
) -> Accepted:
    """Which drafts stand: `token_ids` are those that ran, the newest token and then the drafts, and a sample stands
    behind each. Of the samples the first `num_samples` count, and `lengths` tokens were known."""
    seqs, width = samples.shape
    accepted = num_accepted(samples, token_ids.roll(-1, 1), num_samples)
    places = torch.arange(seqs, device=samples.device) * width + accepted
    positions = lengths + accepted
    return Accepted(places, samples.flatten()[places], positions, positions + 1)


@op(cpu=("kogia.ops.cpu.drafts",))
def most_likely_tokens(logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
    """The place of the largest logit of each row, the first of equal ones."""
    return logits.argmax(-1)


@op(cpu=("kogia.ops.cpu.drafts",))
def put_numbers(target: Int[Tensor, " rows"], places: Int[Tensor, " some"], numbers: Int[Tensor, " some"]) -> None:
    """Write numbers where they belong."""
    target.index_copy_(0, places, numbers)


def num_accepted(
    samples: Int[Tensor, "seqs width"], drafts: Int[Tensor, "seqs width"], num_samples: Int[Tensor, " seqs"]
) -> Int[Tensor, " seqs"]:
    """Drafts that stand. `drafts[s, j]` is the guess which sample j of sequence s decides on, for all of its
    `num_samples` but the last; what stands beyond means nothing."""
    column = torch.arange(samples.shape[1], device=samples.device)
    right = (samples == drafts) & (column < num_samples[:, None] - 1)
    return right.long().cumprod(1).sum(1)


def _slots(
    block_tables: Int[Tensor, "seqs blocks"],
    positions: Int[Tensor, "seqs some"],
    bounds: Int[Tensor, " seqs"],
    block_size: int,
    spare_slot: int,
) -> Int[Tensor, "seqs some"]:
    """Of positions below each sequence's bound; the others get nobody's."""
    blocks = (positions // block_size).clamp_max(block_tables.shape[1] - 1)
    slots = block_tables.gather(1, blocks) * block_size + positions % block_size
    return torch.where(positions < bounds[:, None], slots, spare_slot)
