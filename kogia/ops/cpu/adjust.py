"""Choosing tokens as requests want them: biases, penalties, masks and bans on the way to the draw."""

import torch
from torch import Tensor

from kogia.ops.adjust import Bias, Masks, Penalties
from kogia.ops.cpu.common import DTYPES, Kernel, address, refusal
from kogia.ops.cpu.sample import sample_supports

_sample_adjusted = Kernel("kogia_sample_adjusted", "27q")
_NO_BIAS, _NO_PENALTIES, _NO_MASKS = (0,) * 3, (0,) * 6, (0,) * 4


def sample_adjusted(
    logits: Tensor,
    temperature: Tensor,
    uniforms: Tensor | None,
    bias: Bias | None = None,
    penalties: Penalties | None = None,
    masks: Masks | None = None,
    bans: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    filtered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits are weighed once: what is adjusted changes a few powers of theirs, or takes some away."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=torch.float32)
    uniforms = None if uniforms is None else uniforms.double()
    _sample_adjusted(
        DTYPES[logits.dtype], logits.data_ptr(), rows, vocab, temperature.data_ptr(), address(uniforms),
        tokens.data_ptr(), logprobs.data_ptr(), torch.get_num_threads(), *map(address, (top_k, top_p, min_p)),
        *(_NO_BIAS if bias is None else (bias.at.data_ptr(), bias.values.data_ptr(), len(bias.at))),
        *(_NO_PENALTIES if penalties is None else _penalty_fields(penalties)),
        *(_NO_MASKS if masks is None else (masks.rows.data_ptr(), masks.bits.data_ptr(), *masks.bits.shape)),
        address(bans), 0 if bans is None else len(bans),
    )  # fmt: skip
    return tokens, logprobs


def _penalty_fields(given: Penalties) -> tuple[int, ...]:
    factors = given.repetition, given.frequency, given.presence
    return given.at.data_ptr(), given.counts.data_ptr(), len(given.at), *(each.data_ptr() for each in factors)


def sample_adjusted_supports(
    logits: Tensor,
    temperature: Tensor,
    uniforms: Tensor | None,
    bias: Bias | None = None,
    penalties: Penalties | None = None,
    masks: Masks | None = None,
    bans: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    filtered: Tensor | None = None,
) -> str | None:
    integers, floats = [] if bans is None else [bans], []
    if bias is not None:
        integers, floats = [*integers, bias.at], [bias.values]
    if penalties is not None:
        integers += penalties.at, penalties.counts
        floats += penalties.repetition, penalties.frequency, penalties.presence
    if masks is not None:
        integers += masks.rows, masks.bits
    return (
        sample_supports(logits, temperature, uniforms, top_k, top_p, min_p)
        or refusal(*integers, dtypes=(torch.int64,))
        or refusal(*floats, dtypes=(torch.float32,))
    )
