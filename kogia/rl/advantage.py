"""Group-relative advantages and the shaping of rewards (DeepSeekMath section 4.1; R1 section 2).

    A_i = (R_i - mean(R)) / (std(R) + eps)        GRPO, DAPO, GSPO, CISPO   (normalize_std=True)
    A_i =  R_i - mean(R)                          Dr. GRPO                  (normalize_std=False)

The papers do not say which deviation. verl and TRL take the sample one, of N - 1, which is the default here; the
population one, of N, makes advantages larger by sqrt(N / (N - 1)). For rewards 1.0, 0.7, 1.0, 0.0:

    sample        std 0.4717      advantages 0.689  0.053  0.689  -1.431
    population    std 0.4085      advantages 0.796  0.061  0.796  -1.652

A reward of NaN says that the check of a sample failed. Such samples have no part in their group's mean and deviation,
and get the advantage of its worst sample, or 0 if that is higher: breaking the verifier must never pay.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_advantages(
    rewards: Float[Tensor, "prompts group"],
    *,
    normalize_std: bool,
    std: Literal["sample", "population"] = "sample",
    eps: float = 1e-6,
) -> Float[Tensor, "prompts group"]:
    """Rewards relative to the other samples of the same prompt; exactly zero where a whole group has one reward.

    `std` is that of a group's judged samples; it says nothing without `normalize_std`. Raises ValueError for groups of
    one, which have nothing to compare with.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"group_size = {rewards.shape[1]}: a group needs at least 2 samples to be a baseline")
    judged = ~rewards.isnan()
    num_judged = judged.sum(dim=1, keepdim=True)
    advantages = (rewards - rewards.nanmean(dim=1, keepdim=True)).masked_fill(~judged, 0.0)
    if normalize_std:
        count = num_judged - 1 if std == "sample" else num_judged
        deviation = (advantages.square().sum(dim=1, keepdim=True) / count.clamp(min=1)).sqrt()
        advantages = advantages / (deviation + eps)
    # The mean of equal rewards can round off by one bit, which 1 / eps would blow up into a gradient.
    advantages = advantages.masked_fill(is_zero_variance(rewards)[:, None], 0.0)
    return torch.where(judged, advantages, advantages.amin(dim=1, keepdim=True))


def is_zero_variance(rewards: Float[Tensor, "prompts group"]) -> Bool[Tensor, " prompts"]:
    """Groups whose samples all earned the same: no policy gradient in them (DAPO's dynamic sampling drops them)."""
    unjudged = rewards.isnan()
    highest = rewards.masked_fill(unjudged, -torch.inf).amax(dim=1)
    return highest <= rewards.masked_fill(unjudged, torch.inf).amin(dim=1)  # nothing judged: -inf <= inf


def overlong_penalty(num_tokens: Int[Tensor, "*samples"], max_tokens: int, buffer: int) -> Float[Tensor, "*samples"]:
    """DAPO's soft punishment in [-1, 0]: falls linearly over the last `buffer` tokens before `max_tokens`."""
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"overlong_buffer = {buffer}: must lie in 1..max_tokens = {max_tokens}")
    return (((max_tokens - buffer) - num_tokens) / buffer).clamp(-1.0, 0.0)


def random_rewards(
    rewards: Float[Tensor, "prompts group"], how: Literal["permute", "bernoulli"], generator: torch.Generator
) -> Float[Tensor, "prompts group"]:
    """The control arm: rewards that know nothing of the samples, so that any gain under them is not learning.

    "permute" shuffles the true rewards inside each group, which keeps every group statistic and destroys only the
    credit; "bernoulli" draws a fair 0 or 1 for each sample.
    """
    noise = torch.rand(rewards.shape, generator=generator).to(rewards.device)
    if how == "bernoulli":
        return (noise < 0.5).to(rewards.dtype)
    return rewards.gather(1, noise.argsort(dim=1))
