"""The rules of a step's requests, carried to the logits they are of."""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from kogia.engine.inputs import Upload
from kogia.engine.rules import NO_PENALTIES, Edit
from kogia.engine.sequences import SequenceTable
from kogia.engine.step import StepPlan
from kogia.ops.adjust import Bias, Masks, Penalties, adjust_logits


def put_rules(upload: Upload, table: SequenceTable, plan: StepPlan, vocab: int) -> None:
    """Add to a step's upload what `steer` needs; nothing where no request has rules."""
    ruled = table.is_ruled[plan.rows]
    if not ruled.any():
        return
    firsts = np.cumsum(plan.num_samples) - plan.num_samples
    edits: dict[int, Edit] = {}
    for index in np.flatnonzero(ruled & (plan.num_samples > 0)).tolist():
        edits.update(enumerate(_edits(table, int(plan.rows[index]), int(plan.num_samples[index])), int(firsts[index])))
    _put_penalties(upload, edits, int(plan.num_samples.sum()), vocab)
    bias = [(row * vocab + token, value) for row, edit in edits.items() for token, value in edit.bias.items()]
    if bias:
        upload.put("bias_at", np.array([at for at, _ in bias]))
        upload.put("bias", np.array([value for _, value in bias], dtype=np.float32))
    masks = {row: edit.mask for row, edit in edits.items() if edit.mask is not None}
    if masks:
        upload.put("mask_rows", np.array(list(masks)))
        upload.put("masks", np.stack(list(masks.values())))
    bans = [row * vocab + token for row, edit in edits.items() for token in edit.bans]
    if bans:
        upload.put("bans", np.array(bans))


def _edits(table: SequenceTable, row: int, num_samples: int) -> list[Edit]:
    request = table.requests[row]
    assert request is not None and request.rules is not None
    start, known = len(request.prompt), int(table.num_known[row])
    drafts = table.token_ids[row, known : known + num_samples - 1]
    pending = int(table.num_pending[row]) - 1  # the plan counts its own sample among them
    return request.rules.edits(table.token_ids[row, start:known], drafts, pending)


def _put_penalties(upload: Upload, edits: dict[int, Edit], num_samples: int, vocab: int) -> None:
    seen = {row: edit for row, edit in edits.items() if edit.counts}
    if not seen:
        return
    counts = [edit.counts for edit in seen.values()]
    upload.put("seen_at", np.concatenate([row * vocab + np.fromiter(each, int) for row, each in zip(seen, counts)]))
    upload.put("seen_counts", np.concatenate([np.fromiter(each.values(), int) for each in counts]))
    for column, name in enumerate(("repetition", "frequency", "presence")):
        values = np.full(num_samples, NO_PENALTIES[column], dtype=np.float32)
        values[list(seen)] = [edit.penalties[column] for edit in seen.values()]
        upload.put(name, values)


def steer(upload: Upload, logits: Float[Tensor, "samples vocab"]) -> Float[Tensor, "samples vocab"]:
    """The logits as the rules want them; themselves where there is none."""
    has_bias, has_seen, has_masks = (name in upload for name in ("bias", "seen_at", "masks"))
    bans = upload.get("bans")
    if not (has_bias or has_seen or has_masks or bans is not None):
        return logits
    return adjust_logits(
        logits,
        Bias(upload["bias_at"], upload["bias"]) if has_bias else None,
        Penalties(*(upload[name] for name in ("seen_at", "seen_counts", "repetition", "frequency", "presence")))
        if has_seen
        else None,
        Masks(upload["mask_rows"], upload["masks"]) if has_masks else None,
        bans,
    )
