"""What a model costs, from its configuration alone: parameters, FLOPs, weights, cache, memory to train it. Torch-free.

Counts leave the router's bias out, as the papers do. "Active" is what one token is multiplied with in the main model.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, Recompute

SHORT_CONTEXT = 4096
"""FLOPs are given at this length beside the one asked for, as the reports do."""
_FP8_SCALE_WIDTH = 128  # numbers of an FP8 row that share one float32 scale
_FP8_BLOCK = 128  # rows and columns of an FP8 weight that share one float32 scale
_LOGIT_CHUNK, _LOGIT_ROWS = 1 << 17, 256  # logits, or rows of them, that ops/logprob.py holds at a time


class Component(Enum):
    """Where parameters are."""

    VOCABULARY = auto()
    """Embedding and head; a matrix that is both counts once."""
    ATTENTION = auto()
    """Its projections and the indexer's, biases included, norms left out."""
    ROUTED_EXPERTS = auto()
    FEED_FORWARD = auto()
    """What every token passes beside them: dense layers, shared experts, routers."""
    NORMS = auto()
    MTP = auto()
    """The multi-token-prediction modules, beyond the embedding and head that they share."""


@dataclass(frozen=True)
class Part:
    component: Component
    params: int
    active: int


@dataclass(frozen=True)
class CacheBytes:
    """What one kind of attention caches."""

    attention: MLAConfig | GQAConfig
    per_token: int
    """Over all decoder layers, in bfloat16."""
    latent_fp8: bool = False
    """In the published FP8 format of the latent instead."""


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
    weight_bytes: dict[str, int]
    """Dtype -> bytes."""
    context: int
    cache_bytes: tuple[CacheBytes, ...]
    """This model first, then its twins."""
    forward_flops: dict[int, float]
    """Context -> FLOPs per token of a forward pass; training takes three times as many."""


def model_costs(config: ModelConfig, context: int | None = None) -> Costs:
    """`context` None takes the longest the model is made for. Raises ValueError for one below 1."""
    context = config.max_position if context is None else context
    if context < 1:
        raise ValueError(f"context = {context}: must be at least 1 token")
    params, active = num_params(config), num_active_params(config, input_embedding=False)
    contexts = sorted({min(SHORT_CONTEXT, context), context})
    return Costs(
        params=params,
        active_params=active,
        active_share=active / params,
        embedding_params=num_active_params(config) - active,
        mtp_params=num_mtp_params(config),
        parts=tuple(part for part in param_parts(config) if part.component is not Component.MTP),
        weight_bytes=weight_bytes(config),
        context=context,
        cache_bytes=_cache_bytes(config),
        forward_flops={length: flops_per_token(config, length) / 3 for length in contexts},
    )


# Parameters -----------------------------------------------------------------------------------------------------------


def num_params(config: ModelConfig) -> int:
    """Parameters of the main model, MTP modules left out (as the papers count)."""
    return sum(part.params for part in _main_parts(config))


def num_mtp_params(config: ModelConfig) -> int:
    """Parameters of the MTP modules beyond the shared embedding and head."""
    per_module = 2 * config.dim * config.dim + 3 * config.dim
    return sum(per_module + _layer_params(config, config.num_layers + k) for k in range(config.num_mtp_layers))


def num_active_params(config: ModelConfig, *, input_embedding: bool = True) -> int:
    """Parameters that one token touches in the main model (both vocabulary matrices unless told otherwise)."""
    active = sum(part.active for part in _main_parts(config))
    if input_embedding and not config.tie_embeddings:
        active += config.vocab_size * config.dim
    return active


def param_parts(config: ModelConfig) -> tuple[Part, ...]:
    """The components of the main model and its MTP modules, as far as it has them."""
    parts = (*_main_parts(config), Part(Component.MTP, num_mtp_params(config), 0))
    return tuple(part for part in parts if part.params)


