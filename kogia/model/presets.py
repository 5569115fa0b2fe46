"""The published models and our own small ones by name, as values: `preset("deepseek-v3")`. Torch-free.

Sizes are those of the published `config.json` files. Two things differ from them on purpose: `init_std` of DeepSeek's
own models is the 0.006 they were trained with (their files carry the library's default, 0.02), and the models that were
never published (2B, 145B and the baselines) have widths chosen to reproduce the counts their papers print.
"""

import difflib
from dataclasses import replace

from kogia.model.config import GQAConfig, IndexerConfig, Llama3RopeConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig

# DeepSeek-V3, R1, V3.1, V3.2 ------------------------------------------------------------------------------------------

_YARN = YarnConfig(factor=40.0, original_max_position=4096)
_V3 = ModelConfig(
    vocab_size=129280,
    dim=7168,
    num_layers=61,
    ffn_dim=18432,
    attention=MLAConfig(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=_YARN,
    ),
    moe=MoEConfig(
        num_experts=256,
        num_shared_experts=1,
        topk=8,
        expert_dim=2048,
        num_groups=8,
        topk_groups=4,
        routed_scale=2.5,
        num_dense_layers=3,
    ),
    num_mtp_layers=1,
    max_position=163840,
    init_std=0.006,
)

# DeepSeek-V2 ----------------------------------------------------------------------------------------------------------


def _softmax_experts(routed: int, shared: int, topk: int, width: int) -> MoEConfig:
    """The router before V3: gates are the softmax over all experts, kept as they are (DeepSeekMoE equation 3)."""
    return MoEConfig(
        num_experts=routed,
        num_shared_experts=shared,
        topk=topk,
        expert_dim=width,
        score="softmax",
        normalize_topk=False,
    )


_V2 = ModelConfig(
    vocab_size=102400,
    dim=5120,
    num_layers=60,
    ffn_dim=12288,
    attention=replace(_V3.attention, rope_scaling=replace(_YARN, mscale=0.707, mscale_all_dim=0.707)),
    moe=replace(_softmax_experts(160, 2, 6, 1536), num_groups=8, topk_groups=3, routed_scale=16.0),
    max_position=163840,
    init_std=0.006,
    bos_id=100000,
    eos_id=100001,
)
_V2_LITE = replace(
    _V2,
    dim=2048,
    num_layers=27,
    ffn_dim=10944,
    attention=replace(_V2.attention, num_heads=16, q_lora_rank=None),
    moe=_softmax_experts(64, 2, 6, 1408),
)

# DeepSeekMoE and the baselines of its paper ---------------------------------------------------------------------------


def _mha(heads: int) -> GQAConfig:
    return GQAConfig(num_heads=heads, num_kv_heads=heads, head_dim=128)


_MOE_16B = ModelConfig(
    vocab_size=102400,
    dim=2048,
    num_layers=28,
    ffn_dim=10944,
    attention=_mha(16),
    moe=_softmax_experts(64, 2, 6, 1408),
    max_position=4096,
    init_std=0.006,
    bos_id=100000,
    eos_id=100001,
)
# The paper prints neither width. An expert as wide as the 16B model's and a dense layer as wide as the 16 experts that
# a token meets (the rule of V2 and V3) give its 144.6B total, 22.2B activated and 585.6 TFLOPs per 4K tokens.
_MOE_145B = replace(
    _MOE_16B, dim=4096, num_layers=62, ffn_dim=16 * 1408, attention=_mha(32), moe=_softmax_experts(128, 4, 12, 1408)
)
# Nor those of the 2B models. A standard feed-forward of 3424 and a quarter of it per fine-grained expert give the
# printed 1.89B expert weights, 0.24B of them activated; 856 is the multiple of 8 nearest to 8/3 * 1280 / 4.
_STANDARD_FFN = 4 * 856
_DENSE_02B = ModelConfig(
    vocab_size=8192,
    dim=1280,
    num_layers=9,
    ffn_dim=_STANDARD_FFN,
    attention=_mha(10),
    moe=None,
    max_position=2048,
    init_std=0.006,
)


def _moe_2b(experts: int, shared: int, topk: int, width: int) -> ModelConfig:
    return replace(_DENSE_02B, moe=replace(_softmax_experts(experts, shared, topk, width), num_dense_layers=0))


# Llama and Qwen: what R1 was distilled into, and their successors -----------------------------------------------------


def _llama(
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    *,
    vocab: int = 128256,
    theta: float = 500000.0,
    scaling: Llama3RopeConfig | None = None,
    context: int = 8192,
    bos: int = 128000,
    eos: int = 128001,
) -> ModelConfig:
    attention = GQAConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=128, rope_theta=theta, rope_scaling=scaling)
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        ffn_dim=ffn,
        attention=attention,
        moe=None,
        norm_eps=1e-5,
        max_position=context,
        bos_id=bos,
        eos_id=eos,
    )


