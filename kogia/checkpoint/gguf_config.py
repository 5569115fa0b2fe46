"""The metadata of a GGUF file as the `config.json` of the model it was made from, and the way back. Torch-free.

Keys begin with the architecture: `llama.block_count`. Which fields the published formats have, and what may be in them,
is known to `kogia.model.hf_config`, through which what comes out of here goes like any other `config.json`.
"""

import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.gguf_file import GGUFEntry, GGUFFile, read_gguf
from kogia.checkpoint.gguf_tensors import ROPE_FACTORS
from kogia.model.config import Llama3RopeConfig, MLAConfig, ModelConfig, YarnConfig
from kogia.model.hf_config import config_from_hf
from kogia.model.hf_export import CLASSES, config_to_hf

FORMATS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "deepseek2": "deepseek_v2"}
"""Architecture -> `model_type`. deepseek2 is deepseek_v3 where its gates are sigmoids."""
_SHARED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_DEEPSEEK = {
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
}
_QWEN_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_ROPE = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_READ_APART = frozenset(
    "vocab_size rope.dimension_count rope.scaling.type rope.scaling.yarn_log_multiplier rope.scaling.finetuned "
    "attention.key_length attention.value_length attention.key_length_mla attention.value_length_mla "
    "expert_gating_func".split()
)
_CHANGING = frozenset(
    "attention.scale attention.sliding_window attention.clamp_kqv attention.temperature_scale attn_logit_softcapping "
    "final_logit_softcapping logit_scale residual_scale embedding_scale use_parallel_residual rope.scale_linear "
    "interleave_moe_layer_step nextn_predict_layers attention.output_scale attention.value_scale expert_group_scale "
    "expert_latent_length rope.scaling.alpha rope.scaling.yarn_attn_factor rope.scaling.yarn_ext_factor".split()
)
_OFF = (None, 0, False, "")
_MSCALE_SLOPE = 0.1  # of the logarithm of YaRN's factor; llama.cpp keeps its product with mscale_all_dim
_SOFTMAX, _SIGMOID = 1, 2  # gates
_LLAMA3_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2; all share the rest


def config_from_gguf(path: Path) -> dict[str, Any]:
    """The metadata of a file as a `config.json`, which `config_from_hf` takes.

    Raises ValueError for an architecture that is not known here, and for values that no such model has.
    """
    file = read_gguf(path)
    try:
        return dict(_config(file))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@lru_cache(maxsize=2)  # what is warned of is said once
