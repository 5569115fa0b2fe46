"""The fields of a published `config.json`: the type of each, what it is where it is left out, and which fields of other
architectures may not be ignored. Torch-free.

JSON of others is read strictly: "false" is no boolean, true is no number. A field that nobody here knows says nothing
about the computation in all likelihood (tools leave their version and paths there), so it is named and passed over; one
that is known to change what a model computes is refused, unless its value is the one by which it changes nothing.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kogia.model.config import MAX_LAYERS

_LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Type:
    words: str
    holds: Callable[[Any], bool]


def _whole(least: int, most: int = _LARGEST) -> _Type:
    words = f"a whole number from {least} to {most:,}"
    return _Type(words, lambda value: type(value) is int and least <= value <= most)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # also false for NaN


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_ids(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(type(item) is int and 0 <= item <= _LARGEST for item in items)


_SIZE, _COUNT = _whole(1), _whole(0)
_NUMBER = _Type("a number", _is_number)
_POSITIVE = _Type("a positive number", lambda value: _is_number(value) and value >= 1e-30)
_NOT_NEGATIVE = _Type("a number that is not negative", lambda value: _is_number(value) and value >= 0)
_FLAG = _Type("true or false", lambda value: type(value) is bool)
_TEXT = _Type("a string", lambda value: isinstance(value, str))
_TEXTS = _Type("a list of strings", _is_texts)
_TABLE = _Type("an object", lambda value: isinstance(value, Mapping))

_REQUIRED = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads moe_intermediate_size "
    "n_routed_experts num_experts num_local_experts num_experts_per_tok kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim index_n_heads index_head_dim index_topk".split()
)
_MEANT_NULL = frozenset("q_lora_rank n_shared_experts n_group topk_group num_key_value_heads head_dim".split())
"""Where null says "none" or "as many as the heads". Elsewhere null and [] say nothing, as if the field were absent."""
_TYPES: dict[str, _Type] = {
    **dict.fromkeys(_REQUIRED - {"num_hidden_layers"}, _SIZE),
    **dict.fromkeys(
        "q_lora_rank n_group topk_group num_key_value_heads head_dim max_position_embeddings".split(), _SIZE
    ),
    **dict.fromkeys("n_shared_experts first_k_dense_replace moe_layer_freq decoder_sparse_step".split(), _COUNT),
    "num_hidden_layers": _whole(1, MAX_LAYERS),
    "num_nextn_predict_layers": _whole(0, MAX_LAYERS),
    **dict.fromkeys("rms_norm_eps rope_theta routed_scaling_factor".split(), _POSITIVE),
    "initializer_range": _NOT_NEGATIVE,
    **dict.fromkeys("tie_word_embeddings norm_topk_prob use_sliding_window attention_bias mlp_bias".split(), _FLAG),
    "rope_interleave": _FLAG,
    **dict.fromkeys("hidden_act topk_method scoring_func".split(), _TEXT),
    **dict.fromkeys("layer_types mlp_layer_types".split(), _TEXTS),
    **dict.fromkeys("rope_scaling rope_parameters kogia".split(), _TABLE),
    "mlp_only_layers": _Type("a list", lambda value: isinstance(value, list)),
    "bos_token_id": _COUNT,
    "eos_token_id": _Type("a token id or a list of them", _is_ids),
}
_ROPE_TYPES: dict[str, _Type] = {
    **dict.fromkeys("type rope_type".split(), _TEXT),
    **dict.fromkeys("rope_theta factor beta_fast beta_slow attention_factor".split(), _POSITIVE),
    **dict.fromkeys("low_freq_factor high_freq_factor".split(), _POSITIVE),
    **dict.fromkeys("mscale mscale_all_dim attn_factor".split(), _NOT_NEGATIVE),
    "original_max_position_embeddings": _SIZE,
    "truncate": _FLAG,
}

# What the published code of a format takes where a field is left out, as far as it changes the computation.
_DEEPSEEK_V3 = {
    "q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False}
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "deepseek": {"max_position_embeddings": 2048},
    "deepseek_v2": {"max_position_embeddings": 2048, "q_lora_rank": 1536, "n_shared_experts": 2},
    "deepseek_v3": _DEEPSEEK_V3 | {"max_position_embeddings": 4096},
    "deepseek_v32": _DEEPSEEK_V3 | {"max_position_embeddings": 163840},
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 4},
}
_EXPERT_DEFAULTS = {
    "n_shared_experts": None, "n_group": None, "topk_group": None, "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0, "norm_topk_prob": False, "topk_method": "greedy", "scoring_func": "softmax",
}  # fmt: skip
_OF_SHAPES = frozenset(
    "q_lora_rank n_shared_experts first_k_dense_replace num_key_value_heads head_dim tie_word_embeddings "
    "num_nextn_predict_layers".split()
)

# Fields of other architectures, of which the tensors need not show that they are at work.
_SCALES = frozenset(
    "logit_scale logits_scaling embedding_multiplier residual_multiplier attention_multiplier lm_head_multiplier "
    "scale_emb scale_depth mup_base_width mup_width_scale partial_rotary_factor rotary_pct rotary_emb_fraction "
    "rope_ratio extrapolation_factor".split()
)
_CHANGING = _SCALES | frozenset(
    "attn_logit_softcapping final_logit_softcapping logits_soft_cap query_pre_attn_scalar dim_model_base rotary_dim "
    "rope_local_base_freq use_mrope mrope_section mrope_interleaved no_rope_layers no_rope_layer_interval alibi "
    "use_alibi position_embedding_type use_bidirectional_attention is_causal qk_norm use_qk_norm qk_layernorm "
    "use_post_norm use_parallel_residual parallel_residual parallel_attn sandwich_norm hidden_activation "
    "activation_function swiglu_limit sliding_window_pattern attention_window attention_chunk_size "
    "full_attention_interval attn_output_gate attention_sink attention_sinks use_attention_sinks linear_attn_config "
    "linear_num_key_heads mamba_d_state attn_layer_period text_config add_cross_attention "
    "shared_expert_intermediate_size compression_config quantization compress_ratios hc_mult clip_qkv "
    "num_kv_shared_layers rope_interleaved attn_temperature_tuning nope_layer_interval".split()
)
_OFF = (None, False, 0, "", [], {})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_SCALES, (*_OFF, 1)),
    "position_embedding_type": (*_OFF, "rope", "rotary", "absolute"),  # the last is an old default of every model
    "hidden_activation": (*_OFF, "silu"),
    "activation_function": (*_OFF, "silu"),
    "is_causal": (None, True),
    "truncate": (None, True),
}
_ROPE_CHANGING = frozenset(
    "partial_rotary_factor mrope_section mrope_interleaved extrapolation_factor short_factor long_factor "
    "full_attention sliding_attention truncate".split()
)


def checked(kind: str, data: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The fields of `known` that `data` has, each of its type, and the format's own value for those that it leaves out.
    Raises ValueError on one of another type, and on a required one that is null."""
    given = {key: value for key, value in data.items() if key in known and key in _TYPES}
    for key, value in given.items():
        may_be_null = key not in _REQUIRED
        if not _TYPES[key].holds(value) and not (value is None and may_be_null):
            raise ValueError(f"config.json of {kind}: {key} = {shown(value)}; it must be {_TYPES[key].words}")
    said = {key: value for key, value in given.items() if value not in (None, []) or key in _MEANT_NULL}
    experts = _EXPERT_DEFAULTS if kind.startswith("deepseek") else {"norm_topk_prob": False}
    return _COMMON | experts | _LEFT_OUT.get(kind, {}) | said


