"""What stands around the model's part of a step with drafts, each in a pass over the sequences."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import DTYPES, Kernel, refusal
from kogia.ops.drafts import NUM_FIELDS, Accepted, DraftInputs

_inputs = Kernel("kogia_draft_inputs", "4q 4q 3q 8q")
_next_slots = Kernel("kogia_next_slots", "3q 2q 4q 2q")
_accept = Kernel("kogia_accept_drafts", "4q 2q 4q")
_most_likely = Kernel("kogia_most_likely_tokens", "6q")
_put = Kernel("kogia_put_numbers", "4q")


def draft_inputs(
    numbers: Tensor, newest: Tensor, lengths: Tensor, drafts: Tensor, block_size: int, spare_slot: int
) -> DraftInputs:
    seqs, width = len(numbers), 1 + len(drafts)
    tokens = seqs * width
    made = DraftInputs(
        _numbers(seqs), _numbers(tokens).view(seqs, width), _numbers(tokens), _numbers(tokens),
        _numbers(seqs), _numbers(seqs), _numbers(seqs), _numbers(tokens),
    )  # fmt: skip
    _inputs(
        numbers.data_ptr(), numbers.stride(0), seqs, width,
        newest.data_ptr(), lengths.data_ptr(), drafts.data_ptr(), drafts.stride(0),
        numbers.shape[1] - NUM_FIELDS - width, block_size, spare_slot, *(each.data_ptr() for each in made),
    )  # fmt: skip
    return made


def draft_inputs_supports(
    numbers: Tensor, newest: Tensor, lengths: Tensor, drafts: Tensor, block_size: int, spare_slot: int
) -> str | None:
    return refusal(numbers, newest, lengths, drafts, dtypes=(torch.int64,))


def next_slots(
    block_tables: Tensor, positions: Tensor, num_slots: Tensor, block_size: int, spare_slot: int
) -> tuple[Tensor, Tensor]:
    seqs, blocks = block_tables.shape
    slots, seen = _numbers(seqs), _numbers(seqs)
    _next_slots(
        block_tables.data_ptr(), block_tables.stride(0), blocks, positions.data_ptr(), seqs,
        num_slots.data_ptr(), num_slots.stride(0), block_size, spare_slot, slots.data_ptr(), seen.data_ptr(),
    )  # fmt: skip
    return slots, seen


def next_slots_supports(
    block_tables: Tensor, positions: Tensor, num_slots: Tensor, block_size: int, spare_slot: int
) -> str | None:
    if block_tables.stride(1) != 1 or block_tables.dtype != torch.int64 or num_slots.dtype != torch.int64:
        return "it takes block tables of int64 whose rows lie side by side, and numbers of slots in int64"
    return refusal(positions, dtypes=(torch.int64,))


def accept_drafts(samples: Tensor, token_ids: Tensor, num_samples: Tensor, lengths: Tensor) -> Accepted:
    seqs, width = samples.shape
    made = Accepted(_numbers(seqs), _numbers(seqs), _numbers(seqs), _numbers(seqs))
    _accept(
        samples.data_ptr(), token_ids.data_ptr(), seqs, width, num_samples.data_ptr(), lengths.data_ptr(),
        *(each.data_ptr() for each in made),
    )  # fmt: skip
    return made


def accept_drafts_supports(samples: Tensor, token_ids: Tensor, num_samples: Tensor, lengths: Tensor) -> str | None:
    return refusal(samples, token_ids, num_samples, lengths, dtypes=(torch.int64,))


def most_likely_tokens(logits: Tensor) -> Tensor:
    """A pass for the largest, and one for its place."""
    rows, vocab = logits.shape
    tokens = _numbers(rows)
    _most_likely(
        DTYPES[logits.dtype], logits.data_ptr(), rows, vocab, torch.get_num_threads(), tokens.data_ptr()
    )  # fmt: skip
    return tokens


def most_likely_tokens_supports(logits: Tensor) -> str | None:
    return refusal(logits)


def put_numbers(target: Tensor, places: Tensor, numbers: Tensor) -> None:
    _put(target.data_ptr(), places.data_ptr(), len(places), numbers.data_ptr())


def put_numbers_supports(target: Tensor, places: Tensor, numbers: Tensor) -> str | None:
    return refusal(target, places, numbers, dtypes=(torch.int64,))


def _numbers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64)
