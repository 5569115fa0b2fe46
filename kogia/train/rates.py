"""The peak learning rate where none is given, from the size of the model and what it is trained for. Torch-free.

A small model from random weights learns at 1e-3 or more, which ruins the weights of a published one; a published
model's rate teaches a small one nothing in the steps that a small one is given. So each kind of training has a highest
rate, up to a size, and falls from there as a power of the parameters. The curves go through what was published or
measured here:

    from random weights   2.2e-4 for DeepSeek-V3 (37 billion active), 3e-4 for Llama 2 7B, 2e-3 for the demonstration
    fine-tuning           5e-6 for DeepSeek-V3, 1e-5 to 2e-5 for 7 billion, 1e-3 to 2e-3 for the demonstration
    reinforcing           1e-6 for 7 billion (DeepSeekMath, DAPO), 1.5e-4 for the demonstration (0.65 million)
"""

from dataclasses import dataclass, replace

from kogia.model.config import ModelConfig
from kogia.model.costs import num_active_params, num_params
from kogia.train.config import OptimConfig


@dataclass(frozen=True)
class Rate:
    """`highest` up to `size` parameters, then falling with their power `-slope`, never below `lowest`."""

    purpose: str
    highest: float
    size: float
    slope: float
    lowest: float

    def at(self, num: int) -> float:
        """The rate for `num` parameters, to two digits."""
        rate = self.highest * min(1.0, (self.size / num) ** self.slope)
        return float(f"{max(self.lowest, rate):.1e}")


FROM_SCRATCH = Rate("training from random weights", 1e-3, 1e7, 0.18, 1e-4)
"""By active parameters: what is not used for a token has no part in its gradient."""
FINE_TUNING = Rate("fine-tuning", 1e-3, 1e7, 0.7, 5e-6)
INDEXING = Rate("training indexers alone", 1e-3, 1.0, 0.0, 1e-3)
"""They are fresh beside weights that they do not touch (DeepSeek-V3.2 section 2.1.1)."""
REINFORCING = Rate("reinforcement learning", 1.5e-4, 1e6, 0.57, 1e-6)


def default_rate(rate: Rate, model: ModelConfig) -> float:
    """The peak rate of one kind of training for an architecture."""
    return rate.at(num_active_params(model) if rate is FROM_SCRATCH else num_params(model))


def settle_rate(optim: OptimConfig, rate: Rate, model: ModelConfig) -> OptimConfig:
    """The same settings with a learning rate: their own, or the default."""
    return optim if optim.lr is not None else replace(optim, lr=default_rate(rate, model))


def rate_line(given: OptimConfig, settled: OptimConfig, rate: Rate, model: ModelConfig) -> tuple[str, str]:
    """The line of a dry run, and of a run's beginning, about the rate."""
    if given.lr is not None:
        text = f"peak {given.lr:g}, as given; the default would be {default_rate(rate, model):g}"
    else:
        text = f"peak {settled.lr:g}, the default of {rate.purpose} for {num_params(model):,} parameters (optim.lr)"
    return "rate", text