def _config(file: GGUFFile) -> dict[str, Any]:
    keys, tokens = _Keys(file.metadata), file.metadata.get("tokenizer.ggml.tokens")
    data: dict[str, Any] = {
        "architectures": [CLASSES[keys.format]],
        "model_type": keys.format,
        "vocab_size": keys.get("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "tie_word_embeddings": "output.weight" not in file.entries,
        **keys.named(_SHARED),
        **_special_ids(file.metadata),
        **(_latent_attention(keys) if keys.architecture == "deepseek2" else _heads(keys)),
    }
    if table := _rope_table(keys, file.entries.get(ROPE_FACTORS), file.path):
        data["rope_scaling"] = table
    if keys.architecture == "qwen3moe":
        data |= keys.named(_QWEN_EXPERTS) | {"norm_topk_prob": True}  # as llama.cpp computes it, whatever is said
        data.setdefault("intermediate_size", data.get("moe_intermediate_size"))
    keys.check()
    try:
        config_from_hf(data)
    except ValueError as error:
        raise ValueError(f"its metadata as {error}") from None
    return data


class _Keys:
    """The metadata of one architecture; what nobody has asked for is told in the end."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.architecture = metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in FORMATS:
            raise ValueError(f"architecture {self.architecture!r:.100} is not supported; known: {', '.join(FORMATS)}")
        if metadata.get("split.count", 1) not in (0, 1):
            raise ValueError("one of several files of a model; join them with `llama-gguf-split --merge`")
        prefix = f"{self.architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self._asked = set(_READ_APART)

    @property
    def format(self) -> str:
        sigmoid = self.architecture == "deepseek2" and self.get("expert_gating_func") == _SIGMOID
        return "deepseek_v3" if sigmoid else FORMATS[str(self.architecture)]

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.architecture}.{key} = {value!r:.100}: must be a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise ValueError(f"{self.architecture}.{key} = {value!r:.100}: must be a positive number")
        return float(value)

    def named(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Those of the keys that are there, by their published names."""
        self._asked |= names.keys()
        return {name: self._values[key] for key, name in names.items() if key in self._values}

    def check(self) -> None:
        """Raise ValueError for keys that change what a model computes; warn of others that nobody has asked for."""
        if self.get("attention.causal", True) is not True:
            raise ValueError(f"{self.architecture}.attention.causal is off: no model that writes text")
        unread = {key: value for key, value in self._values.items() if key not in self._asked and value not in _OFF}
        unread.pop("attention.causal", None)
        if working := {key: value for key, value in unread.items() if key in _CHANGING}:
            raise ValueError(f"{self._shown(working)}: changes what the model computes, and nothing here does that")
        if unread:
            log.warn(f"GGUF metadata not known here, and passed over: {self._shown(unread)}")

    def _shown(self, values: Mapping[str, Any]) -> str:
        return ", ".join(f"{self.architecture}.{key} = {value!r:.50}" for key, value in sorted(values.items()))


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`eos_token_id` is a list where a turn ends with another token than a text."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ids = [end for end in dict.fromkeys(ends) if end is not None]
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    found = {} if begin is None else {"bos_token_id": begin}
    return found | ({"eos_token_id": ids if ids[1:] else ids[0]} if ids else {})


def _heads(keys: _Keys) -> dict[str, Any]:
    heads = keys.whole("attention.head_count")
    width = keys.whole("attention.key_length", keys.whole("embedding_length") // heads)
    value, rotary = keys.whole("attention.value_length", width), keys.whole("rope.dimension_count", width)
    if not width == value == rotary:
        raise ValueError(
            f"heads with keys of {width} numbers, values of {value} and rotary parts of {rotary}; only heads where all "
            "are equal are supported"
        )
    if keys.architecture == "llama" and keys.get("expert_count"):
        raise ValueError("llama with experts (Mixtral) is not supported; known with experts: qwen3moe, deepseek2")
    return {"head_dim": width, "num_key_value_heads": keys.get("attention.head_count_kv", heads)}


def _latent_attention(keys: _Keys) -> dict[str, Any]:
    """Newer files say with `_mla` how wide heads are, and without it what the cache of llama.cpp holds."""
    query = keys.whole("attention.key_length_mla" if keys.get("attention.key_length_mla") else "attention.key_length")
    value = keys.whole(
        "attention.value_length_mla" if keys.get("attention.key_length_mla") else "attention.value_length"
    )
    rotary = keys.whole("rope.dimension_count")
    data = {"q_lora_rank": None} | keys.named(_DEEPSEEK)
    data |= {"num_key_value_heads": keys.whole("attention.head_count")}
    data |= {"qk_nope_head_dim": query - rotary, "v_head_dim": value}
    if keys.format == "deepseek_v3":
        return {"n_group": 1, "topk_group": 1} | data | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    grouped = keys.whole("expert_group_count", 1) > 1
    return data | {"scoring_func": "softmax", "topk_method": "group_limited_greedy" if grouped else "greedy"}


def _rope_table(keys: _Keys, factors: GGUFEntry | None, path: Path) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if factors is not None:
        return _llama3_table(_numbers(path, factors), keys.number("rope.freq_base", 10000.0))
    table = keys.named(_ROPE)
    if kind in _OFF or kind == "none" or (kind == "linear" and table.get("factor", 1) == 1):
        return None
    if keys.get("rope.scaling.yarn_log_multiplier"):
        mscale = round(keys.number("rope.scaling.yarn_log_multiplier", 0.0) / _MSCALE_SLOPE, 6)
        table |= {"mscale": mscale, "mscale_all_dim": mscale}
    return {"rope_type": kind, **table}


def _numbers(path: Path, entry: GGUFEntry) -> list[float]:
    """A small float32 vector."""
    count = entry.shape[0] if len(entry.shape) == 1 else 0
    if entry.type != 0 or not 1 <= count <= 1024:
        raise ValueError(f"{entry.name} {list(entry.shape)} of type {entry.type}: must be a vector of F32")
    with open(path, "rb") as file:
        file.seek(entry.offset)
        data = file.read(4 * count)
    if len(data) != 4 * count:
        raise ValueError(f"{entry.name} lies beyond the end of the file, which is cut")
    return list(struct.unpack(f"<{count}f", data))


def _llama3_table(factors: list[float], theta: float) -> dict[str, Any]:
    """The settings that llama.cpp's factors were computed from: it keeps only those. Raises ValueError for others."""
    for factor in _LLAMA3_FACTORS:
        scaling = Llama3RopeConfig(factor=factor)
        wanted = llama3_factors(scaling, 2 * len(factors), theta)
        if all(abs(a - b) <= 1e-3 * b for a, b in zip(factors, wanted, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    raise ValueError(f"{ROPE_FACTORS} stretches wavelengths up to {max(factors):g} times, not as Llama 3.1 or 3.2 does")


def llama3_factors(scaling: Llama3RopeConfig, head_dim: int, theta: float) -> list[float]:
    """By how much each pair's wavelength is stretched: `head_dim` / 2 numbers."""
    from kogia.ops.rope import inverse_frequencies, llama3_inverse_frequencies

    settings = {name: value for name, value in vars(scaling).items() if name != "kind"}
    kept = inverse_frequencies(head_dim, theta)
    return (kept / llama3_inverse_frequencies(head_dim, theta, **settings)).tolist()


# The way back ---------------------------------------------------------------------------------------------------------


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model for llama.cpp, which has no modules of multi-token prediction.

    Raises ValueError for a model that it would compute otherwise, or not at all.
    """
    data = config_to_hf(replace(config, num_mtp_layers=0))
    architectures = {kind: name for name, kind in FORMATS.items()} | {"deepseek_v3": "deepseek2"}
    if data["model_type"] not in architectures:
        raise ValueError(
            f"models of the kind {data['model_type']} have no GGUF form; known: {', '.join(architectures)}"
        )
    architecture = architectures[data["model_type"]]
    values = {"vocab_size": config.vocab_size, **_keyed(_SHARED, data), **_rope_values(config)}
    if isinstance(config.attention, MLAConfig):
        values |= _latent_values(config.attention, data)
    else:
        width = config.attention.head_dim
        values |= {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": width}
    if architecture == "qwen3moe":
        if not data["norm_topk_prob"]:
            raise ValueError("norm_topk_prob = false: llama.cpp divides a token's gates by their sum in qwen3moe")
        values |= _keyed(_QWEN_EXPERTS, data)
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in values.items()}


def _keyed(names: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: data[name] for key, name in names.items() if data.get(name) is not None}


def _latent_values(attention: MLAConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """The cache of llama.cpp holds a latent row for one head of keys, whose first part is the head of values."""
    return {
        **_keyed(_DEEPSEEK, data),
        "attention.head_count_kv": 1,
        "attention.key_length": attention.latent_row,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "expert_gating_func": _SIGMOID if data["scoring_func"] == "sigmoid" else _SOFTMAX,
    }


def _rope_values(config: ModelConfig) -> dict[str, Any]:
    scaling, latent = config.attention.rope_scaling, isinstance(config.attention, MLAConfig)
    if not isinstance(scaling, YarnConfig):  # llama3's is a tensor
        return {}
    if scaling.mscale_all_dim != scaling.mscale if latent else (scaling.mscale, scaling.mscale_all_dim) != (1, 0):
        raise ValueError(
            f"YaRN with mscale = {scaling.mscale}, mscale_all_dim = {scaling.mscale_all_dim}: llama.cpp has them equal "
            "with latent attention, and 1 and 0 without"
        )
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_max_position,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }
    return values | ({"rope.scaling.yarn_log_multiplier": _MSCALE_SLOPE * scaling.mscale} if latent else {})
