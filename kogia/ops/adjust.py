"""Logits with what requests ask of their next token: biases, penalties, masks and bans.

In this order, each on what the one before left of a row z:

    bias         z_i + b_i
    repetition   z_i / r where z_i > 0, else z_i * r          i in prompt or completion   (arXiv 1909.05858 eq 1)
    frequency    z_i - f * (times that i is in the completion)
    presence     z_i - p                                      i in the completion
    mask         only the tokens whose bits are set
    ban          not these tokens; a row of which bans would leave nothing keeps what its mask allows

Entries are sparse: `at` = row * vocab + token, the rows rising, at most once in a list unless it is one of bans.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op
from kogia.ops.sample import sample, token_logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    at: Int[Tensor, " biased"]
    values: Float[Tensor, " biased"]


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    at: Int[Tensor, " seen"]
    counts: Int[Tensor, " seen"]
    """Times that the token is in the completion; 0 for one of the prompt alone."""
    repetition: Float[Tensor, " rows"]
    frequency: Float[Tensor, " rows"]
    presence: Float[Tensor, " rows"]


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    rows: Int[Tensor, " masked"]
    """Rising."""
    bits: Int[Tensor, "masked words"]
    """64 tokens a word, the lowest bit first."""


@op(cpu=("kogia.ops.cpu.adjust",))
def sample_adjusted(
    logits: Float[Tensor, "rows vocab"],
    temperature: Float[Tensor, " rows"],
    uniforms: Float[Tensor, " rows"] | None,
    bias: Bias | None = None,
    penalties: Penalties | None = None,
    masks: Masks | None = None,
    bans: Int[Tensor, " banned"] | None = None,
    top_k: Int[Tensor, " rows"] | None = None,
    top_p: Float[Tensor, " rows"] | None = None,
    min_p: Float[Tensor, " rows"] | None = None,
    filtered: Int[Tensor, " some"] | None = None,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(token, log-probability in nats) per row, as `kogia.ops.sample.sample` draws from the adjusted logits; the
    log-probability is that under the logits as they were."""
    filters = top_k, top_p, min_p, filtered
    tokens, _ = sample(adjust_logits(logits, bias, penalties, masks, bans), temperature, uniforms, *filters)
    return tokens, token_logprobs(logits, temperature, tokens)


def adjust_logits(
    logits: Float[Tensor, "rows vocab"],
    bias: Bias | None = None,
    penalties: Penalties | None = None,
    masks: Masks | None = None,
    bans: Int[Tensor, " banned"] | None = None,
) -> Float[Tensor, "rows vocab"]:
    """A float32 copy of the logits, adjusted. Nothing waits for the device."""
    vocab = logits.shape[1]
    z = logits.float().flatten()
    if bias is not None:
        z = z.index_add(0, bias.at, bias.values)
    if penalties is not None:
        z = _penalised(z, penalties, vocab)
    z = z.view(-1, vocab)
    if masks is not None:
        refused = _unset(masks.bits, vocab)
        if len(masks.rows) == len(z):  # all of them, which stand in order
            z = z.masked_fill(refused, float("-inf"))
        else:
            z = z.index_copy(0, masks.rows, z[masks.rows].masked_fill(refused, float("-inf")))
    if bans is not None:
        rest = z.flatten().index_fill(0, bans, float("-inf")).view(-1, vocab)
        z = torch.where(rest.amax(-1, keepdim=True) == float("-inf"), z, rest)
    return z


def _penalised(z: Float[Tensor, " all"], penalties: Penalties, vocab: int) -> Float[Tensor, " all"]:
    rows, counts = penalties.at // vocab, penalties.counts
    seen, factor = z[penalties.at], penalties.repetition[rows]
    seen = torch.where(seen > 0, seen / factor, seen * factor)
    seen = seen - penalties.frequency[rows] * counts - penalties.presence[rows] * (counts > 0)
    return z.index_copy(0, penalties.at, seen)


def _unset(words: Int[Tensor, "masked words"], vocab: int) -> Tensor:
    """[masked, vocab] whether each token's bit is not set."""
    octets = words.view(torch.uint8)  # the lowest first, on every machine that torch runs on
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=words.device)
    return (octets[:, :, None] & powers).eq(0).flatten(1)[:, :vocab]
