"""Draft verification: how far a step moved each sequence (DeepSeek-V3 section 2.2.3; Leviathan et al. 2023).

Every position that the step verified was sampled as if nothing had been drafted, with the uniform number of its own
position, and a draft is accepted if and only if it EQUALS the token sampled there. For drafts chosen without chance
this is lossless rejection sampling (acceptance probability p(draft), the rest of the distribution otherwise), and more:
the tokens are the very ones that decoding without drafts gives for the same seed.

The rule stands here twice: on the device, which drafts on from the last accepted token without waiting for anyone, and
on the host, which learns of the same samples later.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def num_accepted(
    samples: Int[Tensor, "seqs width"], drafts: Int[Tensor, "seqs width"], num_samples: Int[Tensor, " seqs"]
) -> Int[Tensor, " seqs"]:
    """Drafts that stand. `drafts[s, j]` is the guess which sample j of sequence s decides on, for all of its
    `num_samples` but the last; what stands beyond means nothing."""
    column = torch.arange(samples.shape[1], device=samples.device)
    right = (samples == drafts) & (column < num_samples[:, None] - 1)
    return right.long().cumprod(1).sum(1)


def count_new(
    samples: Int[np.ndarray, "seqs width"],
    drafts: Int[np.ndarray, "seqs width"],
    num_samples: Int[np.ndarray, " seqs"],
    stop_ids: Int[np.ndarray, "seqs stops"],
) -> tuple[Int[np.ndarray, " seqs"], Bool[np.ndarray, " seqs"]]:
    """(tokens gained: accepted drafts and one more, cut after a stop token; whether a stop token is the last of them).

    Arguments as in `num_accepted`; a sequence without samples gains nothing.
    """
    if samples.shape[1] == 1:  # no draft anywhere
        return np.minimum(num_samples, 1), (samples == stop_ids).any(axis=1) & (num_samples > 0)
    column = np.arange(samples.shape[1])
    right = (samples == drafts) & (column < num_samples[:, None] - 1)
    num_new = np.where(num_samples > 0, np.cumprod(right, axis=1).sum(axis=1) + 1, 0)
    stops = (samples[..., None] == stop_ids[:, None, :]).any(axis=-1) & (column < num_new[:, None])
    stopped = stops.any(axis=1)
    return np.where(stopped, stops.argmax(axis=1) + 1, num_new), stopped
