"""What a decode step reads of the memory at least: the time of small batches is the time to read it."""

from itertools import chain

from kogia.model.cache import PagedCache
from kogia.model.transformer import Transformer


def weight_bytes(model: Transformer, batch: int, active_experts: int, drafts: int = 0) -> float:
    """Every weight of the main model once, with its scales; of the embedding a row per token; of the routed experts
    those that a batch of tokens with so many each is expected to choose when routing is spread. Each sequence runs one
    token and its drafts, and each draft takes a pass through the MTP module and the head."""
    config, tokens = model.config, batch * (1 + drafts)
    used = 1.0 if config.moe is None else 1 - (1 - active_experts / config.moe.num_experts) ** tokens
    scales = ((name, buffer) for name, buffer in model.named_buffers() if ".weight_" in name)
    total = 0.0
    for name, weight in chain(model.named_parameters(), scales):
        size = float(weight.numel() * weight.element_size())
        if "embed_tokens" in name and not config.tie_embeddings:
            size = tokens * weight.shape[1] * weight.element_size()
        elif ".experts." in name:
            size *= used
        elif name.startswith("lm_head."):
            size *= 1 + drafts
        total += drafts * size if _is_mtp(model, name) else size
    return total


def cache_bytes(cache: PagedCache, batch: int, context: float) -> float:
    """The rows of so many sequences, with contexts of so many tokens each."""
    layers, _, width = cache.rows.shape
    return batch * context * layers * width * cache.rows.element_size()


def _is_mtp(model: Transformer, name: str) -> bool:
    first = model.config.num_layers
    return any(name.startswith(f"model.layers.{first + k}.") for k in range(model.config.num_mtp_layers))
