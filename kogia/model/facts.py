"""What a model is built of, in words. Torch-free."""

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeScaling
from kogia.model.costs import CacheBytes, Component

_COMPONENTS = {
    Component.VOCABULARY: "embedding and head",
    Component.ATTENTION: "attention",
    Component.ROUTED_EXPERTS: "routed experts",
    Component.NORMS: "norms",
    Component.MTP: "multi-token prediction",
}


def component_name(component: Component, moe: MoEConfig | None) -> str:
    """The words for a component of a model with these experts."""
    if component is not Component.FEED_FORWARD:
        return _COMPONENTS[component]
    if moe is None:
        return "feed-forward"
    dense = ["dense layers"] if moe.num_dense_layers else []
    shared = ["shared experts"] if moe.num_shared_experts else []
    return ", ".join([*dense, *shared, "router"])


def cache_name(cached: CacheBytes) -> str:
    """The words for a kind of cache."""
    return "the same, latent in FP8" if cached.latent_fp8 else attention_name(cached.attention)


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
        scaled = f", scaled by {moe.routed_scale:g}" if moe.routed_scale != 1 else ""
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
    return text + (f", then {config.num_mtp_layers} of multi-token prediction" if config.num_mtp_layers else "")


def _latent_heads(a: MLAConfig) -> dict[str, str]:
    lines = {"attention": f"MLA, {a.num_heads} heads; {_query(a)}, key and value latent {a.kv_lora_rank:,}"}
    lines["head width"] = f"queries and keys {a.qk_nope_head_dim} + {a.qk_rope_head_dim} rotary, values {a.v_head_dim}"
    if a.indexer is not None:
        i = a.indexer
        lines["indexer"] = f"{i.num_heads} heads, {i.head_dim} wide, pick the {i.topk:,} tokens a query attends to"
    return lines


def _query(a: MLAConfig) -> str:
    if a.q_lora_ranks:
        return f"query ranks {min(a.q_lora_ranks):,} to {max(a.q_lora_ranks):,} by layer"
    return "direct queries" if a.q_lora_rank is None else f"query rank {a.q_lora_rank:,}"


def _heads(a: GQAConfig) -> dict[str, str]:
    shared = "" if a.num_kv_heads == a.num_heads else f", {a.num_kv_heads} of keys and values"
    bias = "; bias on query, key and value" if a.qkv_bias else ""
    norm = "; queries and keys normalised" if a.qk_norm else ""
    return {
        "attention": f"{attention_name(a).partition('-')[0]}, {a.num_heads} heads{shared}",
        "head width": f"{a.head_dim}{bias}{norm}",
    }


def _scaling(scaling: RopeScaling) -> str:
    if scaling is None:
        return ""
    over = f"x {scaling.factor:g} over {scaling.original_max_position:,}"
    if scaling.kind == "llama3":
        return f"; Llama 3 scaling {over}"
    all_dim = f" / {scaling.mscale_all_dim:g}" if scaling.mscale_all_dim != scaling.mscale else ""
    return f"; YaRN {over}, mscale {scaling.mscale:g}{all_dim}"
