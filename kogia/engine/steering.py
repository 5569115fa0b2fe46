"""The rules of a step's requests, carried to the logits they are of."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.inputs import Upload
from kogia.engine.rules import NO_PENALTIES, Edit
from kogia.engine.sequences import SequenceTable
from kogia.engine.step import StepPlan
from kogia.ops.adjust import Bias, Masks, Penalties


class Edits(NamedTuple):
    """What happens to a step's logits, as `kogia.ops.adjust.sample_adjusted` takes it."""

    bias: Bias | None
    penalties: Penalties | None
    masks: Masks | None
    bans: Tensor | None


def put_rules(upload: Upload, table: SequenceTable, plan: StepPlan, vocab: int) -> None:
    """Add to a step's upload what `edits_of` needs; nothing where no request has rules."""
    for name, array in rule_arrays(table, plan, vocab).items():
        upload.put(name, array)


def rule_arrays(table: SequenceTable, plan: StepPlan, vocab: int) -> dict[str, NDArray]:
    """What the rules of a step's requests say, by the names that `edits_of` looks for."""
    edits: dict[int, Edit] = {}
    for index in table.settings(plan.rows).ruled:
        if count := int(plan.num_samples[index]):
            first = index if plan.only_decodes else int(plan.num_samples[:index].sum())
            edits.update(enumerate(_edits(table, int(plan.rows[index]), count), first))
    arrays: dict[str, NDArray] = {}
    bias = [(row * vocab + token, value) for row, edit in edits.items() for token, value in edit.bias.items()]
    if bias:
        arrays["bias_at"] = np.array([at for at, _ in bias])
        arrays["bias"] = np.array([value for _, value in bias], dtype=np.float32)
    seen = [row for row, edit in edits.items() if edit.counts]
    if seen:
        arrays |= _penalties(edits, seen, int(plan.num_samples.sum()), vocab)
    masked = [(row, edit.mask) for row, edit in edits.items() if edit.mask is not None]
    if masked:
        arrays["mask_rows"], arrays["masks"] = (np.array(each) for each in zip(*masked, strict=True))
    bans = [row * vocab + token for row, edit in edits.items() for token in edit.bans]
    if bans:
        arrays["bans"] = np.array(bans)
    return arrays


def _edits(table: SequenceTable, row: int, num_samples: int) -> list[Edit]:
    request = table.requests[row]
    assert request is not None and request.rules is not None
    start, known = len(request.prompt), int(table.num_known[row])
    drafts = table.token_ids[row, known : known + num_samples - 1]
    pending = int(table.num_pending[row]) - 1  # the plan counts its own sample among them
    return request.rules.edits(table.token_ids[row, start:known], drafts, pending)


def _penalties(edits: Mapping[int, Edit], seen: list[int], num_samples: int, vocab: int) -> dict[str, NDArray]:
    """Of the samples whose penalties apply to something."""
    counts = [edits[row].counts for row in seen]
    arrays = {
        "seen_at": np.concatenate([row * vocab + np.fromiter(each, int) for row, each in zip(seen, counts)]),
        "seen_counts": np.concatenate([np.fromiter(each.values(), int) for each in counts]),
    }
    for column, name in enumerate(("repetition", "frequency", "presence")):
        values = np.full(num_samples, NO_PENALTIES[column], dtype=np.float32)
        values[seen] = [edits[row].penalties[column] for row in seen]
        arrays[name] = values
    return arrays


def edits_of(given: Upload | Mapping[str, Tensor]) -> Edits | None:
    """What `rule_arrays` has put down; None where there is nothing."""
    bias = Bias(given["bias_at"], given["bias"]) if "bias" in given else None
    names = ("seen_at", "seen_counts", "repetition", "frequency", "presence")
    penalties = Penalties(*(given[name] for name in names)) if "seen_at" in given else None
    masks = Masks(given["mask_rows"], given["masks"]) if "masks" in given else None
    bans = given.get("bans")
    has_any = bias is not None or penalties is not None or masks is not None or bans is not None
    return Edits(bias, penalties, masks, bans) if has_any else None
