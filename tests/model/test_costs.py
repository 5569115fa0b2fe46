from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train.tiny import make_batch, random_sequences

from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.costs import (
    Component,
    attention_twins,
    cache_bytes_per_token,
    flops_per_token,
    num_active_params,
    num_mtp_params,
    num_params,
    param_parts,
    train_memory,
)
from kogia.model.facts import attention_name
from kogia.model.presets import preset
from kogia.model.transformer import Transformer, build_model
from kogia.ops.dispatch import use_backend
from kogia.train.loss import LossWeights, supervised_loss

V3 = ModelConfig(
    vocab_size=129280,
    dim=7168,
    num_layers=61,
    ffn_dim=18432,
    attention=MLAConfig(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
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
    assert num_params(V3) == pytest.approx(671.03e9, rel=1e-4)
    assert num_active_params(V3) == pytest.approx(37.55e9, rel=2e-4)
    assert num_active_params(V3, input_embedding=False) == pytest.approx(36.63e9, rel=2e-4)
    assert num_mtp_params(V3) == pytest.approx(11.5e9, rel=1e-2)  # "11.5B unique", a decoder layer and eh_proj
    parts = {part.component: part.params for part in param_parts(V3)}
    assert parts[Component.VOCABULARY] == 2 * 129280 * 7168
    assert parts[Component.ROUTED_EXPERTS] == 58 * 256 * 3 * 7168 * 2048


def test_deepseek_v2_and_v2_lite_have_the_published_parameter_counts():
    assert num_params(V2_LITE) == pytest.approx(15.71e9, rel=1e-3)
    assert num_active_params(V2_LITE) == pytest.approx(2.66e9, rel=2e-3)
    v2_moe = MoEConfig(num_experts=160, num_shared_experts=2, topk=6, expert_dim=1536, score="softmax")
    v2 = replace(V3, vocab_size=102400, dim=5120, num_layers=60, ffn_dim=12288, moe=v2_moe, num_mtp_layers=0)
    assert num_params(v2) == pytest.approx(235.74e9, rel=1e-3)
    assert num_active_params(v2) == pytest.approx(21.38e9, rel=1e-3)


def test_cache_sizes_are_those_of_the_papers():
    assert cache_bytes_per_token(V3) == 70_272
    assert cache_bytes_per_token(V2_LITE, 1) == 15_552
    gqa = ModelConfig(attention=GQAConfig(num_heads=8, num_kv_heads=2, head_dim=16), moe=None, num_layers=3)
    assert cache_bytes_per_token(gqa, 1) == 3 * 2 * 2 * 16


def test_training_flops_count_the_active_matrices_and_half_the_attention_square():
    # 6 x 36.63 G matrices + 3 x 61 layers x 128 heads x (192 + 128) x 4096
    assert flops_per_token(V3, 4096) == pytest.approx(250.5e9, rel=1e-3)
    attention = flops_per_token(V3, 4096) - flops_per_token(V3, 0)
    pairs = 4096 * 4097 / 2  # a causal sequence; one multiply-add forward for qk and for v, twice that backward
    assert attention * 4096 == pytest.approx(pairs * 61 * 128 * (192 + 128) * 2 * 3, rel=1e-3)


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
    assert num_params(config) == total - mtp
    assert num_mtp_params(config) == mtp
    by_component = {part.component: part.params for part in param_parts(config)}
    found = Counter(component_of(name, config) for name, p in model.named_parameters() for _ in range(p.numel()))
    assert by_component == found


def component_of(name: str, config: ModelConfig) -> Component:
    words = name.split(".")
    if "embed_tokens" in words or "lm_head" in words:
        return Component.VOCABULARY
    if words[1] == "layers" and int(words[2]) >= config.num_layers:
        return Component.MTP
    if "norm" in words[-2]:
        return Component.NORMS
    if "self_attn" in words:
        return Component.ATTENTION
    return Component.ROUTED_EXPERTS if "experts" in words else Component.FEED_FORWARD


def test_twins_cache_what_the_v2_report_tabulates():
    """DeepSeek-V2 table 1 and section 2.1.4: 2 heads d, 2 groups d, 2 d, and 9/2 d numbers per token and layer."""
    v2 = preset("deepseek-v2")
    twins = {attention_name(twin.attention): cache_bytes_per_token(twin, 1) for twin in attention_twins(v2)}
    assert twins == {"MHA": 2 * 128 * 128 * 60, "GQA-8": 2 * 8 * 128 * 60, "MQA": 2 * 128 * 60}
    assert cache_bytes_per_token(v2, 1) == 34_560 == 4.5 * 128 * 60
    llama = attention_twins(preset("llama-3-8b"))
    assert twin_names(preset("llama-3-8b")) == ["MHA", "MQA", "MLA"]  # it is GQA-8 itself
    assert cache_bytes_per_token(llama[-1], 1) == 4.5 * 128 * 32
    assert "GQA-6" in twin_names(preset("qwen2.5-1.5b"))  # 12 heads do not split into 8 groups
    assert twin_names(ModelConfig(attention=MLAConfig(num_heads=1))) == ["MHA"]  # all kinds are one with one head
    assert twin_names(ModelConfig(attention=GQAConfig(num_heads=4, num_kv_heads=4))) == ["MQA", "MLA"]


def twin_names(config: ModelConfig) -> list[str]:
    return [attention_name(twin.attention) for twin in attention_twins(config)]


# Memory to train ----------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 64, "dim": 64, "num_layers": 3, "ffn_dim": 128}
MODELS = {
    "mla, experts, mtp": ModelConfig(**SIZES, moe=MoEConfig(num_experts=16, topk=4, expert_dim=32), num_mtp_layers=1),
    "mla with compressed queries": ModelConfig(**SIZES, attention=MLAConfig(q_lora_rank=32), moe=None),
    "mla with a rank by layer": ModelConfig(**SIZES, attention=MLAConfig(q_lora_ranks=(96, 64, 16)), moe=None),
    "gqa, dense": ModelConfig(**SIZES, attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16), moe=None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_activation_estimate_is_near_what_autograd_really_keeps(name):
    model = build_model(MODELS[name])
    batch = make_batch(random_sequences([64] * 16, vocab=64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def kept_bytes() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = supervised_loss(model, batch, LossWeights(mtp=0.3, balance=1e-4)).total
        assert loss.requires_grad
        return sum(kept.values())

    estimate = train_memory(MODELS[name], 1024).activations
    with use_backend("reference"):
        assert kept_bytes() == pytest.approx(estimate, rel=0.15)
    assert kept_bytes() < 1.15 * estimate, "a CPU's kernels keep less"


def test_queries_compressed_layer_by_layer_are_kept_as_others_are():
    same = replace(MODELS["mla with compressed queries"], attention=MLAConfig(q_lora_ranks=(32, 32, 32)))
    assert train_memory(same, 1024) == train_memory(MODELS["mla with compressed queries"], 1024)


def test_weights_gradients_and_moments_are_sixteen_bytes_per_parameter():
    config = MODELS["mla, experts, mtp"]
    memory = train_memory(config, 1024)
    parameters = sum(p.numel() for p in build_model(config).parameters())
    assert memory.weights + memory.gradients + memory.optimizer == 16 * parameters
    assert memory.total == 16 * parameters + memory.activations + memory.temporaries
    half = train_memory(config, 1024, is_half=True, has_half_moments=True, has_average=True)
    assert half.weights + half.gradients + half.optimizer == (14 + 4) * parameters
    assert half.activations < 0.6 * memory.activations


def test_of_layers_that_are_done_again_one_at_a_time_counts():
    config = MODELS["mla, experts, mtp"]
    deeper = replace(config, num_layers=config.num_layers + 10)
    grown = [train_memory(each, 1024, recompute="layer").activations for each in (config, deeper)]
    assert grown[1] - grown[0] == 10 * 4 * config.dim * 1024, "ten more layers are ten more inputs"
    assert grown[0] < train_memory(config, 1024).activations
