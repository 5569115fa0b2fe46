"""Shares of a model: what each rank holds, that together they are the whole, and sizes that cannot be divided."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.moe import MoE
from kogia.model.packed import pack
from kogia.model.sharding import Share, build_share, check_cuts, empty_share, load_share
from kogia.model.transformer import Layer, Transformer, build_model, empty_model

MLA = ModelConfig(
    vocab_size=64,
    dim=48,
    num_layers=3,
    ffn_dim=32,
    attention=MLAConfig(
        num_heads=4,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        indexer=IndexerConfig(num_heads=3, head_dim=8, topk=4),
    ),
    moe=MoEConfig(num_experts=8, num_shared_experts=2, topk=3, expert_dim=16),
    num_mtp_layers=1,
    max_position=64,
    init_std=0.2,
)
DENSE = replace(
    MLA,
    attention=GQAConfig(num_heads=8, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True),
    moe=None,
    num_mtp_layers=0,
)
LITE = replace(MLA, attention=replace(MLA.attention, q_lora_rank=None, indexer=None), num_mtp_layers=0)
SHARES = [(MLA, 2, False), (MLA, 4, False), (MLA, 2, True), (LITE, 2, True), (DENSE, 2, False), (DENSE, 8, False)]


def shares(size: int, whole_experts: bool) -> list[Share]:
    return [Share(rank, size, whole_experts) for rank in range(size)]


@pytest.mark.parametrize("config, size, whole_experts", SHARES)
def test_a_share_holds_its_part_of_every_parameter_and_the_parts_are_the_whole(config, size, whole_experts):
    whole = dict(build_model(config, seed=3).named_parameters())
    each = [dict(build_share(config, share, seed=3).named_parameters()) for share in shares(size, whole_experts)]
    cut = 0
    for name, parameter in whole.items():
        parts = [own[name] for own in each]
        axes = [axis for axis, (a, b) in enumerate(zip(parameter.shape, parts[0].shape)) if a != b]
        if not axes:
            assert all(torch.equal(part, parameter) for part in parts)
            continue
        cut += 1
        (axis,) = axes
        copies = size * parts[0].shape[axis] // parameter.shape[axis]  # of a key head that several ranks need
        assert torch.equal(torch.cat(parts[::copies], axis), parameter)
        assert all(torch.equal(parts[i], parts[i - i % copies]) for i in range(size))
    assert cut >= 6


@pytest.mark.parametrize("config, size, whole_experts", SHARES)
def test_what_the_shares_of_a_layer_put_out_adds_up_to_the_whole_layers(config, size, whole_experts):
    model = build_model(config, dtype=torch.float64, seed=3)
    parts = []
    for share in shares(size, whole_experts):
        parts.append(build_share(config, share, dtype=torch.float64))
        load_share(parts[-1], model.state_dict(), share)
    batch = pack([[1, 2, 3, 4, 5, 6, 7], [8, 9]])
    x = torch.randn(9, config.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for index, layer in enumerate(layers(model)):
        for part in ("self_attn", "mlp"):
            want = getattr(layer, part)(x, model.step(batch))
            outputs = [getattr(layers(each)[index], part)(x, each.step(batch)) for each in parts]
            torch.testing.assert_close(sum(outputs), want)
    if len(parts[0].lm_head.weight) < config.vocab_size:
        torch.testing.assert_close(torch.cat([each.lm_head(x) for each in parts], -1), model.lm_head(x))


def layers(model: Transformer) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer)]


def test_experts_that_are_split_by_number_pass_over_the_choices_of_others():
    config = replace(LITE, moe=MoEConfig(num_experts=8, num_shared_experts=0, topk=2, expert_dim=16))
    share = Share(1, 2, whole_experts=True)
    experts = next(m for m in build_share(config, share, seed=3).modules() if isinstance(m, MoE)).experts
    assert experts.first == 4 and experts.gate_up_proj.shape[0] == 4
    x = torch.randn(3, config.dim, generator=torch.Generator().manual_seed(1))
    elsewhere = torch.tensor([[0, 3], [2, -1], [1, 0]])
    assert not experts(x, elsewhere, torch.ones(3, 2)).any()
    assert experts(x, elsewhere + 4, torch.ones(3, 2)).any(-1).all()


@pytest.mark.parametrize(
    "config, size, whole_experts, message",
    [
        (MLA, 3, False, "tensor_parallel = 3: does not divide attention.num_heads = 4 and ffn_dim = 32 and moe."),
        (MLA, 3, False, "it can be 2, 4"),
        (MLA, 16, True, "moe.num_experts = 8"),
        (DENSE, 16, False, "attention.num_heads = 8 of the model; it can be 2, 4, 8"),
        (replace(DENSE, attention=GQAConfig(num_heads=6, num_kv_heads=3)), 2, False, "num_kv_heads = 3"),
        (replace(DENSE, ffn_dim=31), 2, False, "ffn_dim = 31 of the model; this model cannot be divided"),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_those_that_would(config, size, whole_experts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        empty_share(config, Share(0, size, whole_experts))


@pytest.mark.parametrize("rank, size", [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_must_be_one_of_its_group(rank, size):
    with pytest.raises(ValueError, match="ranks count from 0"):
        Share(rank, size)


def test_a_head_that_is_tied_or_does_not_divide_stays_whole():
    for config in (replace(DENSE, tie_embeddings=True), replace(DENSE, vocab_size=63)):
        model = build_share(config, Share(1, 2))
        assert model.lm_head.weight.shape == (config.vocab_size, config.dim)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_embeddings


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
def test_parts_are_where_equal_shares_in_the_order_of_ranks_would_be(num_parts, copies, length, axis):
    shape = [2, 3, 4]
    own = [*shape]
    shape[axis], own[axis] = num_parts * length, length
    size = num_parts * copies
    whole = torch.arange(shape[0] * shape[1] * shape[2]).view(shape)
    for rank in range(size):
        found = Share(rank, size).of(whole, tuple(own))
        assert torch.equal(found, whole.chunk(num_parts, axis)[rank // copies])


@pytest.mark.parametrize(
    "format, width, size, is_cut_well",
    [
        ("fp8", 512, 2, True),
        ("fp8", 512, 4, True),
        ("fp8", 512, 8, False),
        ("fp8", 384, 2, False),
        ("fp8", 96, 2, True),  # one block, whose scale every rank has
        ("int8", 96, 4, True),
        ("int4", 512, 2, True),
        ("int4", 256, 4, False),
        ("int4", 384, 2, False),  # 192 would be groups of 64
    ],
)
def test_packed_weights_are_cut_between_blocks_that_share_a_scale(format, width, size, is_cut_well):
    config = replace(DENSE, ffn_dim=width, attention=GQAConfig(num_heads=8, num_kv_heads=8, head_dim=16))
    share = Share(size - 1, size)
    model, whole = empty_share(config, share), empty_model(config)
    for each in (model, whole):
        for layer in layers(each):
            layer.mlp.down_proj.make_packed(format)
    if is_cut_well:
        return check_cuts(model, whole)
    with pytest.raises(ValueError, match=f"down_proj.*within a block of {format}.*choose another tensor_parallel"):
        check_cuts(model, whole)
