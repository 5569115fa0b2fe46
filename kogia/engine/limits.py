"""What a model and the settings of the engine allow: known from the model's configuration, before a weight is read."""

import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from kogia.engine.config import EngineConfig
from kogia.model.cache import cache_row
from kogia.model.config import ModelConfig
from kogia.ops.cache import KVRow, LatentRow


class Longest(NamedTuple):
    """What bounds a sequence."""

    tokens: int
    """A prompt must have fewer: its completion needs room."""
    bound: str
    """What it is that has so many."""
    remedy: str
    """What to do where no prompt is shorter."""


def check_engine(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> None:
    """Raise ValueError for settings that an engine for this model, with weights of `dtype`, could not be built with."""
    if config.num_draft_tokens and not model.num_mtp_layers:
        raise ValueError(
            f"engine.num_draft_tokens = {config.num_draft_tokens}: the model has no MTP module to draft with; set 0"
        )
    if config.deterministic and has_sparse_attention(model):
        raise ValueError(
            "engine.deterministic = true: this model's sparse attention has no batch-invariant form; leave it out"
        )
    check_activation(model, config.active_experts, config.expert_threshold, "engine.")
    _, row = cache_layout(model, config)
    if config.prune is not None and not isinstance(row, LatentRow):
        raise ValueError(
            "engine.prune: attention mass is counted on latent rows, but this model has key and value heads; "
            "leave it out"
        )
    given = config.cache_memory_bytes
    if given is not None and config.num_blocks is None:
        check_budget(given, "engine.cache_memory_bytes", block_bytes(model, config, dtype), config)


def has_sparse_attention(model: ModelConfig) -> bool:
    return model.attention.kind == "mla" and model.attention.indexer is not None


def check_activation(model: ModelConfig, active_experts: int | None, threshold: float | None, where: str = "") -> None:
    """Raise ValueError for a number of routed experts that this model cannot activate, or where it has none."""
    moe = model.moe
    asked = {"active_experts": active_experts, "expert_threshold": threshold or None}
    name = next((name for name, value in asked.items() if value is not None), None)
    if moe is None and name is not None:
        raise ValueError(f"{where}{name} = {asked[name]}: this model has no routed experts; leave it out")
    if moe is not None and active_experts is not None and not 1 <= active_experts <= moe.most_active:
        groups = "" if moe.num_groups == 1 else f", of which a token may use {moe.most_active}"
        raise ValueError(
            f"{where}active_experts = {active_experts}: this model has {moe.num_experts} routed experts{groups}; give "
            f"1 to {moe.most_active}, or leave it out for the {moe.topk} that it was trained with"
        )


def longest_sequence(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> Longest:
    """The context, or what the whole cache holds if that is less. A cache that takes what is free counts as enough."""
    num_blocks = config.num_blocks
    if num_blocks is None and config.cache_memory_bytes is not None:
        num_blocks = config.cache_memory_bytes // block_bytes(model, config, dtype)
    capacity = sys.maxsize if num_blocks is None else num_blocks * config.block_size
    if capacity + 1 >= model.max_position or (config.prune is not None and config.prune.most_rows <= capacity):
        return Longest(model.max_position, "the model's context", "take a model with a longer context")
    # the last token is never run, and needs no row
    return Longest(capacity + 1, "what the whole cache holds", "raise engine.num_blocks or engine.cache_memory_bytes")


def check_budget(nbytes: int, name: str, block: int, config: EngineConfig) -> None:
    """Raise ValueError unless a block of `block` bytes fits."""
    if nbytes < block:
        raise ValueError(f"{name} = {nbytes}: one block of {config.block_size} tokens takes {block} bytes; give more")


def cache_layout(model: ModelConfig, config: EngineConfig) -> tuple[ModelConfig, LatentRow | KVRow]:
    """(the model with the layers that are cached, how their rows are stored). Raises ValueError as `cache_row`."""
    # rows of the MTP layer are only kept for drafting
    cached = model if config.num_draft_tokens else replace(model, num_mtp_layers=0)
    rank = config.rank_by_context[0][1] if config.rank_by_context else None
    return cached, cache_row(cached, fp8=config.cache_dtype == "fp8", rank=rank)


def block_bytes(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """Of one block over all layers, with what pruning counts beside it."""
    cached, row = cache_layout(model, config)
    row_bytes = row.width if isinstance(row, LatentRow) and row.fp8 else row.width * dtype.itemsize
    row_bytes += 0 if config.prune is None else 4  # its attention mass
    return cached.num_cache_layers * row_bytes * config.block_size
