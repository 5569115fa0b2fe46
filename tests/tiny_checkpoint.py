"""A real tiny model on disk that stops by itself about every seventh token, for tests that need finished samples."""

from pathlib import Path

import torch

from kogia.checkpoint.hf import save_model
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import build_model
from kogia.text.tokenizer import Tokenizer, train_bpe


def save_tiny_checkpoint(directory: Path, tokenizer: Tokenizer | None = None) -> Path:
    tokenizer = tokenizer or train_bpe(["say 1 2 3 4 5 6 7 8 9 10 11"], 270)
    attention = MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=2,
        ffn_dim=32,
        attention=attention,
        moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
        num_mtp_layers=1,
        max_position=128,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    model = build_model(config, seed=0)
    with torch.no_grad():
        # a direction that every hidden state has, and that the end token answers to
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[tokenizer.eos_id] = 4.0 / config.dim
    save_model(model, directory, tokenizer)
    return directory
