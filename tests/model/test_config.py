from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.mla import softmax_scale
from kogia.model.transformer import Transformer

YARN = YarnConfig(factor=40, original_max_position=4096)
V3 = ModelConfig(
    vocab_size=129280,
    dim=7168,
    num_layers=61,
    ffn_dim=18432,
    attention=MLAConfig(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        rope_scaling=YARN,
    ),
    moe=MoEConfig(
        num_experts=256, num_shared_experts=1, topk=8, expert_dim=2048, num_groups=8, topk_groups=4, routed_scale=2.5,
        num_dense_layers=3,
    ),
    num_mtp_layers=1,
    max_position=163840,
)  # fmt: skip
V2_LITE = ModelConfig(
    vocab_size=102400,
    dim=2048,
    num_layers=27,
    ffn_dim=10944,
    attention=MLAConfig(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    moe=MoEConfig(
        num_experts=64, num_shared_experts=2, topk=6, expert_dim=1408, score="softmax", normalize_topk=False,
        num_dense_layers=1,
    ),
)  # fmt: skip


def test_deepseek_v3_has_the_published_parameter_counts():
    assert V3.num_params() == pytest.approx(671.03e9, rel=1e-4)
    assert V3.num_active_params() == pytest.approx(37.55e9, rel=2e-4)
    assert V3.num_active_params(input_embedding=False) == pytest.approx(36.63e9, rel=2e-4)
    assert V3.num_mtp_params() == pytest.approx(11.5e9, rel=1e-2)  # "11.5B unique", a decoder layer and eh_proj
    parts = dict(V3.parts())
    assert parts["embedding and head"] == 2 * 129280 * 7168
    assert parts["routed experts"] == 58 * 256 * 3 * 7168 * 2048


def test_deepseek_v2_and_v2_lite_have_the_published_parameter_counts():
    assert V2_LITE.num_params() == pytest.approx(15.71e9, rel=1e-3)
    assert V2_LITE.num_active_params() == pytest.approx(2.66e9, rel=2e-3)
    v2_moe = MoEConfig(num_experts=160, num_shared_experts=2, topk=6, expert_dim=1536, score="softmax")
    v2 = replace(V3, vocab_size=102400, dim=5120, num_layers=60, ffn_dim=12288, moe=v2_moe, num_mtp_layers=0)
    assert v2.num_params() == pytest.approx(235.74e9, rel=1e-3)
    assert v2.num_active_params() == pytest.approx(21.38e9, rel=1e-3)


def test_cache_sizes_are_those_of_the_papers():
    assert V3.cache_bytes_per_token() == 70_272
    assert V2_LITE.cache_bytes_per_token(1) == 15_552
    gqa = ModelConfig(attention=GQAConfig(num_heads=8, num_kv_heads=2, head_dim=16), moe=None, num_layers=3)
    assert gqa.cache_bytes_per_token(1) == 3 * 2 * 2 * 16


def test_training_flops_count_the_active_matrices_and_half_the_attention_square():
    # 6 x 36.63 G matrices + 3 x 61 layers x 128 heads x (192 + 128) x 4096
    assert V3.flops_per_token(4096) == pytest.approx(250.5e9, rel=1e-3)
    attention = V3.flops_per_token(4096) - V3.flops_per_token(0)
    pairs = 4096 * 4097 / 2  # a causal sequence; one multiply-add forward for qk and for v, twice that backward
    assert attention * 4096 == pytest.approx(pairs * 61 * 128 * (192 + 128) * 2 * 3, rel=1e-3)


def test_softmax_scales_are_those_of_the_released_models():
    v2 = replace(YARN, mscale=0.707, mscale_all_dim=0.707)
    assert softmax_scale(V3.attention) == pytest.approx(0.1352338, abs=1e-7)
    assert softmax_scale(replace(V3.attention, rope_scaling=v2)) == pytest.approx(0.1147214, abs=1e-7)
    assert softmax_scale(replace(V3.attention, rope_scaling=None)) == pytest.approx(0.0721688, abs=1e-7)


@st.composite
def configs(draw) -> ModelConfig:
    small, even = st.integers(1, 7), st.sampled_from([2, 4, 6])
    mla = st.builds(
        MLAConfig, num_heads=small, q_lora_rank=st.none() | small, kv_lora_rank=small, qk_nope_head_dim=small,
        qk_rope_head_dim=even, v_head_dim=small,
    )  # fmt: skip
    kv_heads = draw(st.integers(1, 3))
    gqa = st.builds(
        GQAConfig, num_heads=st.sampled_from([kv_heads, 3 * kv_heads]), num_kv_heads=st.just(kv_heads), head_dim=even,
        qkv_bias=st.booleans(), qk_norm=st.booleans(),
    )  # fmt: skip
    num_layers, attention = draw(st.integers(1, 3)), draw(mla | gqa)
    if attention.kind == "mla" and draw(st.booleans()):
        ranks = draw(st.lists(small, min_size=num_layers, max_size=num_layers))
        attention = replace(attention, q_lora_ranks=tuple(ranks))
    if attention.kind == "mla" and attention.query_rank(0) is not None and draw(st.booleans()):
        head_dim = attention.qk_rope_head_dim + draw(small)
        attention = replace(attention, indexer=IndexerConfig(num_heads=draw(small), head_dim=head_dim))
    experts = draw(st.integers(2, 6))
    moe = st.builds(
        MoEConfig, num_experts=st.just(experts), num_shared_experts=st.integers(0, 2), topk=st.integers(1, experts),
        expert_dim=small, num_dense_layers=st.integers(0, 2), score=st.sampled_from(["sigmoid", "softmax"]),
    )  # fmt: skip
    return ModelConfig(
        vocab_size=draw(st.integers(1, 20)),
        dim=draw(st.integers(1, 9)),
        num_layers=num_layers,
        ffn_dim=draw(small),
        attention=attention,
        moe=draw(st.none() | moe),
        num_mtp_layers=draw(st.integers(0, 2)),
        tie_embeddings=draw(st.booleans()),
    )


@given(config=configs())
@settings(max_examples=60)
def test_counted_parameters_are_the_parameters_of_the_model(config):
    model = Transformer(config)
    total = sum(p.numel() for p in model.parameters())
    mtp = sum(p.numel() for layer in model.model.layers[config.num_layers :] for p in layer.parameters())
    assert config.num_params() == total - mtp
    assert config.num_mtp_params() == mtp
    assert sum(count for _, count in config.parts()) == total


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(vocab_size=0), "vocab_size = 0"),
        (dict(num_layers=-1), "num_layers = -1"),
        (dict(num_mtp_layers=-1), "num_mtp_layers = -1"),
        (dict(moe=MoEConfig(num_experts=4, topk=5)), "topk = 5.*num_experts = 4"),
        (dict(moe=MoEConfig(num_experts=4, topk=0)), "topk = 0"),
        (dict(moe=MoEConfig(num_experts=6, topk=1, num_groups=4)), "num_groups = 4"),
        (dict(moe=MoEConfig(num_experts=8, topk=1, num_groups=2, topk_groups=3)), "topk_groups = 3"),
        (dict(moe=MoEConfig(num_experts=8, topk=3, num_groups=4, topk_groups=1)), "topk = 3.*1 group"),
        (dict(attention=MLAConfig(qk_rope_head_dim=3)), "qk_rope_head_dim = 3.*even"),
        (dict(attention=MLAConfig(num_heads=0)), "num_heads = 0"),
        (dict(attention=GQAConfig(num_heads=4, num_kv_heads=3)), "num_heads = 4.*num_kv_heads = 3"),
        (dict(attention=GQAConfig(head_dim=5)), "head_dim = 5.*even"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**change)
