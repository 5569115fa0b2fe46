"""What a reinforcement-learning run and a curation run are, as frozen values. Torch-free."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PolicyLossConfig:
    """One surrogate objective; the published variants are settings of it.

    GRPO: aggregate "sequence", clip 0.2 / 0.2. Dr. GRPO: aggregate "constant" and `normalize_std = false`. DAPO: aggregate
    "token", clip 0.2 / 0.28. GSPO: ratio "sequence", aggregate "sequence", clip 3e-4 / 4e-4. CISPO: objective "cispo",
    aggregate "token", clip_low 1 (off). DeepSeek-R1: clip 10 / 10, kl_coef 0.001.
    """

    objective: Literal["clip", "cispo"] = "clip"
    """"clip" is the pessimistic minimum of PPO; "cispo" clips the weight and keeps every token's gradient."""
    ratio: Literal["token", "sequence"] = "token"
    """"sequence" is GSPO's geometric mean over the completion."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; 1 or more never binds."""
    clip_high: float = 0.28
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """"token": all tokens weigh the same. "sequence": all completions weigh the same. "constant": a token weighs
    1 / max_tokens of a completion, whatever the completion's length."""
    truncated: Literal["mask", "count"] = "count"
    """"mask" leaves completions that ran out of tokens out of the loss and out of its denominator."""
    kl_coef: float = 0.0
    kl: Literal["k3", "k3_unbiased"] = "k3"
    """"k3_unbiased" weighs k3 by the importance ratio (DeepSeek-V3.2)."""
    rollout_is_cap: float | None = None
    """Upper bound of the weight pi_trainer / pi_engine on each token (truncated importance sampling); None leaves it out."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "kl_coef"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"loss.{name} = {getattr(self, name)}: must not be negative")
        if self.rollout_is_cap is not None and self.rollout_is_cap < 1.0:
            raise ValueError(f"loss.rollout_is_cap = {self.rollout_is_cap}: must be at least 1 (2 is usual)")
