"""Hugging Face `config.json` <-> `ModelConfig`. Torch-free: planning and `--dry-run` read models without loading them.

An architecture field this code does not know is an error that names it: a model that silently ignores a field computes
something else than its author meant.
"""

from collections.abc import Mapping
from typing import Any

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig

# Fields that say nothing about what the forward pass computes, or that the functions below check. How the weights are
# stored (`quantization_config`) is a matter for the loader.
_NEUTRAL = frozenset(
    "architectures auto_map model_type torch_dtype dtype transformers_version use_cache pad_token_id attention_dropout "
    "pretraining_tp ep_size aux_loss_alpha seq_aux output_router_logits bos_token_id eos_token_id initializer_range "
    "_name_or_path is_moe num_key_value_heads head_dim qk_head_dim hidden_act attention_bias mlp_bias return_dict "
    "output_hidden_states chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder "
    "output_attentions max_window_layers tokenizer_class layer_types default_theta quantization_config".split()
)

_SHARED = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps rope_theta "
    "rope_scaling rope_parameters max_position_embeddings tie_word_embeddings".split()
)
_DEEPSEEK = _SHARED | frozenset(
    "moe_intermediate_size n_shared_experts n_routed_experts num_experts_per_tok moe_layer_freq first_k_dense_replace "
    "n_group topk_group topk_method scoring_func norm_topk_prob routed_scaling_factor q_lora_rank kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim num_nextn_predict_layers rope_interleave mlp_layer_types".split()
)
_DENSE = _SHARED | frozenset("use_sliding_window sliding_window".split())
_SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
    "moe_intermediate_size n_routed_experts num_experts_per_tok first_k_dense_replace kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim".split()
)
_SIZES_OR_NULL = frozenset(
    "q_lora_rank n_shared_experts n_group topk_group num_nextn_predict_layers num_key_value_heads head_dim".split()
)
_MODEL_TYPES = {"deepseek_v3": _DEEPSEEK, "llama": _DENSE, "qwen2": _DENSE}


def config_from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """Read a published configuration. Raises ValueError on an unknown model type or architecture field."""
    kind = data.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"config.json: model_type = {kind!r} is not supported; known: {', '.join(_MODEL_TYPES)}")
    unknown = sorted(set(data) - _NEUTRAL - _MODEL_TYPES[kind])
    if unknown:
        raise ValueError(
            f"config.json of {kind}: unknown architecture field(s) {', '.join(f'{k} = {data[k]!r}' for k in unknown)}; "
            "loading would ignore what they mean. Remove them only if they change nothing in the forward pass."
        )
    for key, value in data.items():
        fits = type(value) is int or (key in _SIZES_OR_NULL and value is None)
        if key in _SIZES | _SIZES_OR_NULL and not fits:
            raise ValueError(f"config.json of {kind}: {key} = {value!r}; it must be a whole number")
    if data.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act = {data['hidden_act']!r}; only silu is supported")
    try:
        return _deepseek(data) if kind == "deepseek_v3" else _dense(kind, data)
    except KeyError as missing:
        raise ValueError(f"config.json of {kind}: field {missing} is missing") from None


def _common(data: Mapping[str, Any]) -> dict[str, Any]:
    eos = data.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    return {
        "vocab_size": data["vocab_size"],
        "dim": data["hidden_size"],
        "num_layers": data["num_hidden_layers"],
        "ffn_dim": data["intermediate_size"],
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "max_position": data.get("max_position_embeddings", 4096),
        "tie_embeddings": data.get("tie_word_embeddings", False),
        "init_std": data.get("initializer_range", 0.02),
        "bos_id": data.get("bos_token_id") or 0,
        "eos_id": 1 if eos is None else eos,
    }


def _rope(data: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """(theta, scaling table or None), from either spelling of the rope fields."""
    table = dict(data.get("rope_parameters") or {})
    theta = float(table.pop("rope_theta", data.get("rope_theta", 10000.0)))
    scaling = dict(data.get("rope_scaling") or table)
    scaling.pop("rope_theta", None)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"config.json: rope type {kind!r} is not supported; known: default, yarn")
    return theta, scaling


