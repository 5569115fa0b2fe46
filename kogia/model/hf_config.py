"""Hugging Face `config.json` -> `ModelConfig` (the way back is hf_export.py). Torch-free: planning and `--dry-run` read
models without loading them. What single fields may hold is in hf_fields.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from kogia import log
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
from kogia.model.hf_fields import checked, checked_rope, foreign, left_out_shapes, listed, refuse, shown, unread_rope

# Fields that say nothing about what the forward pass computes. How the weights are stored (`quantization_config`) is a
# matter for the loader.
_NEUTRAL = frozenset(
    "architectures auto_map model_type torch_dtype dtype transformers_version use_cache pad_token_id attention_dropout "
    "pretraining_tp ep_size aux_loss_alpha seq_aux output_router_logits _name_or_path is_moe qk_head_dim return_dict "
    "output_hidden_states chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder "
    "output_attentions max_window_layers tokenizer_class default_theta quantization_config router_aux_loss_coef".split()
)
_SHARED = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps rope_theta "
    "rope_scaling rope_parameters max_position_embeddings tie_word_embeddings".split()
)
# Read in every format, or checked to be what the format says anyway
_COMMON = frozenset(
    "bos_token_id eos_token_id initializer_range num_key_value_heads head_dim hidden_act attention_bias mlp_bias "
    "rope_interleave layer_types".split()
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
_ELSEWHERE = frozenset().union(*_FIELDS.values()) - _MTP  # more layers behind a model do not change it


def config_from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """Read a published configuration; fields that nobody here knows are named in one warning.

    Raises ValueError on an unknown model type, on a field of the wrong type, and on one by which another architecture
    computes something that this one does not.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError(f"config.json: model_type = {shown(kind)} is not supported; known: {', '.join(_FIELDS)}")
    known = _FIELDS[kind] | _COMMON
    others = foreign({key: value for key, value in data.items() if key not in known}, _ELSEWHERE)
    refuse(kind, others)
    fields = checked(kind, data, known)
    config = _own(data) if kind == "kogia" else _published(kind, fields)
    unread = {key: value for key, value in data.items() if key not in _NEUTRAL | known | others.keys()}
    if unread := unread | unread_rope(fields):
        log.warn(f"config.json of {kind}: not known here, and passed over: {listed(unread)}")
    return config


def left_out(data: Mapping[str, Any]) -> list[str]:
    """Optional fields that shape tensors and are not there, so that the format's own values were taken."""
    return left_out_shapes(data, _FIELDS.get(str(data.get("model_type")), frozenset()) | _COMMON)


def _own(data: Mapping[str, Any]) -> ModelConfig:
    if not isinstance(data.get("kogia"), Mapping):
        raise ValueError("config.json of kogia: field 'kogia' is missing; it must hold the model's settings")
    return from_dict(ModelConfig, data["kogia"], "config.json: kogia")


def _published(kind: str, data: Mapping[str, Any]) -> ModelConfig:
    _require(kind, data, hidden_act="silu", attention_bias=kind == "qwen2", mlp_bias=False)
    try:
        if kind in ("deepseek_v2", "deepseek_v3", "deepseek_v32"):
            attention, moe = _latent_attention(kind, data), _deepseek_experts(kind, data)
        else:
            attention, moe = _head_attention(kind, data), None
            if kind == "deepseek":
                moe = _deepseek_experts(kind, data)
            elif kind == "qwen3_moe":
                moe = _qwen_experts(kind, data)
        return ModelConfig(
            attention=attention, moe=moe, num_mtp_layers=data.get("num_nextn_predict_layers", 0), **_common(data)
        )
    except KeyError as missing:
        raise ValueError(f"config.json of {kind}: field {missing} is missing") from None


def _require(kind: str, data: Mapping[str, Any], **rules: Any) -> None:
    """Each named field must have its value where it is present at all."""
    for key, value in rules.items():
        if data.get(key, value) != value:
            raise ValueError(
                f"config.json: {key} = {shown(data[key])} is not supported; {kind} has {shown(value)} here"
            )


