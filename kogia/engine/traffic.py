"""What a decode step reads of the memory at least: the time of small batches is the time to read it."""

from itertools import chain

from kogia.model.cache import PagedCache
from kogia.model.transformer import Transformer


def weight_bytes(model: Transformer, batch: int, active_experts: int) -> float:
    """Every weight of the main model once, with its scales; of the embedding a row per token; of the routed experts
    those that a batch of tokens with so many each is expected to choose when routing is spread."""
    config = model.config
    used = 1.0 if config.moe is None else 1 - (1 - active_experts / config.moe.num_experts) ** batch
    scales = ((name, buffer) for name, buffer in model.named_buffers() if ".weight_" in name)
    total = 0.0
    for name, weight in chain(model.named_parameters(), scales):
        size = float(weight.numel() * weight.element_size())
        if "embed_tokens" in name and not config.tie_embeddings:
            size = batch * weight.shape[1] * weight.element_size()
        elif ".experts." in name:
            size *= used
        if not _is_mtp(model, name):
            total += size
    return total


def cache_bytes(cache: PagedCache, batch: int, context: float) -> float:
    """The rows of so many sequences, with contexts of so many tokens each."""
    layers, _, width = cache.rows.shape
    return batch * context * layers * width * cache.rows.element_size()


def _is_mtp(model: Transformer, name: str) -> bool:
    first = model.config.num_layers
    return any(name.startswith(f"model.layers.{first + k}.") for k in range(model.config.num_mtp_layers))
