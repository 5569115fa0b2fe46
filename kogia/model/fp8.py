"""Which layers of a model are trained in FP8 (DeepSeek-V3 section 3.3).

The projections of attention, the feed-forward parts, routed and shared experts. What the report keeps in higher
precision stays in the model's dtype: embedding, head, routers, norms, attention itself, and with it the indexer; and
`eh_proj`, which the published files have in bfloat16 too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kogia.model.config import Fp8Gradients
from kogia.model.layers import Head
from kogia.model.linear import Fp8Training, Linear
from kogia.model.transformer import Transformer
from kogia.ops.blockwise import fp8_experts, fp8_linears

ALIGNMENT = 16
"""Numbers that the rows of both forms of a weight must be multiples of: 16 bytes of FP8."""


def train_in_fp8(model: Transformer, gradients: Fp8Gradients, *, power_of_two: bool) -> list[str]:
    """Let the layers that FP8 is for multiply in it wherever gradients are taken; returns the names of those that it
    cannot take, which stay as they are. With `power_of_two` the scales are such where the report has them: of what
    goes into the projection behind attention, and to and from experts.
    """
    left = []
    dense, routed = _uncompiled(fp8_linears), _uncompiled(fp8_experts)
    for name, layer in _projections(model):
        if layer.in_features % ALIGNMENT or layer.out_features % ALIGNMENT:
            left.append(f"{name} {list(layer.shape)}")
            continue
        is_expert = len(layer.shape) > 2
        layer.fp8 = Fp8Training(
            fp8_gradient=gradients == "all" or (gradients == "dense" and not is_expert),
            power_of_two=power_of_two and (is_expert or name.endswith("o_proj")),
            product=routed if is_expert else dense,
        )
    return left


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """It, as torch.compile is to call it: that cannot look into when weights are rounded."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType, reportArgumentType]


def _projections(model: Transformer) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not isinstance(module, Head) and ".indexer." not in name:
            yield name, module