def _common(data: Mapping[str, Any]) -> dict[str, Any]:
    eos = data.get("eos_token_id", 1)
    eos = eos[0] if isinstance(eos, list) else eos
    return {
        "vocab_size": data["vocab_size"],
        "dim": data["hidden_size"],
        "num_layers": data["num_hidden_layers"],
        "ffn_dim": data["intermediate_size"],
        "norm_eps": float(data["rms_norm_eps"]),
        "max_position": data["max_position_embeddings"],
        "tie_embeddings": data["tie_word_embeddings"],
        "init_std": float(data["initializer_range"]),
        "bos_id": data.get("bos_token_id", 0),
        "eos_id": eos,
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


def _rope(kind: str, data: Mapping[str, Any]) -> tuple[float, YarnConfig | Llama3RopeConfig | None]:
    """(theta, scaling), from either spelling of the rope fields."""
    tables = [checked_rope(kind, data[name]) for name in ("rope_scaling", "rope_parameters") if data.get(name)]
    theta = float(next((table["rope_theta"] for table in tables if "rope_theta" in table), data["rope_theta"]))
    table = tables[0] if tables else {}
    rope_type = table.get("rope_type", table.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type not in ("yarn", "llama3"):
        raise ValueError(f"config.json: rope type {shown(rope_type)} is not supported; known: default, yarn, llama3")
    if missing := sorted({"factor", "original_max_position_embeddings"} - table.keys()):
        raise ValueError(f"config.json: field {', '.join(missing)} of the {rope_type} rope scaling is missing")
    names = YARN_FIELDS if rope_type == "yarn" else LLAMA3_FIELDS
    values = {names[key]: float(value) for key, value in table.items() if key in names}
    values["original_max_position"] = int(values["original_max_position"])
    if rope_type == "llama3":
        return theta, from_dict(Llama3RopeConfig, values, "rope_scaling")
    values |= {"mscale": _mscale(kind, table), "mscale_all_dim": table.get("mscale_all_dim", 0.0)}
    return theta, from_dict(YarnConfig, values, "rope_scaling")


def _mscale(kind: str, table: Mapping[str, Any]) -> float:
    """The mscale by which cos and sin are multiplied with what transformers multiplies them with: `attention_factor`,
    else the ratio of the two mscales where both are given and not 0, else 0.1 ln(factor) + 1."""
    mscale, all_dim, factor = table.get("mscale", 0.0), table.get("mscale_all_dim", 0.0), table["factor"]
    given = table.get("attention_factor")
    if given is None and (mscale or not all_dim):
        return float(mscale) if all_dim else 1.0
    if factor <= 1:
        if given in (None, 1):
            return 1.0
        raise ValueError(f"config.json of {kind}: attention_factor = {given} with factor = {factor}: must be 1")
    slope = 0.1 * math.log(factor)
    wanted = 1 + slope if given is None else given
    return (wanted * (slope * all_dim + 1) - 1) / slope


def _latent_attention(kind: str, data: Mapping[str, Any]) -> MLAConfig:
    heads, kv_heads = data["num_attention_heads"], data.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(
            f"config.json: num_key_value_heads = {kv_heads} must equal num_attention_heads = {heads} in MLA"
        )
    _require(kind, data, rope_interleave=True)
    _require_layer_types(data, "full_attention", "indexed_attention")
    theta, scaling = _rope(kind, data)
    if isinstance(scaling, Llama3RopeConfig):
        raise ValueError(f"config.json of {kind}: rope type 'llama3' is not supported; known: default, yarn")
    indexer = None
    if kind == "deepseek_v32":
        indexer = IndexerConfig(data["index_n_heads"], data["index_head_dim"], data["index_topk"])
    return MLAConfig(
        num_heads=heads,
        q_lora_rank=data["q_lora_rank"],
        kv_lora_rank=data["kv_lora_rank"],
        qk_nope_head_dim=data["qk_nope_head_dim"],
        qk_rope_head_dim=data["qk_rope_head_dim"],
        v_head_dim=data["v_head_dim"],
        rope_theta=theta,
        rope_scaling=scaling,
        indexer=indexer,
    )


def _head_attention(kind: str, data: Mapping[str, Any]) -> GQAConfig:
    _require(kind, data, use_sliding_window=False)
    _require_layer_types(data, "full_attention")
    theta, scaling = _rope(kind, data)
    heads = data["num_attention_heads"]
    kv_heads = data.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"config.json: num_key_value_heads = {kv_heads} must divide num_attention_heads = {heads}")
    return GQAConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
    )


