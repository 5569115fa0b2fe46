"""Block-scaled FP8 against a loop over blocks, at odd sizes, and the layers that hold such weights."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kogia.model.linear import Linear
from kogia.model.moe import Experts
from kogia.ops.fp8 import dequantize_blocks, dequantize_groups, quantize_blocks, quantize_groups, scale_shape


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_scale_multiplies_its_block_and_edge_blocks_are_cut():
    weight = drawn(130, 257).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 7.0).view(2, 3)
    got = dequantize_blocks(weight, scale, torch.float32)
    for row, column, factor in [(0, 0, 1), (127, 127, 1), (127, 128, 2), (0, 256, 3), (128, 127, 4), (129, 256, 6)]:
        assert got[row, column] == float(weight[row, column]) * factor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 256), (3, 130, 257), (2, 2, 256, 128)])
def test_codes_are_of_numbers_divided_by_the_scale_of_their_block(shape, dtype):
    weight = (drawn(*shape) * 300).to(dtype)
    quantized, scale = quantize_blocks(weight)
    stacks = (each.reshape(-1, *each.shape[-2:]) for each in (weight, quantized, scale))
    for numbers, codes, scales in zip(*stacks, strict=True):
        for i, j in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert scales[i, j] == numbers[block].float().abs().max() / 448
            want = (numbers[block].float() / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(codes[block].view(torch.uint8), want.view(torch.uint8))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(0, 99))
def test_quantisation_maps_the_largest_of_each_block_to_448_and_errs_by_one_part_in_16(rows, columns, powers, seed):
    weight = drawn(rows, columns, seed=seed) * torch.exp(drawn(rows, 1, seed=seed + 1))
    quantized, scale = quantize_blocks(weight, power_of_two=powers)
    assert tuple(scale.shape) == scale_shape(weight.shape) == (-(-rows // 128), -(-columns // 128))
    back = dequantize_blocks(quantized, scale, torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            amax = weight[block].abs().max()
            if powers:
                assert scale[i, j].log2() == scale[i, j].log2().round()
                assert amax / 448 <= scale[i, j] <= amax / 224
            else:
                torch.testing.assert_close(scale[i, j], amax / 448)
            # 3 mantissa bits: relative error at most 1/16, and half a subnormal step near zero
            bound = weight[block].abs() / 16 + scale[i, j] * 2**-10
            assert ((back[block] - weight[block]).abs() <= bound * 1.001).all()


def test_zeros_stay_zeros_and_a_stack_is_quantised_matrix_by_matrix():
    stack = torch.stack([torch.zeros(5, 140), drawn(5, 140)])
    quantized, scale = quantize_blocks(stack)
    assert scale[0].tolist() == [[1.0, 1.0]]
    assert not dequantize_blocks(quantized, scale, torch.float32)[0].any()
    alone, alone_scale = quantize_blocks(stack[1])
    assert scale[1].equal(alone_scale)
    assert quantized[1].float().equal(alone.float())


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize(
    "largest", [1.4e-45, 3e-43, 6.5e-43, 1e-41, 5e-38, 2.9e38, 3e38, torch.finfo(torch.float32).max]
)
def test_the_smallest_and_largest_numbers_have_a_finite_form(largest, powers):
    weight = drawn(20, 140)
    weight = weight / weight.abs().max() * largest
    weight[3, 5], weight[4, 6] = largest, -largest
    quantized, scale = quantize_blocks(weight, power_of_two=powers)
    assert bool((scale > 0).all()) and bool(scale.isfinite().all())
    if powers:
        assert bool((torch.frexp(scale).mantissa == 0.5).all()) and scale.min() >= 2.0**-127  # as ue8m0 can hold
    back = dequantize_blocks(quantized, scale, torch.float32)
    bound = weight.double().abs() / 15 + scale.max().double() * 2**-10 + 2.0**-149  # 255 / 16 rounds down at the top
    assert bool(((back.double() - weight.double()).abs() <= bound).all())


@pytest.mark.parametrize("largest", [1.4e-45, 3e-43, 1e-40, torch.finfo(torch.float32).max])
def test_groups_of_the_smallest_and_largest_numbers_come_back(largest):
    rows = torch.full((3, 200), largest)
    rows[:, ::3] = 0
    rows[1] = 0
    back = dequantize_groups(*quantize_groups(rows), torch.float32)
    assert bool(((back.double() - rows.double()).abs() <= rows.double() / 15 + 2.0**-149).all())


def test_scales_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="does not fit"):
        dequantize_blocks(drawn(130, 257).to(torch.float8_e4m3fn), torch.ones(3, 2), torch.float32)


def test_an_fp8_linear_layer_is_the_dense_layer_of_its_dequantised_weight():
    layer = Linear(150, 70, bias=True)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer.pack("fp8")
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert not layer.weight.requires_grad
    x = drawn(3, 150)
    dense = dequantize_blocks(layer.weight, layer.weight_scale_inv, torch.float32)
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
    assert layer(x.bfloat16().float()).dtype == torch.float32
    assert set(layer.state_dict()) == {"weight", "weight_scale_inv", "bias"}
    fresh = Linear(150, 70)
    fresh.make_packed("fp8")
    assert (fresh.weight.dtype, fresh.weight_scale_inv.shape) == (torch.float8_e4m3fn, (1, 2))


def test_fp8_experts_compute_what_their_dequantised_stacks_do():
    packed, dense = Experts(144, 3, 20), Experts(144, 3, 20)
    for name, shape in (("gate_up_proj", (3, 2, 20, 144)), ("down_proj", (3, 144, 20))):
        stack = getattr(packed, name)
        with torch.no_grad():
            stack.weight.copy_(drawn(*shape))
            stack.pack("fp8")
            getattr(dense, name).weight.copy_(stack.dense_weight(torch.float32))
    assert packed.gate_up_proj.weight_scale_inv.shape == (3, 2, 1, 2)
    assert packed.down_proj.weight_scale_inv.shape == (3, 2, 1)
    x, weights = drawn(5, 144), drawn(5, 2).abs()
    ids = torch.tensor([[0, 2], [2, 0], [0, 2], [0, -1], [-1, -1]])
    torch.testing.assert_close(packed(x, ids, weights), dense(x, ids, weights), rtol=1e-4, atol=1e-4)
    assert packed(x[:0], ids[:0], weights[:0]).shape == (0, 144)


def test_every_e4m3_pattern_is_dequantised_as_torch_casts_it():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    ones = torch.ones(1, 1)
    torch.testing.assert_close(
        dequantize_blocks(every, ones, torch.float32), every.float(), rtol=0, atol=0, equal_nan=True
    )
    transposed = every.T.contiguous().T  # strides are kept apart from values
    torch.testing.assert_close(
        dequantize_blocks(transposed, ones, torch.float32), every.float(), rtol=0, atol=0, equal_nan=True
    )
    empty = every[:0]
    assert dequantize_blocks(empty, ones[:0], torch.float32).shape == (0, 128)
