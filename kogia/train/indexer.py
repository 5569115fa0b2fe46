"""Continued training towards sparse attention (DeepSeek-V3.2 section 2.1.1).

Two stages, each an ordinary supervised run:
    warm-up   train_only = "indexer", index_topk above the sequence length: attention stays dense, and the indexer alone
              learns to imitate it (the paper: lr 1e-3, 1000 steps)
    sparse    everything trains; each query attends to index_topk tokens, and the indexer follows the attention over
              them (lr 7.3e-6, 15,000 steps). The two losses reach disjoint parameters.
"""

from dataclasses import replace

import torch

from kogia.model.config import IndexerConfig, MLAConfig, ModelConfig
from kogia.model.transformer import Transformer, build_model
from kogia.train.config import SupervisedConfig


def check_indexer(model: ModelConfig, config: SupervisedConfig) -> None:
    """Raise ValueError for settings of an indexer where the model has none."""
    has_one = isinstance(model.attention, MLAConfig) and model.attention.indexer is not None
    if not has_one and (config.index_topk is not None or config.train_only == "indexer"):
        raise ValueError(
            "index_topk and train_only = 'indexer' need a model with a lightning indexer; add_indexer gives it one"
        )


def prepare_indexer(model: Transformer, config: SupervisedConfig) -> None:
    """Set how many tokens the indexers select, and freeze everything else where only they train."""
    indexers = model.indexers()
    for indexer in indexers:
        indexer.topk = config.index_topk or indexer.topk
    if config.train_only == "indexer":
        trained = {id(p) for indexer in indexers for p in indexer.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)


def indexed_config(model: ModelConfig, indexer: IndexerConfig) -> ModelConfig:
    """The architecture with lightning indexers. Raises ValueError for one that has them, or no latent attention."""
    attention = model.attention
    if not isinstance(attention, MLAConfig) or attention.indexer is not None:
        what = "has one already" if isinstance(attention, MLAConfig) else "has no latent attention"
        raise ValueError(f"add_indexer: the model of init {what}; remove add_indexer")
    return replace(model, attention=replace(attention, indexer=indexer))


@torch.no_grad()
def with_indexer(model: Transformer, indexer: IndexerConfig, seed: int) -> Transformer:
    """The same weights with freshly initialised indexers beside the attention of every layer."""
    config = indexed_config(model.config, indexer)
    grown = build_model(config, device=model.device, dtype=model.dtype, seed=seed)
    grown.load_state_dict(model.state_dict(), strict=False)
    return grown
