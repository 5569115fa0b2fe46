"""Models with packed weights: which of them a format is for, and drawing them without the dense model.

FP8 is for what DeepSeek-V3 publishes in it: every projection, those of the indexer among them, but not the head. int8
and int4 are for the projections of attention, the feed-forward parts, routed and shared experts, and the head where it
is not the embedding. Embedding, routers, norms, the indexer and `eh_proj` stay as they are.
"""

from collections.abc import Iterator

import torch

from kogia import log
from kogia.model.config import ModelConfig
from kogia.model.layers import Head
from kogia.model.linear import Linear
from kogia.model.transformer import Transformer, draw, empty_model, initialise, materialize
from kogia.ops.packed import FORMATS


def packable(model: Transformer, format: str) -> Iterator[tuple[str, Linear]]:
    """(name, layer) of the weights that the format is for, those among them that it cannot take included."""
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or (isinstance(module, Head) and model.config.tie_embeddings):
            continue
        if not isinstance(module, Head) if format == "fp8" else ".indexer." not in name:
            yield name, module


def make_packed(model: Transformer, format: str, *, zeros: bool = False) -> None:
    """Turn all weights that the format is for and takes into its uninitialised storage; says which stay dense."""
    left = []
    for name, layer in packable(model, format):
        if FORMATS[format].takes(layer.shape):
            layer.make_packed(format, zeros=zeros)
        else:
            left.append(f"{name} {list(layer.shape)}")
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        log.info(f"{left[0]}{more}: rows of such a length have no {format} form and stay as they are")


def build_packed(
    config: ModelConfig, format: str, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Transformer:
    """What packing all of `build_model`'s weights would give, where only one of them at a time is ever dense."""
    model = empty_model(config, dtype)
    make_packed(model, format)
    materialize(model, device)
    packed = {f"{name}.weight": layer for name, layer in packable(model, format) if layer.format}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in packed:
                initialise(parameter, config.init_std, seed, name)
                continue
            dense = torch.empty(packed[name].shape, dtype=dtype, device=device)
            draw(dense, config.init_std, f"{seed}/{name}")
            packed[name].store(dense)
    return model