def _llama2(dim: int, layers: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    return _llama(dim, layers, heads, kv_heads, ffn, vocab=32000, theta=10000.0, context=4096, bos=1, eos=2)


def _llama31(dim: int, layers: int, heads: int, ffn: int) -> ModelConfig:
    return _llama(dim, layers, heads, 8, ffn, scaling=Llama3RopeConfig(), context=131072)


def _qwen25(
    dim: int, layers: int, heads: int, kv_heads: int, ffn: int, *, vocab: int = 152064, eps: float = 1e-5
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        ffn_dim=ffn,
        attention=GQAConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=128, rope_theta=1000000.0, qkv_bias=True),
        moe=None,
        norm_eps=eps,
        max_position=131072,
        bos_id=151643,
        eos_id=151643,
    )


def _with_theta(config: ModelConfig, theta: float, *, context: int) -> ModelConfig:
    return replace(config, attention=replace(config.attention, rope_theta=theta), max_position=context)


def _qwen3(
    dim: int, layers: int, heads: int, kv_heads: int, ffn: int, *, tied: bool = False, moe: MoEConfig | None = None
) -> ModelConfig:
    attention = GQAConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=128, rope_theta=1000000.0, qk_norm=True)
    return ModelConfig(
        vocab_size=151936,
        dim=dim,
        num_layers=layers,
        ffn_dim=ffn,
        attention=attention,
        moe=moe,
        max_position=40960,
        tie_embeddings=tied,
        bos_id=151643,
        eos_id=151645,
    )


def _qwen3_experts(width: int) -> MoEConfig:
    return MoEConfig(
        num_experts=128, num_shared_experts=0, topk=8, expert_dim=width, score="softmax", num_dense_layers=0
    )


_QWEN25_15B = replace(_qwen25(1536, 28, 12, 2, 8960, vocab=151936, eps=1e-6), tie_embeddings=True)
_QWEN25_7B = _qwen25(3584, 28, 28, 4, 18944, eps=1e-6)
_QWEN25_14B = _qwen25(5120, 48, 40, 8, 13824)
_QWEN25_32B = _qwen25(5120, 64, 40, 8, 27648)
_LLAMA31_8B = _llama31(4096, 32, 32, 14336)
_LLAMA33_70B = _llama31(8192, 80, 64, 28672)

# This project's own, trained from scratch -----------------------------------------------------------------------------

_KOGIA_DEMO = ModelConfig(
    vocab_size=526,
    dim=96,
    num_layers=3,
    ffn_dim=384,
    attention=MLAConfig(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32),
    moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=64),
    num_mtp_layers=1,
    max_position=512,
    init_std=0.04,
)
_KOGIA_10M = ModelConfig(
    vocab_size=4096,
    dim=256,
    num_layers=6,
    ffn_dim=704,
    attention=MLAConfig(
        num_heads=8, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=MoEConfig(num_experts=8, topk=2, expert_dim=192),
    max_position=1024,
    init_std=0.02,
)

PRESETS: dict[str, ModelConfig] = {
    "deepseek-v3": _V3,
    "deepseek-r1": _V3,
    "deepseek-v3.1": _V3,
    "deepseek-v3.2": replace(_V3, attention=replace(_V3.attention, indexer=IndexerConfig())),
    "deepseek-v2": _V2,
    "deepseek-v2-lite": _V2_LITE,
    "deepseek-moe-145b": _MOE_145B,
    "deepseek-moe-16b": _MOE_16B,
    "deepseek-moe-2b": _moe_2b(63, shared=1, topk=7, width=_STANDARD_FFN // 4),
    "gshard-2b": _moe_2b(16, shared=0, topk=2, width=_STANDARD_FFN),
    "switch-2b": _moe_2b(16, shared=0, topk=1, width=_STANDARD_FFN),
    "dense-0.2b": _DENSE_02B,
    "kogia-demo": _KOGIA_DEMO,
    "kogia-10m": _KOGIA_10M,
    "r1-distill-qwen-1.5b": replace(_with_theta(_QWEN25_15B, 10000.0, context=131072), tie_embeddings=False),
    "r1-distill-qwen-7b": _with_theta(_QWEN25_7B, 10000.0, context=131072),
    "r1-distill-qwen-14b": _QWEN25_14B,
    "r1-distill-qwen-32b": _QWEN25_32B,
    "r1-distill-llama-8b": _LLAMA31_8B,
    "r1-distill-llama-70b": _LLAMA33_70B,
    "llama-2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336),
    "llama-3.1-8b": _LLAMA31_8B,
    "llama-3.3-70b": _LLAMA33_70B,
    "qwen2.5-1.5b": _QWEN25_15B,
    "qwen2.5-7b": _QWEN25_7B,
    "qwen2.5-14b": _QWEN25_14B,
    "qwen2.5-32b": _QWEN25_32B,
    "qwen2.5-math-1.5b": _with_theta(_QWEN25_15B, 10000.0, context=4096),
    "qwen2.5-math-7b": _with_theta(_QWEN25_7B, 10000.0, context=4096),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 4, 6144, moe=_qwen3_experts(768)),
    "qwen3-235b-a22b": _qwen3(4096, 94, 64, 4, 12288, moe=_qwen3_experts(1536)),
}
"""Name -> model. Equal values under two names are one architecture trained twice (V3, R1 and V3.1)."""


def preset(name: str) -> ModelConfig:
    """The model of that name, in any case. Raises ValueError with the closest name, or all of them."""
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    close = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(PRESETS)}"
    raise ValueError(f"no preset is named {name!r}; {hint}")