def checked_rope(kind: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a rope table that say something. Raises ValueError on one of the wrong type or of other models."""
    for key, value in table.items():
        if value is not None and key in _ROPE_TYPES and not _ROPE_TYPES[key].holds(value):
            raise ValueError(
                f"config.json of {kind}: {key} = {shown(value)} of the rope; it must be {_ROPE_TYPES[key].words}"
            )
    refuse(f"{kind} (rope)", {key: value for key, value in table.items() if key in _ROPE_CHANGING})
    return {key: value for key, value in table.items() if value is not None}


def refuse(kind: str, fields: Mapping[str, Any]) -> None:
    """Raise ValueError for those of the fields that are at work."""
    working = {key: value for key, value in fields.items() if not _changes_nothing(key, value)}
    if working:
        raise ValueError(
            f"config.json of {kind}: {listed(working)}: known to change what a model computes, and {kind} has no such "
            "thing here. The model is of another kind than its model_type says, or needs a newer kogia"
        )


def _changes_nothing(key: str, value: Any) -> bool:
    """Whether the value is one of the field's neutral ones; true is not 1."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(key, _OFF)
    )


def foreign(data: Mapping[str, Any], elsewhere: Iterable[str]) -> dict[str, Any]:
    """The fields that other architectures compute by: those of the formats read here, and the others known."""
    names = _CHANGING | frozenset(elsewhere)
    return {key: value for key, value in data.items() if key in names}


def unread_rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the rope tables that nobody here knows, by their full names."""
    return {
        f"{name}.{key}": value
        for name in ("rope_scaling", "rope_parameters")
        for key, value in (data.get(name) or {}).items()
        if key not in _ROPE_TYPES.keys() | _ROPE_CHANGING
    }


def left_out_shapes(data: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """Optional fields that decide the shape of tensors and say nothing in `data`: the format's own values count."""
    of_heads = {"num_key_value_heads", "head_dim"} if "kv_lora_rank" in known else set()
    return sorted(name for name in (_OF_SHAPES & known) - of_heads if data.get(name) is None)


def listed(fields: Mapping[str, Any]) -> str:
    """`a = 1, b = 'x'`, whatever a file puts there."""
    return ", ".join(f"{shown(key)[1:-1]} = {shown(value)}" for key, value in sorted(fields.items()))


def shown(value: Any) -> str:
    """A value of a file for a message: cut where it is long or deep, signs that steer a terminal escaped."""
    form = reprlib.Repr()
    form.maxstring = 100
    return form.repr(value)
