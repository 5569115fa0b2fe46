"""`ModelConfig` -> Hugging Face `config.json`: which published format holds a model, and its fields there."""

import math
from dataclasses import replace
from typing import Any

from kogia.config import to_dict
from kogia.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.hf_config import LATENT_FIELDS, LLAMA3_FIELDS, YARN_FIELDS


def published_type(config: ModelConfig) -> str:
    """The `model_type` whose published format holds this model; "kogia" where there is none."""
    a, moe = config.attention, config.moe
    if isinstance(a, MLAConfig):
        if a != replace(MLAConfig(), **{name: getattr(a, name) for name in _PLAIN_MLA}):
            return "kogia"
        if moe is None:
            return "kogia" if config.num_mtp_layers else ("deepseek_v3" if a.indexer is None else "deepseek_v32")
        if moe.score == "sigmoid":
            return "deepseek_v3" if a.indexer is None else "deepseek_v32"
        plain = a.indexer is None and not moe.normalize_topk and not config.num_mtp_layers
        return "deepseek_v2" if plain else "kogia"
    if config.num_mtp_layers or (a.qkv_bias and (a.qk_norm or moe is not None)):
        return "kogia"
    if moe is None:
        return "qwen3" if a.qk_norm else "qwen2" if a.qkv_bias else "llama"
    if moe.score != "softmax" or moe.num_groups != 1 or moe.routed_scale != 1.0:
        return "kogia"
    if not a.qk_norm:  # that format has neither a head width of its own nor these rope scalings
        return "deepseek" if a.rope_scaling is None and a.num_heads * a.head_dim == config.dim else "kogia"
    return "qwen3_moe" if not moe.num_shared_experts and not moe.num_dense_layers else "kogia"


_PLAIN_MLA = (
    "num_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta rope_scaling indexer"
).split()
CLASSES = {
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "kogia": "KogiaForCausalLM",
}
"""`model_type` -> the class of transformers, by which other tools choose their code."""


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The published form. A model without one is written as model_type "kogia", which only this project reads."""
    kind = published_type(config)
    data: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, "torch_dtype": dtype}
    data |= {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id}
    if kind == "kogia":
        return data | {"kogia": to_dict(config)}
    data |= {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "use_cache": True,
        "rope_theta": config.attention.rope_theta,
        "rope_scaling": _rope_table(config.attention.rope_scaling),
    }
    if kind != "qwen2":  # Qwen2 has no such field: its bias is part of the architecture
        data["attention_bias"] = False
    data |= _attention_fields(config.attention)
    if kind == "qwen3_moe" and config.moe is not None:
        return data | _qwen_expert_fields(config.moe)
    if kind.startswith("deepseek"):
        data |= _deepseek_expert_fields(config)
    if kind in ("deepseek_v3", "deepseek_v32"):
        data["num_nextn_predict_layers"] = config.num_mtp_layers
    return data


def _rope_table(scaling: YarnConfig | Llama3RopeConfig | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, Llama3RopeConfig):
        return {"rope_type": "llama3"} | {key: getattr(scaling, name) for key, name in LLAMA3_FIELDS.items()}
    table: dict[str, Any] = {"type": "yarn"} | {key: getattr(scaling, name) for key, name in YARN_FIELDS.items()}
    if scaling.mscale <= 0 or (scaling.mscale != 1 and not scaling.mscale_all_dim):
        # others read an mscale only where neither of the two is 0
        slope = 0.1 * math.log(max(scaling.factor, 1.0))
        table["attention_factor"] = (slope * table.pop("mscale") + 1) / (slope * scaling.mscale_all_dim + 1)
    return table


def _attention_fields(a: MLAConfig | GQAConfig) -> dict[str, Any]:
    if isinstance(a, GQAConfig):
        return {"num_attention_heads": a.num_heads, "num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim}
    data = {"num_attention_heads": a.num_heads, "num_key_value_heads": a.num_heads}
    data |= {name: getattr(a, name) for name in sorted(LATENT_FIELDS)}
    if a.indexer is not None:
        i = a.indexer
        data |= {"index_n_heads": i.num_heads, "index_head_dim": i.head_dim, "index_topk": i.topk}
    return data


def _deepseek_expert_fields(config: ModelConfig) -> dict[str, Any]:
    """A dense model is one whose every layer is replaced by a dense one; the expert fields then mean nothing."""
    moe = config.moe or MoEConfig(num_dense_layers=config.num_layers, expert_dim=config.ffn_dim)
    softmax = moe.score == "softmax"
    return {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": moe.expert_dim,
        "first_k_dense_replace": moe.num_dense_layers,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "topk_group": moe.topk_groups,
        "topk_method": ("greedy" if moe.num_groups == 1 else "group_limited_greedy") if softmax else "noaux_tc",
        "scoring_func": moe.score,
        "norm_topk_prob": moe.normalize_topk,
        "routed_scaling_factor": moe.routed_scale,
    }


def _qwen_expert_fields(moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": moe.expert_dim,
        "norm_topk_prob": moe.normalize_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
