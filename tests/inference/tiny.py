"""A model small enough to answer at once, and how it is asked."""

from kogia.engine.request import SamplingParams
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig

CONFIG = ModelConfig(
    vocab_size=290,
    dim=32,
    num_layers=2,
    ffn_dim=64,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
    num_mtp_layers=1,
    max_position=256,
    init_std=0.2,
)
PARAMS = SamplingParams(max_tokens=12, seed=3)
