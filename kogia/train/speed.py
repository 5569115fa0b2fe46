"""How fast a run trains: tokens per second, model FLOPs utilisation (MFU), memory.

MFU is the model's own FLOPs (kogia.model.costs) over what a large product of the same dtype reaches on the device,
which is measured, not read off a data sheet. Nothing that is done again counts, and FP8 is measured against `dtype`. It
is told twice: causal, with the pairs of tokens that attention needs, and full, with all of them, as others count too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from kogia.model.config import ModelConfig
from kogia.model.costs import flops_per_token
from kogia.ops.machine import PRODUCT, name_of, peak_memory, product_rate
from kogia.train.config import SupervisedConfig


@dataclass(frozen=True)
class Speed:
    """What figures of speed are told in."""

    model: ModelConfig
    mtp_depths: int
    """Prediction modules that are trained."""
    device: torch.device
    dtype: torch.dtype
    peak: float
    """FLOP/s of the product."""

    @property
    def peak_in_words(self) -> str:
        size, dtype = PRODUCT[self.device.type], str(self.dtype).removeprefix("torch.")
        return (
            f"{self.peak / 1e12:,.3g} TFLOP/s, a {dtype} product of {size} x {size} x {size} on {name_of(self.device)}"
        )

    def mfu(self, lengths: Int[np.ndarray, " seqs"], seconds: float) -> tuple[float, float]:
        """(causal, full) of a step on sequences of these lengths."""
        tokens = float(lengths.sum())
        context = float((lengths.astype(np.float64) ** 2).sum()) / tokens
        rate = self.peak * seconds / tokens

        def share(is_causal: bool) -> float:
            return flops_per_token(self.model, context, is_causal=is_causal, mtp_depths=self.mtp_depths) / rate

        return share(True), share(False)

    def metrics(self, lengths: Int[np.ndarray, " seqs"], seconds: float) -> dict[str, float]:
        causal, full = self.mfu(lengths, seconds)
        return {
            "tokens_per_second": float(lengths.sum()) / seconds,
            "mfu_causal": causal,
            "mfu_full": full,
            "peak_tflops": self.peak / 1e12,
            "memory_gib": peak_memory(self.device) / 2**30,
        }


def measured_speed(config: SupervisedConfig, model: ModelConfig, device: torch.device) -> Speed:
    """Of a run on this device, of which a product is timed."""
    dtype = getattr(torch, config.dtype)
    depths = model.num_mtp_layers if config.mtp_weight else 0
    peak = product_rate(device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the product's own is none of the run
    return Speed(model, depths, device, dtype, peak)