_YARN = frozenset("factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split())


def _yarn(scaling: Mapping[str, Any]) -> YarnConfig:
    unknown = sorted(set(scaling) - _YARN)
    if unknown:
        raise ValueError(
            f"config.json: unknown field(s) of yarn: {', '.join(f'{k} = {scaling[k]!r}' for k in unknown)}"
        )
    return YarnConfig(
        factor=float(scaling["factor"]),
        original_max_position=scaling["original_max_position_embeddings"],
        beta_fast=float(scaling.get("beta_fast", 32)),
        beta_slow=float(scaling.get("beta_slow", 1)),
        mscale=float(scaling.get("mscale", 1)),
        mscale_all_dim=float(scaling.get("mscale_all_dim", 0)),
    )


def _deepseek(data: Mapping[str, Any]) -> ModelConfig:
    rules = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_interleave": True, "moe_layer_freq": 1}
    for key, value in rules.items():
        if data.get(key, value) != value:
            raise ValueError(f"config.json: {key} = {data[key]!r}; deepseek_v3 has {value!r}")
    heads, kv_heads = data["num_attention_heads"], data.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(
            f"config.json: num_key_value_heads = {kv_heads} must equal num_attention_heads = {heads} in MLA"
        )
    if data.get("attention_bias"):
        raise ValueError("config.json: attention_bias = true is not supported; released DeepSeek models have none")
    theta, scaling = _rope(data)
    attention = MLAConfig(
        num_heads=heads,
        q_lora_rank=data.get("q_lora_rank"),
        kv_lora_rank=data["kv_lora_rank"],
        qk_nope_head_dim=data["qk_nope_head_dim"],
        qk_rope_head_dim=data["qk_rope_head_dim"],
        v_head_dim=data["v_head_dim"],
        rope_theta=theta,
        rope_scaling=_yarn(scaling) if scaling else None,
    )
    moe = MoEConfig(
        num_experts=data["n_routed_experts"],
        num_shared_experts=data.get("n_shared_experts") or 0,
        topk=data["num_experts_per_tok"],
        expert_dim=data["moe_intermediate_size"],
        num_groups=data.get("n_group") or 1,
        topk_groups=data.get("topk_group") or 1,
        normalize_topk=data.get("norm_topk_prob", True),
        routed_scale=data.get("routed_scaling_factor", 1.0),
        num_dense_layers=data.get("first_k_dense_replace", 0),
    )
    depth = data.get("num_nextn_predict_layers") or 0
    return ModelConfig(attention=attention, moe=moe, num_mtp_layers=depth, **_common(data))


def _dense(kind: str, data: Mapping[str, Any]) -> ModelConfig:
    if data.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window = true is not supported")
    if set(data.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"config.json: layer_types = {data['layer_types']!r}; only full_attention is supported")
    if kind == "llama" and (data.get("attention_bias") or data.get("mlp_bias")):
        raise ValueError("config.json of llama: attention_bias and mlp_bias are not supported")
    theta, scaling = _rope(data)
    if scaling:
        raise ValueError(f"config.json of {kind}: rope scaling {dict(scaling)!r} is not supported")
    heads = data["num_attention_heads"]
    attention = GQAConfig(
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        rope_theta=theta,
        qkv_bias=kind == "qwen2",
    )
    return ModelConfig(attention=attention, moe=None, **_common(data))


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The published form: DeepseekV3ForCausalLM for MLA with experts, Qwen2 or Llama for dense grouped-query models."""
    data: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "use_cache": True,
    }
    a, moe = config.attention, config.moe
    if isinstance(a, GQAConfig):
        if moe is not None or config.num_mtp_layers:
            raise ValueError(
                "a checkpoint of grouped-query attention with experts or MTP has no published format yet: set "
                "model.moe = 'none' and model.num_mtp_layers = 0, or attention.kind = 'mla'"
            )
        kind, name = ("qwen2", "Qwen2ForCausalLM") if a.qkv_bias else ("llama", "LlamaForCausalLM")
        data |= {"architectures": [name], "model_type": kind, "num_attention_heads": a.num_heads}
        data |= {"num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim, "rope_theta": a.rope_theta}
        return data
    if moe is None or moe.score != "sigmoid":
        raise ValueError(
            "a checkpoint of MLA without experts, or with a softmax router, has no published format yet: keep "
            "model.moe with score = 'sigmoid', or use attention.kind = 'gqa' for a dense model"
        )
    data |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "attention_bias": False,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": moe.expert_dim,
        "first_k_dense_replace": moe.num_dense_layers,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "topk_group": moe.topk_groups,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": moe.normalize_topk,
        "routed_scaling_factor": moe.routed_scale,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "rope_theta": a.rope_theta,
        "rope_scaling": None,
    }
    if a.rope_scaling is not None:
        y = a.rope_scaling
        data["rope_scaling"] = {
            "type": "yarn",
            "factor": y.factor,
            "original_max_position_embeddings": y.original_max_position,
            "beta_fast": y.beta_fast,
            "beta_slow": y.beta_slow,
            "mscale": y.mscale,
            "mscale_all_dim": y.mscale_all_dim,
        }
    return data
