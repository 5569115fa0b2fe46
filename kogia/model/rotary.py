"""Rotary angles of a model: its frequencies, made once for each device."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.model.config import Llama3RopeConfig, MLAConfig, ModelConfig, YarnConfig
from kogia.ops.rope import (
    inverse_frequencies,
    llama3_inverse_frequencies,
    rope_angles,
    yarn_inverse_frequencies,
    yarn_mscale,
)


class Rotary:
    """cos and sin of a model's positions. No module: its float32 frequencies must not follow the model's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        self._attention = config.attention
        self._by_device: dict[torch.device, Tensor] = {}
        self._scale = _scale(self._attention.rope_scaling)

    def __call__(
        self, positions: Int[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]]:
        """(cos, sin) in float32."""
        frequencies = self._by_device.get(positions.device)
        if frequencies is None:
            frequencies = self._by_device[positions.device] = self._frequencies().to(positions.device)
        return rope_angles(positions, frequencies, self._scale)

    def _frequencies(self) -> Float[Tensor, " half"]:
        """Radians per position of each pair, on the CPU."""
        attention = self._attention
        dim = attention.qk_rope_head_dim if isinstance(attention, MLAConfig) else attention.head_dim
        base, scaling = attention.rope_theta, attention.rope_scaling
        with torch.device("cpu"):
            if scaling is None:
                return inverse_frequencies(dim, base)
            if isinstance(scaling, Llama3RopeConfig):
                return llama3_inverse_frequencies(dim, base, **_fields(scaling, "kind"))
            return yarn_inverse_frequencies(dim, base, **_fields(scaling, "kind", "mscale", "mscale_all_dim"))


def _scale(scaling: YarnConfig | Llama3RopeConfig | None) -> float:
    """The factor on cos and sin: YaRN's mscale ratio."""
    if not isinstance(scaling, YarnConfig):
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def _fields(scaling: YarnConfig | Llama3RopeConfig, *without: str) -> dict[str, Any]:
    return {name: value for name, value in vars(scaling).items() if name not in without}