def _main_parts(config: ModelConfig) -> tuple[Part, ...]:
    layers, moe = range(config.num_layers), config.moe
    vocabulary = config.vocab_size * config.dim
    attention = sum(_attention_params(config, layer) for layer in layers)
    routed = sum(_routed_params(config, layer) for layer in layers)
    feed_forward = sum(_feed_forward_params(config, layer) for layer in layers)
    norms = sum(_norm_params(config, layer) for layer in layers) + config.dim
    return (
        Part(Component.VOCABULARY, vocabulary if config.tie_embeddings else 2 * vocabulary, vocabulary),
        Part(Component.ATTENTION, attention, attention),
        Part(Component.ROUTED_EXPERTS, routed, 0 if moe is None else routed * moe.topk // moe.num_experts),
        Part(Component.FEED_FORWARD, feed_forward, feed_forward),
        Part(Component.NORMS, norms, norms),
    )


def _layer_params(config: ModelConfig, layer: int) -> int:
    feed_forward = _routed_params(config, layer) + _feed_forward_params(config, layer)
    return _attention_params(config, layer) + feed_forward + _norm_params(config, layer)


def _attention_params(config: ModelConfig, layer: int) -> int:
    a, dim = config.attention, config.dim
    if a.kind == "gqa":
        qkv = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        bias = qkv if a.qkv_bias else 0
        return dim * qkv + bias + a.num_heads * a.head_dim * dim
    q_out = a.num_heads * a.qk_head_dim
    rank = a.query_rank(layer)
    query = dim * q_out if rank is None else rank * (dim + q_out)
    kv = dim * a.latent_row + a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return query + kv + a.num_heads * a.v_head_dim * dim + _indexer_params(a, dim, layer)


def _indexer_params(a: MLAConfig, dim: int, layer: int) -> int:
    if a.indexer is None:
        return 0
    i, rank = a.indexer, a.query_rank(layer) or 0
    return rank * i.num_heads * i.head_dim + dim * (i.head_dim + i.num_heads)


def _norm_params(config: ModelConfig, layer: int) -> int:
    """The two norms of a layer, and those within its attention."""
    a, outer = config.attention, 2 * config.dim
    if a.kind == "gqa":
        return outer + 2 * a.head_dim if a.qk_norm else outer
    indexer = 0 if a.indexer is None else 2 * a.indexer.head_dim
    return outer + (a.query_rank(layer) or 0) + a.kv_lora_rank + indexer


def _routed_params(config: ModelConfig, layer: int) -> int:
    moe = config.moe
    if moe is None or not config.is_moe_layer(layer):
        return 0
    return moe.num_experts * 3 * config.dim * moe.expert_dim


def _feed_forward_params(config: ModelConfig, layer: int) -> int:
    """A dense layer's, or the shared experts and the router."""
    dim, moe = config.dim, config.moe
    if moe is None or not config.is_moe_layer(layer):
        return 3 * dim * config.ffn_dim
    return moe.num_shared_experts * 3 * dim * moe.expert_dim + moe.num_experts * dim


# Compute --------------------------------------------------------------------------------------------------------------


def flops_per_token(config: ModelConfig, context: float, *, is_causal: bool = True, mtp_depths: int = 0) -> float:
    """Training FLOPs (forward and backward) per token at sequence length `context`; MTP modules count as `mtp_depths`.

    6 per active matrix weight, and 6 * heads * (qk + v dims) per pair of a query and a key it attends to. Causal:
    context / 2 keys per query on average, else all. With an indexer it attends to at most `topk`, and scores all of
    them. Nothing that is done again counts twice.
    """
    matrices = sum(part.active for part in _main_parts(config) if part.component is not Component.NORMS)
    modules = sum(_active_matrices(config, config.num_layers + depth) for depth in range(mtp_depths))
    pairs = _attention_products(config.attention, context, 0.5 if is_causal else 1.0)
    return 6.0 * (matrices + modules + (config.num_layers + mtp_depths) * pairs)


def _active_matrices(config: ModelConfig, layer: int) -> int:
    """Weights that a token is multiplied with in an MTP module, the shared head once more among them."""
    moe = config.moe
    routed = 0 if moe is None else _routed_params(config, layer) * moe.topk // moe.num_experts
    own = _attention_params(config, layer) + routed + _feed_forward_params(config, layer)
    return own + 2 * config.dim * config.dim + config.vocab_size * config.dim


def _attention_products(a: MLAConfig | GQAConfig, context: float, share: float) -> float:
    """Multiply-adds of one query with keys, values and index keys, on average over a sequence of length `context` of
    which it may see `share`: a half where attention is causal."""
    pairs = context * share
    if a.kind == "gqa":
        return 2 * a.num_heads * a.head_dim * pairs
    widths = a.num_heads * (a.qk_head_dim + a.v_head_dim)
    if (indexer := a.indexer) is None:
        return widths * pairs
    kept = pairs if context <= indexer.topk else indexer.topk * (1 - (1 - share) * indexer.topk / context)
    return widths * kept + indexer.num_heads * indexer.head_dim * pairs


# Weights --------------------------------------------------------------------------------------------------------------


def weight_bytes(config: ModelConfig) -> dict[str, int]:
    """Dtype -> bytes of a loaded model, its MTP modules included; float16 takes what bfloat16 takes.

    "fp8" is the published form: projections in FP8 with a float32 scale per 128 x 128 block, all else in bfloat16.
    The router's biases are float32 in each.
    """
    numbers = num_params(config) + num_mtp_params(config)
    biases = 4 * _router_biases(config)
    matrices = [each for layer in _all_layers(config) for each in _projections(config, layer)]
    saved = sum(count * rows * columns for count, rows, columns in matrices)
    scales = sum(count * -(-rows // _FP8_BLOCK) * -(-columns // _FP8_BLOCK) for count, rows, columns in matrices)
    return {
        "float32": 4 * numbers + biases,
        "bfloat16": 2 * numbers + biases,
        "fp8": 2 * numbers - saved + 4 * scales + biases,
    }


def _all_layers(config: ModelConfig) -> range:
    return range(config.num_layers + config.num_mtp_layers)


def _router_biases(config: ModelConfig) -> int:
    moe = config.moe
    if moe is None or moe.score != "sigmoid":
        return 0
    return moe.num_experts * sum(config.is_moe_layer(layer) for layer in _all_layers(config))


def _projections(config: ModelConfig, layer: int) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of the matrices that DeepSeek-V3 publishes in FP8."""
    dim, moe = config.dim, config.moe
    attention = [(1, rows, columns) for rows, columns in _attention_projections(config.attention, dim, layer)]
    if moe is None or not config.is_moe_layer(layer):
        return [*attention, (3, config.ffn_dim, dim)]
    shared = [(3, moe.num_shared_experts * moe.expert_dim, dim)] if moe.num_shared_experts else []
    return [*attention, (3 * moe.num_experts, moe.expert_dim, dim), *shared]


def _attention_projections(a: MLAConfig | GQAConfig, dim: int, layer: int) -> list[tuple[int, int]]:
    if a.kind == "gqa":
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        return [(queries, dim), (keys, dim), (keys, dim), (dim, queries)]
    rank, queries = a.query_rank(layer), a.num_heads * a.qk_head_dim
    query = [(queries, dim)] if rank is None else [(rank, dim), (queries, rank)]
    expanded = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    latent = [(a.latent_row, dim), (expanded, a.kv_lora_rank), (dim, a.num_heads * a.v_head_dim)]
    if (i := a.indexer) is None:
        return [*query, *latent]
    return [*query, *latent, (i.num_heads * i.head_dim, rank or 0), (i.head_dim, dim)]


# Cache ----------------------------------------------------------------------------------------------------------------


def cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Cache bytes per token over all decoder layers, without the MTP layers."""
    return config.num_layers * config.attention.cache_row * bytes_per_element


def attention_twins(config: ModelConfig) -> tuple[ModelConfig, ...]:
    """The same model under the other kinds of attention (MHA, GQA, MQA, MLA), to compare what they cache.

    As DeepSeek-V2 table 1 does. Heads are as wide as value heads, rounded up to even. GQA has 8 groups, or the largest
    number below that divides the heads; MLA takes V2's proportions, a latent of 4 and a rotary key of 1/2 head widths.
    """
    a = config.attention
    heads, width = a.num_heads, a.head_dim if a.kind == "gqa" else a.v_head_dim + a.v_head_dim % 2
    groups = next(n for n in range(min(8, heads), 0, -1) if heads % n == 0)
    own = a.num_kv_heads if a.kind == "gqa" else 0
    shares = [num_kv_heads for num_kv_heads in sorted({heads, groups, 1}, reverse=True) if num_kv_heads != own]
    twins = [replace(config, attention=GQAConfig(num_heads=heads, num_kv_heads=n, head_dim=width)) for n in shares]
    if a.kind == "gqa":
        twins.append(replace(config, attention=_latent_twin(heads, width)))
    return tuple(twins)


def _latent_twin(heads: int, width: int) -> MLAConfig:
    return MLAConfig(
        num_heads=heads,
        kv_lora_rank=4 * width,
        qk_nope_head_dim=width,
        qk_rope_head_dim=max(2, width // 4 * 2),
        v_head_dim=width,
    )


def _cache_bytes(config: ModelConfig) -> tuple[CacheBytes, ...]:
    a = config.attention
    rows = [CacheBytes(a, cache_bytes_per_token(config))]
    if a.kind == "mla":
        rows.append(CacheBytes(a, config.num_layers * _fp8_row_bytes(a), latent_fp8=True))
    twins = attention_twins(config)
    return (*rows, *(CacheBytes(twin.attention, cache_bytes_per_token(twin)) for twin in twins))


def _fp8_row_bytes(a: MLAConfig) -> int:
    """The row of the published FP8 cache: FP8 latent with a float32 scale per 128 numbers, the rotary key in bf16; the
    indexer's key is FP8 with one scale (DeepSeek-V3.2, FlashMLA)."""
    indexer = 0 if a.indexer is None else _fp8_bytes(a.indexer.head_dim)
    return _fp8_bytes(a.kv_lora_rank) + 2 * a.qk_rope_head_dim + indexer


def _fp8_bytes(width: int) -> int:
    """Of `width` numbers and their scales."""
    return width + 4 * -(-width // _FP8_SCALE_WIDTH)


# Memory to train ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainMemory:
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What backward keeps of one micro-batch."""
    temporaries: int
    """Buffers of single operations and gaps between blocks: a third of the activations, as measured on a CPU."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporaries


def train_memory(
    config: ModelConfig,
    batch_tokens: int,
    *,
    is_half: bool = False,
    has_half_moments: bool = False,
    has_average: bool = False,
    recompute: Recompute = "none",
    has_fp8: bool = False,
) -> TrainMemory:
    """Of one process: weights, gradients, two AdamW moments, and what backward keeps of one micro-batch, in float32.

    With `is_half` weights and activations are 16-bit and the optimiser has float32 masters; an average is one more copy
    of the weights, and products in FP8 take two of a byte each. Of layers that are done again the input is kept, and
    one at a time all; of parts of them all counts.
    """
    num = num_params(config) + num_mtp_params(config)
    layers = [_layer_floats(config, layer) for layer in range(config.num_layers + config.num_mtp_layers)]
    kept = sum(layers) if recompute != "layer" else len(layers) * config.dim + max(layers)
    floats = kept + 6 * config.dim * (1 + config.num_mtp_layers)
    head_gradients = config.vocab_size * config.dim * (1 + config.num_mtp_layers)
    width = 2 if is_half else 4
    activations = width * floats * batch_tokens + 4 * head_gradients
    logits = max(_LOGIT_CHUNK, _LOGIT_ROWS * config.vocab_size)
    weights = (width + 4 * has_average + 2 * has_fp8) * num
    optimizer = (4 * is_half + (4 if has_half_moments else 8)) * num
    return TrainMemory(weights, 4 * num, optimizer, activations, activations // 3 + 12 * logits)


def _layer_floats(config: ModelConfig, layer: int) -> int:
    """Numbers per token that the backward pass of one layer keeps."""
    dim, a, moe = config.dim, config.attention, config.moe
    if a.kind == "mla":
        heads = a.num_heads * (2 * a.qk_head_dim + 2 * a.v_head_dim)
        kept = heads + 2 * a.cache_row + 2 * (a.query_rank(layer) or 0)
    else:
        kept = a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    kept += 5 * dim
    if moe is None or not config.is_moe_layer(layer):
        return kept + 4 * config.ffn_dim
    routed = moe.topk * 2 * moe.expert_dim
    return kept + routed + 4 * moe.num_shared_experts * moe.expert_dim + 4 * moe.num_experts + 2 * dim
