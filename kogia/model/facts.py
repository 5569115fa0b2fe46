"""What a model is and what it costs, from its configuration alone. Torch-free."""

from dataclasses import dataclass

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeScaling
from kogia.model.presets import attention_twins

SHORT_CONTEXT = 4096
"""FLOPs are given at this length beside the one asked for, as the reports do."""
_FP8_SCALE_WIDTH = 128  # numbers of an FP8 row that share one float32 scale


@dataclass(frozen=True)
class Part:
    name: str
    params: int
    active: int
    """Of them, what one token is multiplied with."""


@dataclass(frozen=True)
class Costs:
    """Counts per model and per token; the multi-token-prediction modules are in `mtp_params` alone."""

    params: int
    active_params: int
    """Without the input embedding, of which a token reads one row."""
    active_share: float
    embedding_params: int
    """What the reports add where they count the input embedding as activated; 0 where the head shares it."""
    mtp_params: int
    parts: tuple[Part, ...]
    context: int
    cache_bytes: dict[str, int]
    """Attention -> bytes cached per token in bfloat16, this model first, then its twins."""
    forward_flops: dict[int, float]
    """Context -> FLOPs per token of a forward pass; training takes three times as many."""


def model_costs(config: ModelConfig, context: int | None = None) -> Costs:
    """`context` None takes the longest the model is made for. Raises ValueError for one below 1."""
    context = config.max_position if context is None else context
    if context < 1:
        raise ValueError(f"context = {context}: must be at least 1 token")
    active = config.num_active_params(input_embedding=False)
    contexts = sorted({min(SHORT_CONTEXT, context), context})
    return Costs(
        params=config.num_params(),
        active_params=active,
        active_share=active / config.num_params(),
        embedding_params=config.num_active_params() - active,
        mtp_params=config.num_mtp_params(),
        parts=_parts(config),
        context=context,
        cache_bytes=_cache_bytes(config),
        forward_flops={length: config.flops_per_token(length) / 3 for length in contexts},
    )


def _parts(config: ModelConfig) -> tuple[Part, ...]:
    parts = []
    for name, params in config.parts():
        active = params
        if name == "embedding and head":
            active = config.vocab_size * config.dim
        elif name == "routed experts" and config.moe is not None:
            active = params * config.moe.topk // config.moe.num_experts
        elif name.startswith("dense"):
            name = _rest_name(config.moe)
        if params and name != "multi-token prediction":
            parts.append(Part(name, params, active))
    return tuple(parts)


def _rest_name(moe: MoEConfig | None) -> str:
    """What `ModelConfig.parts` counts beside attention and routed experts in this model."""
    if moe is None:
        return "feed-forward"
    return "dense layers, " * (moe.num_dense_layers > 0) + "shared experts, " * (moe.num_shared_experts > 0) + "router"


def _cache_bytes(config: ModelConfig) -> dict[str, int]:
    a = config.attention
    rows = {attention_name(a): config.cache_bytes_per_token()}
    if a.kind == "mla":
        rows["the same, latent in FP8"] = config.num_layers * _fp8_row_bytes(a)
    return rows | {name: twin.cache_bytes_per_token() for name, twin in attention_twins(config).items()}


def _fp8_row_bytes(a: MLAConfig) -> int:
    """The row of the published FP8 cache: FP8 latent with a float32 scale per 128 numbers, the rotary key in bf16; the
    indexer's key is FP8 with one scale (DeepSeek-V3.2, FlashMLA)."""

    def scaled(width: int) -> int:
        return width + 4 * -(-width // _FP8_SCALE_WIDTH)

    return scaled(a.kv_lora_rank) + 2 * a.qk_rope_head_dim + (scaled(a.indexer.head_dim) if a.indexer else 0)


def attention_name(a: MLAConfig | GQAConfig) -> str:
    """MLA, MHA, MQA, or GQA with its number of key/value heads."""
    if a.kind == "mla":
        return "MLA" if a.indexer is None else "MLA + indexer"
    if a.num_kv_heads == a.num_heads:
        return "MHA"
    return "MQA" if a.num_kv_heads == 1 else f"GQA-{a.num_kv_heads}"


def architecture(config: ModelConfig) -> dict[str, str]:
    """What the model is built of, one line per part, in words."""
    a, moe = config.attention, config.moe
    tied = "head tied to the embedding" if config.tie_embeddings else "separate output head"
    lines = {"layers": _layers(config), "width": f"{config.dim:,}; vocabulary {config.vocab_size:,}, {tied}"}
    lines |= _latent_heads(a) if a.kind == "mla" else _heads(a)
    if moe is not None:
        shared = f", {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
        lines["experts"] = f"{moe.num_experts} routed, {moe.topk} per token{shared}; {moe.expert_dim:,} wide"
        groups = f"; {moe.topk_groups} of {moe.num_groups} groups" if moe.num_groups > 1 else ""
        gates = "gates normalised" if moe.normalize_topk else "gates as they are"
        scaled = f", scaled by {moe.routed_scale:g}" * (moe.routed_scale != 1)
        lines["router"] = f"{moe.score}, {gates}{scaled}{groups}"
    if moe is None or moe.num_dense_layers:
        lines["feed-forward"] = f"SwiGLU, {config.ffn_dim:,} wide"
    lines["context"] = f"{config.max_position:,} tokens"
    lines["rotary"] = f"base {a.rope_theta:,.0f}{_scaling(a.rope_scaling)}"
    return lines


def _layers(config: ModelConfig) -> str:
    mixtures = sum(config.is_moe_layer(i) for i in range(config.num_layers))
    text = f"{config.num_layers}"
    if mixtures:
        dense = config.num_layers - mixtures
        text += f": {dense} dense, {mixtures} of experts" if dense else ", all of experts"
    return text + f", then {config.num_mtp_layers} of multi-token prediction" * bool(config.num_mtp_layers)


def _latent_heads(a: MLAConfig) -> dict[str, str]:
    query = "direct queries" if a.q_lora_rank is None else f"query rank {a.q_lora_rank:,}"
    lines = {"attention": f"MLA, {a.num_heads} heads; {query}, key and value latent {a.kv_lora_rank:,}"}
    lines["head width"] = f"queries and keys {a.qk_nope_head_dim} + {a.qk_rope_head_dim} rotary, values {a.v_head_dim}"
    if a.indexer is not None:
        i = a.indexer
        lines["indexer"] = f"{i.num_heads} heads, {i.head_dim} wide, pick the {i.topk:,} tokens a query attends to"
    return lines


def _heads(a: GQAConfig) -> dict[str, str]:
    shared = "" if a.num_kv_heads == a.num_heads else f", {a.num_kv_heads} of keys and values"
    lines = {"attention": f"{attention_name(a).partition('-')[0]}, {a.num_heads} heads{shared}"}
    extras = "; bias on query, key and value" * a.qkv_bias + "; queries and keys normalised" * a.qk_norm
    return lines | {"head width": f"{a.head_dim}{extras}"}


def _scaling(scaling: RopeScaling) -> str:
    if scaling is None:
        return ""
    over = f"x {scaling.factor:g} over {scaling.original_max_position:,}"
    if scaling.kind == "llama3":
        return f"; Llama 3 scaling {over}"
    mscale = f"{scaling.mscale:g}" + f" / {scaling.mscale_all_dim:g}" * (scaling.mscale != scaling.mscale_all_dim)
    return f"; YaRN {over}, mscale {mscale}"
