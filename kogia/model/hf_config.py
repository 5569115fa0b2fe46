"""Hugging Face `config.json` <-> `ModelConfig`. Torch-free: planning and `--dry-run` read models without loading them.

An architecture field this code does not know is an error that names it: a model that silently ignores a field computes
something else than its author meant.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kogia.config import from_dict, to_dict
from kogia.model.config import (
    GQAConfig,
    IndexerConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
)

# Fields that say nothing about what the forward pass computes, or that the functions below check. How the weights are
# stored (`quantization_config`) is a matter for the loader.
_NEUTRAL = frozenset(
    "architectures auto_map model_type torch_dtype dtype transformers_version use_cache pad_token_id attention_dropout "
    "pretraining_tp ep_size aux_loss_alpha seq_aux output_router_logits bos_token_id eos_token_id initializer_range "
    "_name_or_path is_moe num_key_value_heads head_dim qk_head_dim hidden_act attention_bias mlp_bias return_dict "
    "output_hidden_states chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder rope_interleave "
    "output_attentions max_window_layers tokenizer_class layer_types default_theta quantization_config "
    "router_aux_loss_coef".split()
)
_SHARED = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps rope_theta "
    "rope_scaling rope_parameters max_position_embeddings tie_word_embeddings".split()
)
_EXPERTS = frozenset(
    "moe_intermediate_size n_shared_experts n_routed_experts num_experts_per_tok moe_layer_freq first_k_dense_replace "
    "n_group topk_group topk_method scoring_func norm_topk_prob routed_scaling_factor mlp_layer_types".split()
)
_LATENT = frozenset("q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim".split())
_INDEXER = frozenset("index_n_heads index_head_dim index_topk".split())
_MTP = frozenset({"num_nextn_predict_layers"})
_WINDOW = frozenset({"use_sliding_window", "sliding_window"})
_QWEN_EXPERTS = frozenset(
    "num_experts num_local_experts num_experts_per_tok norm_topk_prob moe_intermediate_size decoder_sparse_step "
    "mlp_only_layers".split()
)
_FIELDS = {
    "deepseek": _SHARED | _EXPERTS,
    "deepseek_v2": _SHARED | _EXPERTS | _LATENT,
    "deepseek_v3": _SHARED | _EXPERTS | _LATENT | _MTP,
    "deepseek_v32": _SHARED | _EXPERTS | _LATENT | _MTP | _INDEXER,
    "llama": _SHARED,
    "qwen2": _SHARED | _WINDOW,
    "qwen3": _SHARED | _WINDOW,
    "qwen3_moe": _SHARED | _WINDOW | _QWEN_EXPERTS,
    "kogia": frozenset({"kogia"}),
}
_SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
    "moe_intermediate_size n_routed_experts num_experts num_local_experts num_experts_per_tok first_k_dense_replace "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_n_heads index_head_dim index_topk".split()
)
_SIZES_OR_NULL = frozenset(
    "q_lora_rank n_shared_experts n_group topk_group num_nextn_predict_layers num_key_value_heads head_dim".split()
)


def config_from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """Read a published configuration. Raises ValueError on an unknown model type or architecture field."""
    kind = data.get("model_type")
    if kind not in _FIELDS:
        raise ValueError(f"config.json: model_type = {kind!r} is not supported; known: {', '.join(_FIELDS)}")
    unknown = sorted(set(data) - _NEUTRAL - _FIELDS[kind])
    if unknown:
        raise ValueError(
            f"config.json of {kind}: unknown architecture field(s) {', '.join(f'{k} = {data[k]!r}' for k in unknown)}; "
            "loading would ignore what they mean. Remove them only if they change nothing in the forward pass."
        )
    if kind == "kogia":
        table = data.get("kogia")
        if not isinstance(table, Mapping):
            raise ValueError(f"config.json of kogia: field 'kogia' is {table!r}; it must hold the model's settings")
        return from_dict(ModelConfig, table, "config.json: kogia")
    for key, value in data.items():
        fits = type(value) is int or (key in _SIZES_OR_NULL and value is None)
        if key in _SIZES | _SIZES_OR_NULL and not fits:
            raise ValueError(f"config.json of {kind}: {key} = {value!r}; it must be a whole number")
    _require(data, hidden_act="silu", attention_bias=kind == "qwen2", mlp_bias=False)
    try:
        if kind in ("deepseek_v2", "deepseek_v3", "deepseek_v32"):
            attention, moe = _latent_attention(kind, data), _deepseek_experts(kind, data)
        else:
            attention, moe = _head_attention(kind, data), None
            if kind == "deepseek":
                moe = _deepseek_experts(kind, data)
            elif kind == "qwen3_moe":
                moe = _qwen_experts(data)
        depth = data.get("num_nextn_predict_layers") or 0
        return ModelConfig(attention=attention, moe=moe, num_mtp_layers=depth, **_common(data))
    except KeyError as missing:
        raise ValueError(f"config.json of {kind}: field {missing} is missing") from None


def _require(data: Mapping[str, Any], **rules: Any) -> None:
    """Each named field must have its value where it is present at all."""
    for key, value in rules.items():
        if data.get(key, value) not in (value, None):
            raise ValueError(
                f"config.json: {key} = {data[key]!r} is not supported; {data['model_type']} has {value!r} here"
            )


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


_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_LLAMA3 = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}


def _rope(data: Mapping[str, Any]) -> tuple[float, YarnConfig | Llama3RopeConfig | None]:
    """(theta, scaling), from either spelling of the rope fields."""
    table = dict(data.get("rope_parameters") or {})
    theta = float(table.pop("rope_theta", data.get("rope_theta", 10000.0)))
    table = dict(data.get("rope_scaling") or table)
    table.pop("rope_theta", None)
    old = table.pop("type", "default")
    kind = table.pop("rope_type", old)
    if kind == "default":
        return theta, None
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported; known: default, yarn, llama3")
    names = _YARN if kind == "yarn" else _LLAMA3
    unknown = sorted(set(table) - set(names))
    if unknown:
        raise ValueError(
            f"config.json: unknown field(s) of {kind}: {', '.join(f'{k} = {table[k]!r}' for k in unknown)}"
        )
    if missing := sorted({"factor", "original_max_position_embeddings"} - set(table)):
        raise ValueError(f"config.json: field {', '.join(missing)} of the {kind} rope scaling is missing")
    values = {names[key]: float(value) for key, value in table.items() if value is not None}
    values["original_max_position"] = int(values["original_max_position"])
    if kind == "llama3":
        return theta, from_dict(Llama3RopeConfig, values, "rope_scaling")
    return theta, from_dict(YarnConfig, {"mscale_all_dim": 0.0, **values}, "rope_scaling")


def _latent_attention(kind: str, data: Mapping[str, Any]) -> MLAConfig:
    heads, kv_heads = data["num_attention_heads"], data.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(
            f"config.json: num_key_value_heads = {kv_heads} must equal num_attention_heads = {heads} in MLA"
        )
    _require(data, rope_interleave=True)
    theta, scaling = _rope(data)
    if isinstance(scaling, Llama3RopeConfig):
        raise ValueError(f"config.json of {kind}: rope type 'llama3' is not supported; known: default, yarn")
    indexer = None
    if kind == "deepseek_v32":
        indexer = IndexerConfig(data["index_n_heads"], data["index_head_dim"], data["index_topk"])
    return MLAConfig(
        num_heads=heads,
        q_lora_rank=data.get("q_lora_rank"),
        kv_lora_rank=data["kv_lora_rank"],
        qk_nope_head_dim=data["qk_nope_head_dim"],
        qk_rope_head_dim=data["qk_rope_head_dim"],
        v_head_dim=data["v_head_dim"],
        rope_theta=theta,
        rope_scaling=scaling,
        indexer=indexer,
    )


def _head_attention(kind: str, data: Mapping[str, Any]) -> GQAConfig:
    _require(data, use_sliding_window=False)
    if set(data.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"config.json: layer_types = {data['layer_types']!r}; only full_attention is supported")
    theta, scaling = _rope(data)
    heads = data["num_attention_heads"]
    return GQAConfig(
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
    )


def _deepseek_experts(kind: str, data: Mapping[str, Any]) -> MoEConfig | None:
    """DeepSeekMoE and V2 take softmax scores, V3 sigmoid scores with a selection bias. None: every layer is dense."""
    sigmoid = kind in ("deepseek_v3", "deepseek_v32")
    layers, dense = data["num_hidden_layers"], data.get("first_k_dense_replace", 0)
    _require(data, scoring_func="sigmoid" if sigmoid else "softmax", moe_layer_freq=1)
    pattern = ["dense" if i < dense else "sparse" for i in range(layers)]
    _require(data, mlp_layer_types=pattern)
    method = data.get("topk_method", "noaux_tc" if sigmoid else "greedy")
    known = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    if method not in known:
        raise ValueError(f"config.json: topk_method = {method!r}; {kind} has {' or '.join(map(repr, known))}")
    normalize = data.get("norm_topk_prob", sigmoid)
    if kind == "deepseek_v2" and normalize:
        raise ValueError(
            "config.json of deepseek_v2: norm_topk_prob = true: the released code then drops routed_scaling_factor, "
            "other implementations ignore the field; no released model sets it, so neither reading is right"
        )
    if dense >= layers and not data.get("num_nextn_predict_layers"):
        return None
    grouped = method != "greedy"
    return MoEConfig(
        num_experts=data["n_routed_experts"],
        num_shared_experts=data.get("n_shared_experts") or 0,
        topk=data["num_experts_per_tok"],
        expert_dim=data["moe_intermediate_size"],
        score="sigmoid" if sigmoid else "softmax",
        num_groups=(data.get("n_group") or 1) if grouped else 1,
        topk_groups=(data.get("topk_group") or 1) if grouped else 1,
        normalize_topk=normalize,
        routed_scale=data.get("routed_scaling_factor", 1.0),
        num_dense_layers=dense,
    )


def _qwen_experts(data: Mapping[str, Any]) -> MoEConfig:
    _require(data, decoder_sparse_step=1, mlp_only_layers=[])
    return MoEConfig(
        num_experts=data["num_experts"] if "num_experts" in data else data["num_local_experts"],
        num_shared_experts=0,
        topk=data["num_experts_per_tok"],
        expert_dim=data["moe_intermediate_size"],
        score="softmax",
        normalize_topk=data.get("norm_topk_prob", False),
        num_dense_layers=0,
    )


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
    if not a.qk_norm:
        return "deepseek"
    return "qwen3_moe" if not moe.num_shared_experts and not moe.num_dense_layers else "kogia"


_PLAIN_MLA = (
    "num_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta rope_scaling indexer"
).split()
_CLASSES = {
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


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The published form. A model without one is written as model_type "kogia", which only this project reads."""
    kind = published_type(config)
    data: dict[str, Any] = {"architectures": [_CLASSES[kind]], "model_type": kind, "torch_dtype": dtype}
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
        return {"rope_type": "llama3"} | {key: getattr(scaling, name) for key, name in _LLAMA3.items()}
    return {"type": "yarn"} | {key: getattr(scaling, name) for key, name in _YARN.items()}


def _attention_fields(a: MLAConfig | GQAConfig) -> dict[str, Any]:
    if isinstance(a, GQAConfig):
        return {"num_attention_heads": a.num_heads, "num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim}
    data = {"num_attention_heads": a.num_heads, "num_key_value_heads": a.num_heads}
    data |= {name: getattr(a, name) for name in sorted(_LATENT)}
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
