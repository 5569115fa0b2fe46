"""int8 and int4 weights against loops in float64, at odd sizes, and what their layouts are to the byte."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kogia.ops.integers import group_size
from kogia.ops.packed import FORMATS, Packed


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(packed: Packed) -> torch.Tensor:
    """The layouts as they are described, one number at a time, in float64."""
    *front, columns = packed.data.shape
    columns *= 2 if packed.format == "int4" else 1
    want = torch.empty((*front, columns), dtype=torch.float64)
    group = columns // packed.scale.shape[-1]
    for place in itertools.product(*map(range, front)):
        for column in range(columns):
            scale = float(packed.scale[place][column // group])
            if packed.format == "int8":
                code = int(packed.data[place][column])
            else:
                byte = int(packed.data[place][column // 2])
                zero = 8 if packed.zero is None else int(packed.zero[place][column // group])
                code = (byte >> 4 if column % 2 else byte & 15) - zero
            want[(*place, column)] = code * scale
    return want


stacks = st.sampled_from([(), (3,), (2, 2)])
kinds = st.sampled_from([("int8", {}), ("int4", {}), ("int4", {"asymmetric": True})])


@settings(max_examples=25, deadline=None)
@given(kinds, stacks, st.integers(1, 5), st.sampled_from([32, 64, 96, 128, 192, 256, 320]), st.integers(0, 99))
def test_the_dense_weight_is_code_less_zero_times_scale(kind, stack, rows, columns, seed):
    name, options = kind
    packed = FORMATS[name].pack(drawn(*stack, rows, columns, seed=seed), **options)
    empty = FORMATS[name].empty((*stack, rows, columns), "cpu", zeros=bool(options))
    for mine, theirs in zip((packed.data, packed.scale, packed.zero), (empty.data, empty.scale, empty.zero)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert (mine.shape, mine.dtype, mine.is_contiguous()) == (theirs.shape, theirs.dtype, True)
    want = loop(packed)
    torch.testing.assert_close(packed.dense(torch.float64), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed.dense(torch.bfloat16), want.float().bfloat16(), rtol=0, atol=0)
    if stack:
        assert len(packed) == stack[0]
        torch.testing.assert_close(packed[-1].dense(torch.float32), packed.dense(torch.float32)[-1], rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 99))
def test_int8_maps_the_largest_of_each_row_to_127_and_errs_by_half_a_step(rows, columns, seed):
    weight = drawn(rows, columns, seed=seed) * torch.exp(3 * drawn(rows, 1, seed=seed + 1))
    packed = FORMATS["int8"].pack(weight)
    torch.testing.assert_close(packed.scale[:, 0], weight.abs().amax(-1) / 127)
    assert (packed.data.abs().amax(-1) == 127).all()
    assert ((packed.dense(torch.float32) - weight).abs() <= packed.scale * 0.5001).all()


@settings(max_examples=25, deadline=None)
@given(st.booleans(), st.integers(1, 20), st.sampled_from([32, 64, 128, 384]), st.floats(-3, 3), st.integers(0, 99))
def test_int4_errs_no_more_than_the_scale_that_spans_each_group(asymmetric, rows, columns, shift, seed):
    """Of several scales the best is taken, so that the plain one bounds the squared error."""
    weight = drawn(rows, columns, seed=seed) * torch.exp(drawn(rows, 1, seed=seed + 1)) + shift
    packed = FORMATS["int4"].pack(weight, asymmetric=asymmetric)
    groups = weight.unflatten(-1, (-1, group_size(columns))).double()
    if asymmetric:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        plain = ((high - low) / 15).bfloat16().double()[..., None]
        zero = (-low[..., None] / plain).round().clamp(0, 15)
    else:
        plain = (groups.abs().amax(-1) / 7).bfloat16().double()[..., None]
        zero = torch.full_like(plain, 8)
    spanned = ((groups / plain).round() + zero).clamp(0, 15).sub(zero).mul(plain)
    errors = (packed.dense(torch.float32).double().view_as(groups) - groups).square().sum(-1)
    assert (errors <= (spanned - groups).square().sum(-1) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_columns_that_count_for_more_have_smaller_errors(asymmetric):
    weight = drawn(200, 128)
    importance = torch.ones(128)
    importance[:8] = 1000.0
    weight[:, 8:10] *= 3  # large numbers in columns that hardly count
    plain, weighted = (
        (FORMATS["int4"].pack(weight, asymmetric=asymmetric, importance=each).dense(torch.float32) - weight).square()
        for each in (None, importance)
    )
    assert (weighted @ importance).sum() < 0.8 * (plain @ importance).sum()
    assert plain.sum() < weighted.sum()
    ones = FORMATS["int4"].pack(weight, asymmetric=asymmetric, importance=torch.ones(128))
    assert torch.equal(ones.data, FORMATS["int4"].pack(weight, asymmetric=asymmetric).data)


def related(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows whose numbers go together, as activations do, in float64."""
    few = drawn(rows, 8, seed=seed).double() @ drawn(8, columns, seed=seed + 1).double()
    return few + 0.3 * drawn(rows, columns, seed=seed + 2).double()