def _require_layer_types(data: Mapping[str, Any], *known: str) -> None:
    if unknown := sorted(set(data.get("layer_types", ())) - set(known)):
        raise ValueError(f"config.json: layer_types = [{shown(unknown[0])}, ...]; only {known[0]} is supported")


def _deepseek_experts(kind: str, data: Mapping[str, Any]) -> MoEConfig | None:
    """DeepSeekMoE and V2 take softmax scores, V3 sigmoid scores with a selection bias. None: every layer is dense."""
    sigmoid = kind in ("deepseek_v3", "deepseek_v32")
    layers, dense = data["num_hidden_layers"], data["first_k_dense_replace"]
    _require(kind, data, scoring_func="sigmoid" if sigmoid else "softmax", moe_layer_freq=1)
    _require(kind, data, mlp_layer_types=["dense" if i < dense else "sparse" for i in range(layers)])
    method, known = data["topk_method"], ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    if method not in known:
        raise ValueError(f"config.json: topk_method = {shown(method)}; {kind} has {' or '.join(map(repr, known))}")
    if kind == "deepseek_v2" and data["norm_topk_prob"]:
        raise ValueError(
            "config.json of deepseek_v2: norm_topk_prob = true: the released code then drops routed_scaling_factor, "
            "other implementations ignore the field; no released model sets it, so neither reading is right"
        )
    if dense >= layers and not data.get("num_nextn_predict_layers"):
        return None
    groups, kept = _expert_groups(kind, data) if method != "greedy" else (1, 1)
    return MoEConfig(
        num_experts=data["n_routed_experts"],
        num_shared_experts=data["n_shared_experts"] or 0,
        topk=data["num_experts_per_tok"],
        expert_dim=data["moe_intermediate_size"],
        score="sigmoid" if sigmoid else "softmax",
        num_groups=groups,
        topk_groups=kept,
        normalize_topk=data["norm_topk_prob"],
        routed_scale=float(data["routed_scaling_factor"]),
        num_dense_layers=dense,
    )


def _expert_groups(kind: str, data: Mapping[str, Any]) -> tuple[int, int]:
    """Into how many groups the experts are split, and how many of them a token may use."""
    experts, groups, kept = data["n_routed_experts"], data["n_group"] or 1, data["topk_group"] or 1
    if experts % groups or kept > groups:
        raise ValueError(
            f"config.json of {kind}: n_group = {groups}, topk_group = {kept}: the groups must divide "
            f"n_routed_experts = {experts}, and topk_group be at most n_group"
        )
    return groups, kept


def _qwen_experts(kind: str, data: Mapping[str, Any]) -> MoEConfig:
    _require(kind, data, decoder_sparse_step=1, mlp_only_layers=[])
    return MoEConfig(
        num_experts=data[next((name for name in ("num_experts", "num_local_experts") if name in data), "num_experts")],
        num_shared_experts=0,
        topk=data["num_experts_per_tok"],
        expert_dim=data["moe_intermediate_size"],
        score="softmax",
        normalize_topk=data["norm_topk_prob"],
        num_dense_layers=0,
    )
