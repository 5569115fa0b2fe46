"""A rank reads its share of a checkpoint, whatever its types, as if it had read the whole and kept a part."""

from dataclasses import replace

import pytest
import torch
from checkpoint.tiny import BLOCKS, CONFIG, DENSE, GROUPS, MLA, shard, tiny, tiny_fp8, tiny_packed

from kogia.checkpoint.hf import load_model, save_model
from kogia.model.config import GQAConfig, ModelConfig
from kogia.model.sharding import Share, whole_shapes
from kogia.model.transformer import Transformer

EVEN = replace(CONFIG, attention=replace(MLA, num_heads=4), vocab_size=20)
WIDE = replace(
    BLOCKS,
    ffn_dim=512,
    attention=replace(
        MLA, q_lora_rank=130, kv_lora_rank=40, num_heads=4, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64
    ),
    moe=replace(CONFIG.moe, expert_dim=256),
)
"""Halves of everything end at a block of 128."""


def assert_is_part(found: Transformer, whole: Transformer, share: Share) -> None:
    tensors = whole.state_dict()
    assert whole_shapes(found, whole.config) == {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in found.state_dict().items():
        want = share.of(tensors[name], tensor.shape).contiguous()
        assert tensor.dtype == want.dtype, name
        assert torch.equal(tensor.contiguous().view(-1).view(torch.uint8), want.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [EVEN, DENSE, replace(DENSE, tie_embeddings=True, attention=GQAConfig(num_heads=4, num_kv_heads=1, head_dim=4))],
)
def test_each_rank_loads_its_part_of_what_is_stored(config: ModelConfig, dtype, whole_experts, tmp_path):
    directory = save_model(tiny(config), tmp_path / "model")
    shard(directory)
    for rank in range(2):
        share = Share(rank, 2, whole_experts)
        assert_is_part(load_model(directory, dtype=dtype, share=share), load_model(directory, dtype=dtype), share)


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("config", [WIDE, BLOCKS])
def test_fp8_weights_may_be_cut_anywhere_where_they_are_dequantised(config, whole_experts, tmp_path):
    directory = save_model(tiny_fp8(config), tmp_path / "model")
    for rank in range(2):
        share = Share(rank, 2, whole_experts)
        assert_is_part(load_model(directory, share=share), load_model(directory), share)


@pytest.mark.parametrize("whole_experts", [False, True])
def test_fp8_weights_that_stay_are_cut_with_their_scales(whole_experts, tmp_path):
    directory = save_model(tiny_fp8(WIDE), tmp_path / "model")
    for rank in range(2):
        share = Share(rank, 2, whole_experts)
        found = load_model(directory, quantize="stored", share=share)
        assert_is_part(found, load_model(directory, quantize="stored"), share)


def test_fp8_weights_that_stay_are_not_cut_within_a_block(tmp_path):
    directory = save_model(tiny_fp8(BLOCKS), tmp_path / "model")
    with pytest.raises(ValueError, match=r"end within a block of fp8 weights.*choose another tensor_parallel"):
        load_model(directory, quantize="stored", share=Share(0, 2))


INTEGERS = replace(
    GROUPS, ffn_dim=512,
    attention=replace(GROUPS.attention, num_heads=4, v_head_dim=32), moe=replace(GROUPS.moe, expert_dim=64),
)  # fmt: skip


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("format, options", [("int8", {}), ("int4", {}), ("int4", {"asymmetric": True})])
def test_integer_weights_are_cut_with_their_scales_and_zeros_or_made_dense(format, options, whole_experts, tmp_path):
    directory = save_model(tiny_packed(format, INTEGERS, **options), tmp_path / "model")
    for rank in range(2):
        share = Share(rank, 2, whole_experts)
        for quantize in ("stored", None):
            found = load_model(directory, quantize=quantize, share=share)
            assert_is_part(found, load_model(directory, quantize=quantize), share)


def test_shares_that_no_group_divides_are_refused(tmp_path):
    directory = save_model(tiny_packed("int4", GROUPS), tmp_path / "model")
    with pytest.raises(ValueError, match=r"o_proj: a share of \[64, 16\] numbers has no int4 form; choose another"):
        load_model(directory, quantize="stored", share=Share(0, 2))


def test_a_model_that_cannot_be_divided_is_refused_before_it_is_read(tmp_path):
    directory = save_model(tiny(), tmp_path / "model")
    with pytest.raises(ValueError, match="tensor_parallel = 2: does not divide attention.num_heads = 3"):
        load_model(directory, share=Share(0, 2))
