"""Numbers to draw with, and choosing tokens."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import DTYPES, Kernel, address, refusal

_sample = Kernel("kogia_sample", "12q")
_uniforms = Kernel("kogia_uniforms", "4q")


def counter_uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One pass."""
    found = torch.empty(len(seeds), dtype=torch.float64)
    _uniforms(seeds.data_ptr(), positions.data_ptr(), len(seeds), found.data_ptr())
    return found


def counter_uniforms_supports(seeds: Tensor, positions: Tensor) -> str | None:
    return refusal(seeds, positions, dtypes=(torch.int64,))


def sample(
    logits: Tensor,
    temperature: Tensor,
    uniforms: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    filtered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A pass for the largest logit, one for the sum of powers, and of those that are drawn one for the place. Filters
    take two more, in rows that have one on, and sort only near the places where they cut."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=torch.float32)
    uniforms = None if uniforms is None else uniforms.double()
    _sample(
        DTYPES[logits.dtype], logits.data_ptr(), rows, vocab, temperature.data_ptr(), address(uniforms),
        tokens.data_ptr(), logprobs.data_ptr(), torch.get_num_threads(), *map(address, (top_k, top_p, min_p)),
    )  # fmt: skip
    return tokens, logprobs


def sample_supports(
    logits: Tensor,
    temperature: Tensor,
    uniforms: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    filtered: Tensor | None = None,
) -> str | None:
    shares = [each for each in (top_p, min_p) if each is not None]
    return (
        refusal(logits)
        or refusal(temperature, *shares, dtypes=(torch.float32,))
        or (None if top_k is None else refusal(top_k, dtypes=(torch.int64,)))
        or (None if uniforms is None else refusal(uniforms, dtypes=(torch.float32, torch.float64)))
    )
