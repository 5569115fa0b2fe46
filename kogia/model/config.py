"""What a model is, as frozen values. Torch-free, so `kogia plan` and `--help` never pay for importing it.

One `ModelConfig` describes every model of the family: DeepSeek-V2 and V3 (MLA + DeepSeekMoE + MTP), V3.2 (with sparse
attention), DeepSeekMoE and its baselines (MHA + experts), and the Llama and Qwen models it is distilled into. Sizes
follow the papers: DeepSeekMoE section 3, DeepSeek-V2 section 2.1 (MLA), DeepSeek-V3 sections 2.1 and 2.2.
"""

from dataclasses import dataclass
from typing import Literal

Recompute = Literal["none", "attention", "feed_forward", "layer"]
"""What of a layer a backward pass may do again: the one part, the other, or all of it."""
Fp8Gradients = Literal["none", "dense", "all"]
"""Which gradients of weights are products in FP8: none, those of dense layers, or those of experts as well."""
MAX_LAYERS = 2_000
"""Decoder and prediction layers of one model; published ones have up to about 130."""
_SMALLEST = 1e-30  # positive number that a setting may be
_LARGEST = 2**31 - 1  # of a single size: products of two still fit into 64 bits


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension of the rotary part (DeepSeek-V2 section 3.1.4).

    `mscale_all_dim` enters the softmax scale as (0.1 * mscale_all_dim * ln(factor) + 1)^2 at every position, because
    only the rotary part of a head carries the rotation; cos and sin stay unscaled when both mscales are equal. That is
    MLA; in grouped-query attention every dimension turns, and cos and sin alone carry the ratio of the two.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = 40.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Llama 3.1's extension: wavelengths over `original_max_position / low_freq_factor` are stretched by `factor`,
    those under `original_max_position / high_freq_factor` kept, the ones between blended."""

    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


RopeScaling = YarnConfig | Llama3RopeConfig | None


@dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2): it picks the tokens a query may attend to."""

    num_heads: int = 64
    head_dim: int = 128
    """Width of an index head; its first `qk_rope_head_dim` numbers carry rotary positions, half-split."""
    topk: int = 2048
    """Tokens that each query attends to."""


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention. The cache holds `kv_lora_rank + qk_rope_head_dim` numbers per token and layer, and
    the indexer's key where there is one."""

    kind: Literal["mla"] = "mla"
    num_heads: int = 4
    q_lora_rank: int | None = None
    """Rank of the query compression; None projects queries directly, as DeepSeek-V2-Lite does."""
    q_lora_ranks: tuple[int, ...] = ()
    """Depth-aware query compression: one rank per decoder layer instead of `q_lora_rank` (MTP layers take the last).
    Not in any DeepSeek release: all their layers share one rank."""
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    indexer: IndexerConfig | None = None
    norm_eps: float = 1e-6
    """Of the norms of the latents; every release has 1e-6 here, whatever its `rms_norm_eps` says."""

    def query_rank(self, layer: int) -> int | None:
        """Rank of the query compression of a layer; None where queries are projected directly."""
        return self.q_lora_ranks[min(layer, len(self.q_lora_ranks) - 1)] if self.q_lora_ranks else self.q_lora_rank

    @property
    def latent_row(self) -> int:
        """Numbers that attention itself reads per cached token: the normed latent and the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cache_row(self) -> int:
        """Numbers cached per token and layer: the latent row, then the indexer's key."""
        return self.latent_row + (self.indexer.head_dim if self.indexer is not None else 0)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention (Llama, Qwen, DeepSeekMoE); `num_kv_heads == num_heads` is MHA, 1 is MQA."""

    kind: Literal["gqa"] = "gqa"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    """Qwen2 carries a bias on the query, key and value projections; Llama does not."""
    qk_norm: bool = False
    """Qwen3 normalises each query and key head before the rotation."""
    rope_scaling: YarnConfig | Llama3RopeConfig | None = None

    @property
    def cache_row(self) -> int:
        """Numbers cached per token and layer: one key and one value per key/value head."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE feed-forward (DeepSeekMoE section 3; DeepSeek-V3 section 2.1.2)."""

    num_experts: int = 16
    """Routed experts."""
    num_shared_experts: int = 1
    topk: int = 4
    """Routed experts per token."""
    expert_dim: int = 64
    """Hidden width of one expert; the shared experts together are `num_shared_experts * expert_dim` wide."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    num_groups: int = 1
    """Experts are split into this many groups, of which a token may use `topk_groups` (node-limited routing)."""
    topk_groups: int = 1
    normalize_topk: bool = True
    routed_scale: float = 1.0
    num_dense_layers: int = 1
    """The first layers use a dense feed-forward (HF `first_k_dense_replace`)."""

    @property
    def most_active(self) -> int:
        """Routed experts that one token could use: all of its groups."""
        return self.num_experts // self.num_groups * self.topk_groups


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the DeepSeek family. `moe=None` is a dense model."""

    vocab_size: int = 512
    dim: int = 128
    num_layers: int = 4
    ffn_dim: int = 256
    """Hidden width of the dense SwiGLU layers."""
    attention: MLAConfig | GQAConfig = MLAConfig()
    moe: MoEConfig | None = MoEConfig()
    num_mtp_layers: int = 0
    """Depth of multi-token prediction (DeepSeek-V3 section 2.2)."""
    norm_eps: float = 1e-6
    max_position: int = 4096
    tie_embeddings: bool = False
    init_std: float = 0.02
    bos_id: int = 0
    eos_id: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "ffn_dim", "max_position"):
            _check_size(f"model.{name}", getattr(self, name))
        if self.num_mtp_layers < 0:
            raise ValueError(f"model.num_mtp_layers = {self.num_mtp_layers}: must not be negative")
        if self.num_cache_layers > MAX_LAYERS:
            raise ValueError(f"model.num_layers = {self.num_layers:,} is too deep: at most {MAX_LAYERS:,} are built")
        _check_number("model.norm_eps", self.norm_eps, 0.0)
        _check_number("model.init_std", self.init_std, 0.0)
        _check_attention(self.attention)
        if self.attention.kind == "mla" and len(self.attention.q_lora_ranks) not in (0, self.num_layers):
            raise ValueError(
                f"model.attention.q_lora_ranks has {len(self.attention.q_lora_ranks)} ranks: must have one for each of "
                f"the {self.num_layers} layers"
            )
        if self.moe is not None:
            _check_experts(self.moe)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` is a mixture; MTP layers count on from `num_layers` and are mixtures."""
        return self.moe is not None and layer >= self.moe.num_dense_layers

    @property
    def num_cache_layers(self) -> int:
        """Layers that hold cache rows: the decoder layers and the MTP layers."""
        return self.num_layers + self.num_mtp_layers


def _check_size(where: str, value: int) -> None:
    if not 1 <= value <= _LARGEST:
        raise ValueError(f"{where} = {value}: must be at least 1 and at most {_LARGEST:,}")


def _check_number(where: str, value: float, least: float, *, beyond: bool = False) -> None:
    """At least `least`, or with `beyond` larger than it; neither so large nor so small that its quotients overflow."""
    reached = value > least and value >= _SMALLEST if beyond else value >= least
    if not reached or not value <= 1 / _SMALLEST:  # NaN is neither
        raise ValueError(f"{where} = {value}: must be a number {'over' if beyond else 'of at least'} {least:g}")


def _check_experts(moe: MoEConfig) -> None:
    for name in ("num_experts", "expert_dim", "num_groups"):
        _check_size(f"model.moe.{name}", getattr(moe, name))
    for name in ("num_shared_experts", "num_dense_layers"):
        if not 0 <= getattr(moe, name) <= _LARGEST:
            raise ValueError(f"model.moe.{name} = {getattr(moe, name)}: must lie in 0..{_LARGEST:,}")
    _check_number("model.moe.routed_scale", moe.routed_scale, 0.0, beyond=True)
    if not 1 <= moe.topk <= moe.num_experts:
        raise ValueError(f"model.moe.topk = {moe.topk}: must lie in 1..num_experts = {moe.num_experts}")
    if moe.num_experts % moe.num_groups or not 1 <= moe.topk_groups <= moe.num_groups:
        raise ValueError(
            f"model.moe: num_experts = {moe.num_experts}, num_groups = {moe.num_groups}, topk_groups = "
            f"{moe.topk_groups}: groups must divide the experts and 1 <= topk_groups <= num_groups"
        )
    if moe.topk > moe.most_active:
        raise ValueError(f"model.moe.topk = {moe.topk}: more than the experts of {moe.topk_groups} groups")


def _check_rope(theta: float, scaling: RopeScaling) -> None:
    _check_number("model.attention.rope_theta", theta, 1.0, beyond=True)
    if scaling is None:
        return
    where = "model.attention.rope_scaling"
    _check_size(f"{where}.original_max_position", scaling.original_max_position)
    if scaling.kind == "yarn":
        for name in ("factor", "beta_fast", "beta_slow"):
            _check_number(f"{where}.{name}", getattr(scaling, name), 0.0, beyond=True)
        for name in ("mscale", "mscale_all_dim"):
            _check_number(f"{where}.{name}", getattr(scaling, name), -1 / _SMALLEST)
        return
    for name in ("factor", "low_freq_factor"):
        _check_number(f"{where}.{name}", getattr(scaling, name), 0.0, beyond=True)
    _check_number(f"{where}.high_freq_factor", scaling.high_freq_factor, scaling.low_freq_factor, beyond=True)


def _check_attention(attention: MLAConfig | GQAConfig) -> None:
    sizes = {name: value for name, value in vars(attention).items() if name.endswith(("_heads", "_dim", "_rank"))}
    for name, value in sizes.items():
        if value is not None:
            _check_size(f"model.attention.{name}", value)
    rotary = "qk_rope_head_dim" if attention.kind == "mla" else "head_dim"
    if sizes[rotary] % 2:
        raise ValueError(f"model.attention.{rotary} = {sizes[rotary]}: must be even, rotary embedding turns pairs")
    _check_rope(attention.rope_theta, attention.rope_scaling)
    if attention.kind == "mla":
        _check_latents(attention)
    elif attention.num_heads % attention.num_kv_heads:
        raise ValueError(
            f"model.attention.num_heads = {attention.num_heads}: must be a multiple of num_kv_heads = "
            f"{attention.num_kv_heads}"
        )


def _check_latents(attention: MLAConfig) -> None:
    _check_number("model.attention.norm_eps", attention.norm_eps, 0.0)
    if not all(1 <= rank <= _LARGEST for rank in attention.q_lora_ranks):
        raise ValueError(f"model.attention.q_lora_ranks = {attention.q_lora_ranks}: each must be at least 1")
    if attention.indexer is not None:
        _check_indexer(attention, attention.indexer)


def _check_indexer(attention: MLAConfig, indexer: IndexerConfig) -> None:
    for name in ("num_heads", "head_dim", "topk"):
        _check_size(f"model.attention.indexer.{name}", getattr(indexer, name))
    if attention.query_rank(0) is None:
        raise ValueError("model.attention.indexer needs q_lora_rank: its queries come from the compressed query")
    if indexer.head_dim < attention.qk_rope_head_dim:
        raise ValueError(
            f"model.attention.indexer.head_dim = {indexer.head_dim}: must hold qk_rope_head_dim = "
            f"{attention.qk_rope_head_dim}"
        )
