"""What comes back beside samples: log-probabilities of a prompt's tokens and of the likeliest ones, and experts."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kogia.engine.config import MOST_LOGPROBS
from kogia.engine.inputs import Upload
from kogia.engine.request import num_top
from kogia.engine.sequences import SequenceTable
from kogia.engine.step import StepPlan
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer
from kogia.ops.sample import most_likely, token_logprobs

PROMPT_LOGITS_BYTES = 64 << 20
"""Most bytes of float32 logits of a prompt that exist at once."""


def put_scoring(upload: Upload, table: SequenceTable, plan: StepPlan) -> None:
    """Add to a step's upload which samples bring their likeliest tokens; nothing where none does."""
    if table.num_top[plan.rows].any():
        upload.put("top_rows", np.flatnonzero(table.num_top[np.repeat(plan.rows, plan.num_samples)]))


def top_tokens(upload: Upload, logits: Float[Tensor, "samples vocab"]) -> dict[str, Tensor]:
    """The likeliest tokens in place of these samples: always as many, so that a tie goes to the same ones."""
    rows = upload.get("top_rows")
    if rows is None:
        return {}
    ids, logprobs = most_likely(logits[rows], upload["temperature"][rows], min(MOST_LOGPROBS, logits.shape[1]))
    return {"top_ids": ids, "top_logprobs": logprobs}


def put_prompt_scoring(upload: Upload, table: SequenceTable, plan: StepPlan) -> None:
    """Add to a step's upload which of its tokens are followed by one of a prompt that is to be scored."""
    if not table.num_scored[plan.rows].any():
        return
    scored = table.scored(plan)
    rows, offsets = (
        np.repeat(plan.rows, scored),
        np.arange(scored.sum()) - np.repeat(np.cumsum(scored) - scored, scored),
    )
    upload.put("scored_rows", np.repeat(np.cumsum(plan.counts) - plan.counts, scored) + offsets)
    upload.put("scored_targets", table.token_ids[rows, np.repeat(plan.starts, scored) + offsets + 1])
    upload.put("scored_temperature", table.temperature[rows])


def prompt_scores(
    model: Transformer, upload: Upload, hidden: Float[Tensor, "tokens dim"], *, has_top: bool
) -> dict[str, Tensor]:
    """Log-probabilities of the prompts' tokens that this step's tokens precede; with the likeliest in their place."""
    rows = upload.get("scored_rows")
    if rows is None or not len(rows):
        return {}
    size = max(1, PROMPT_LOGITS_BYTES // (4 * model.config.vocab_size))
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        logits, temperature = model.logits(hidden[rows[part]]), upload["scored_temperature"][part]
        found = {"prompt_logprobs": token_logprobs(logits, temperature, upload["scored_targets"][part])}
        if has_top:
            ids, logprobs = most_likely(logits, temperature, min(MOST_LOGPROBS, logits.shape[1]))
            found |= {"prompt_top_ids": ids, "prompt_top_logprobs": logprobs}
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def wants_prompt_top(table: SequenceTable, plan: StepPlan) -> bool:
    """Whether a prompt in the plan is to be scored with the likeliest tokens."""
    requests = [table.requests[row] for row in plan.rows[table.num_scored[plan.rows] > 0]]
    return any(request is not None and num_top(request.params.prompt_logprobs) for request in requests)


def put_tracing(upload: Upload, table: SequenceTable, plan: StepPlan) -> None:
    """Add to a step's upload which of its tokens have their experts reported; nothing where none has."""
    if table.is_traced[plan.rows].any():
        upload.put("traced_rows", np.flatnonzero(np.repeat(table.is_traced[plan.rows], plan.counts)))


def routes(upload: Upload, routing: Routing | None) -> dict[str, Tensor]:
    """Experts of these tokens in the mixtures that have run so far: the main model's."""
    if routing is None or not routing.chosen:
        return {}
    chosen = torch.stack([routing.chosen[mixture] for mixture in sorted(routing.chosen)], 1)
    return {"routes": chosen[upload["traced_rows"]]}
