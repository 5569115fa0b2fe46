"""What a training loop's settings make of its model (`LoopConfig`), the same in every loop."""

from typing import Any

from kogia import log
from kogia.model.fp8 import ALIGNMENT, train_in_fp8
from kogia.model.transformer import Transformer
from kogia.train.config import LoopConfig, OptimConfig


def multiply_in(config: LoopConfig, model: Transformer) -> None:
    """Let the model be trained in `precision`; says which layers are not."""
    if config.precision != "fp8":
        return
    left = train_in_fp8(model, config.fp8.weight_gradients, power_of_two=config.fp8.power_of_two)
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        log.warn(f"{left[0]}{more} stay in {config.dtype}: in FP8 widths are multiples of {ALIGNMENT}")


def rounds_products(config: LoopConfig) -> bool:
    """Whether products of float32 are made of bfloat16 while the model is trained, where the processor can."""
    return config.precision == "bfloat16" and config.dtype == "float32"


def memory_settings(config: LoopConfig, optim: OptimConfig, *, has_average: bool = False) -> dict[str, Any]:
    """What `train_memory` takes of a run."""
    return {
        "is_half": config.dtype == "bfloat16",
        "has_half_moments": optim.moments == "bfloat16",
        "has_average": has_average,
        "recompute": config.recompute,
        "has_fp8": config.precision == "fp8",
    }
