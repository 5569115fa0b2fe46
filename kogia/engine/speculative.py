"""Draft verification: how far a step moved each sequence (DeepSeek-V3 section 2.2.3; Leviathan et al. 2023).

Every position that the step verified was sampled as if nothing had been drafted, with the uniform number of its own
position, and a draft is accepted if and only if it EQUALS the token sampled there. For drafts chosen without chance
this is lossless rejection sampling (acceptance probability p(draft), the rest of the distribution otherwise), and more:
the tokens are the very ones that decoding without drafts gives for the same seed.

The rule stands twice: on the device (`kogia.ops.drafts`), which drafts on from the last accepted token without waiting
for anyone, and here on the host, which learns of the same samples later.
"""

import numpy as np
from jaxtyping import Bool, Int


def count_new(
    samples: Int[np.ndarray, "seqs width"],
    drafts: Int[np.ndarray, "seqs width"],
    num_samples: Int[np.ndarray, " seqs"],
    stop_ids: Int[np.ndarray, "seqs stops"],
) -> tuple[Int[np.ndarray, " seqs"], Bool[np.ndarray, " seqs"]]:
    """(tokens gained: accepted drafts and one more, cut after a stop token; whether a stop token is the last of them).

    Arguments as in `kogia.ops.drafts.num_accepted`; a sequence without samples gains nothing.
    """
    if samples.shape[1] == 1:  # no draft anywhere
        return np.minimum(num_samples, 1), (samples == stop_ids).any(axis=1) & (num_samples > 0)
    right = samples == drafts
    right[:, -1] = False  # behind the last sample no draft was verified
    num_new = np.minimum(right.argmin(axis=1) + 1, num_samples)
    stops = samples[:, :, None] == stop_ids[:, None, :]
    if not np.count_nonzero(stops):
        return num_new, np.zeros(len(samples), dtype=bool)
    stops = stops.any(axis=2) & (np.arange(samples.shape[1]) < num_new[:, None])
    stopped = stops.any(axis=1)
    return np.where(stopped, stops.argmax(axis=1) + 1, num_new), stopped