def spread_of(products: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(products), upper=True).float()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("columns", [32, 96, 256])
def test_columns_behind_make_up_for_the_error_of_each_as_solving_for_them_does(columns, asymmetric):
    weight, x = drawn(7, columns, seed=3), related(4 * columns, columns)
    products = x.T @ x / len(x)
    packed = FORMATS["int4"].pack(weight, asymmetric=asymmetric, spread=spread_of(products))
    group, left = columns // packed.scale.shape[-1], weight.double()
    for j in range(columns):
        # of all values of the columns behind, those with the least error of the whole product, this one being rounded
        scale = packed.scale[:, j // group].double()
        zero = 8.0 if packed.zero is None else packed.zero[:, j // group].double()
        rounded = ((left[:, j] / scale).round() + zero).clamp(0, 15).sub(zero) * scale
        error = (rounded - left[:, j])[:, None]
        left[:, j] = rounded
        if j + 1 < columns:
            behind = products[j + 1 :, j + 1 :]
            left[:, j + 1 :] -= error * torch.linalg.solve(behind, products[j + 1 :, j])
    torch.testing.assert_close(packed.dense(torch.float64), left, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_errors_that_are_made_up_for_are_smaller_where_inputs_go_together_and_as_they_were_where_they_do_not(
    asymmetric,
):
    weight, x = drawn(40, 256, seed=5), related(2000, 256)
    plain = FORMATS["int4"].pack(weight, asymmetric=asymmetric)
    better = FORMATS["int4"].pack(weight, asymmetric=asymmetric, spread=spread_of(x.T @ x / len(x)))
    errors = [((each.dense(torch.float64) - weight) @ x.T).square().sum() for each in (plain, better)]
    assert errors[1] < 0.5 * errors[0]
    alone = FORMATS["int4"].pack(weight, asymmetric=asymmetric, spread=torch.eye(256))
    assert torch.equal(alone.data, plain.data) and torch.equal(alone.scale, plain.scale)


def test_zeros_save_numbers_of_one_sign_a_bit():
    weight = drawn(16, 128).abs() + 1
    errors = [
        (FORMATS["int4"].pack(weight, asymmetric=asymmetric).dense(torch.float32) - weight).square().mean()
        for asymmetric in (False, True)
    ]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("name, options", [("int8", {}), ("int4", {}), ("int4", {"asymmetric": True})])
def test_zeros_stay_zeros_beside_other_rows(name, options):
    weight = drawn(3, 128)
    weight[1] = 0
    dense = FORMATS[name].pack(weight, **options).dense(torch.float32)
    assert not dense[1].any()
    assert dense[0].any() and dense[2].any()


@pytest.mark.parametrize("name, options", [("int8", {}), ("int4", {}), ("int4", {"asymmetric": True})])
@pytest.mark.parametrize("largest", [1.4e-45, 1e-38, 1e38, torch.finfo(torch.float32).max])
def test_the_smallest_and_largest_numbers_have_a_finite_form(name, options, largest):
    weight = drawn(20, 128).clamp(-3, 3) / 3 * largest
    weight[3, 5], weight[4, 6] = largest, -largest
    packed = FORMATS[name].pack(weight, **options)
    assert bool((packed.scale > 0).all()) and bool(packed.scale.isfinite().all())
    assert bool(packed.dense(torch.float32).isfinite().all())


def test_groups_are_the_largest_of_128_64_and_32_that_divide_a_row():
    assert [group_size(n) for n in (128, 7168, 192, 64, 1056, 32, 16, 130, 0)] == [
        128,
        128,
        64,
        64,
        32,
        32,
        *[None] * 3,
    ]
    assert FORMATS["int4"].takes((5, 96)) and not FORMATS["int4"].takes((96, 5))
    assert FORMATS["int8"].takes((96, 5))
    with pytest.raises(ValueError, match="rows of a multiple of 32 numbers, not 130"):
        FORMATS["int4"].pack(drawn(4, 130))


def test_a_weight_is_packed_alike_in_parts_and_from_a_view(monkeypatch):
    weight = drawn(2, 70, 128)
    want = FORMATS["int4"].pack(weight)
    monkeypatch.setattr("kogia.ops.integers._CHUNK", 1000)
    for got in (FORMATS["int4"].pack(weight), FORMATS["int4"].pack(weight.transpose(0, 1)).data.transpose(0, 1)):
        assert torch.equal(got if isinstance(got, torch.Tensor) else got.data, want.data)
