"""A model small enough to train in milliseconds, with every part of the large one."""

from collections.abc import Sequence

import torch

from kogia.data.loader import Batch
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.train.config import OptimConfig
from kogia.train.optim import build_optimizer
from kogia.train.step import TrainState

ATTENTION = MLAConfig(
    num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16
)
MOE = MoEConfig(num_experts=8, topk=2, expert_dim=16)


def tiny_config(**fields) -> ModelConfig:
    sizes = {"vocab_size": 48, "dim": 32, "num_layers": 2, "ffn_dim": 48, "num_mtp_layers": 1, "init_std": 0.1}
    return ModelConfig(**{**sizes, "attention": ATTENTION, "moe": MOE, **fields})


def tiny_model(seed: int = 0, **fields) -> Transformer:
    return build_model(tiny_config(**fields), seed=seed)


def tiny_state(model: Transformer, num_steps: int = 10, **optim) -> TrainState:
    config = OptimConfig(**{"lr": 1e-2, "schedule": "constant", "warmup_steps": 0, **optim})
    return TrainState(model, build_optimizer(model, config), config, num_steps)


def random_sequences(lengths: Sequence[int], seed: int = 0, vocab: int = 48) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def make_batch(sequences: list[list[int]], masks: list[list[int]] | None = None) -> Batch:
    """All tokens but the first of each sequence count, unless `masks` says otherwise."""
    masks = masks or [[0] + [1] * (len(s) - 1) for s in sequences]
    mask = torch.tensor([on for m in masks for on in m], dtype=torch.bool)
    return Batch(pack(sequences), mask, int(mask.sum()))
