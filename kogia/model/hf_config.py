"""Hugging Face `config.json` -> `ModelConfig` (the way back is hf_export.py). Torch-free: planning and `--dry-run` read
models without loading them.

An architecture field this code does not know is an error that names it: a model that silently ignores a field computes
something else than its author meant.
"""

from collections.abc import Mapping
from typing import Any

from kogia.config import from_dict
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
LATENT_FIELDS = frozenset("q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim".split())
_INDEXER = frozenset("index_n_heads index_head_dim index_topk".split())
_MTP = frozenset({"num_nextn_predict_layers"})
_WINDOW = frozenset({"use_sliding_window", "sliding_window"})
_QWEN_EXPERTS = frozenset(
    "num_experts num_local_experts num_experts_per_tok norm_topk_prob moe_intermediate_size decoder_sparse_step "
    "mlp_only_layers".split()
)
_FIELDS = {
    "deepseek": _SHARED | _EXPERTS,
    "deepseek_v2": _SHARED | _EXPERTS | LATENT_FIELDS,
    "deepseek_v3": _SHARED | _EXPERTS | LATENT_FIELDS | _MTP,
    "deepseek_v32": _SHARED | _EXPERTS | LATENT_FIELDS | _MTP | _INDEXER,
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


YARN_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
LLAMA3_FIELDS = {
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
    names = YARN_FIELDS if kind == "yarn" else LLAMA3_FIELDS
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
