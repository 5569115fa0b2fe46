"""Kernels of training in FP8 beside their references: on a GPU as compiled, elsewhere in Triton's interpreter."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="kernels need Triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from kogia.ops import blockwise  # noqa: E402
from kogia.ops.triton import blockwise as triton_blockwise  # noqa: E402
from kogia.ops.triton import grouped as triton_grouped  # noqa: E402
from kogia.ops.triton.common import INTERPRETED  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOLERANCE = 1e-5 if INTERPRETED else 0.01


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def close(got: Tensor, want: Tensor) -> None:
    got, want = got.double(), want.double()
    assert got.shape == want.shape and torch.isfinite(got).all()
    assert (got - want).norm() <= TOLERANCE * want.norm() + 1e-12


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different size, and some zeros."""
    x = draw(*shape, seed=seed) * torch.exp(2 * draw(shape[0], *(1 for _ in shape[1:]), seed=seed + 1))
    x[shape[0] // 2] = 0
    return x


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is full of NaN, of FP8's too, and of huge integers."""
    empty = torch.empty

    def full(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", full)


def same_codes(got: Any, want: Any) -> None:
    """A number times the reciprocal of its scale may round to the neighbour of what the quotient does, now and then."""
    assert got.codes.shape == want.codes.shape and got.scale.shape == want.scale.shape
    torch.testing.assert_close(got.scale, want.scale, rtol=0 if INTERPRETED else 1e-6, atol=0)
    differing = int((got.codes.float() != want.codes.float()).sum())
    assert differing <= 1e-3 * want.codes.numel()


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (130, 300), (257, 128)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_rows_and_columns_are_rounded_to_fp8_as_the_reference_rounds_them(shape, powers):
    x = spread(*shape)
    assert triton_blockwise.quantize_rows_supports(x) is None
    rows = blockwise.quantize_rows.reference(x, power_of_two=powers)
    columns = blockwise.quantize_columns.reference(x, power_of_two=powers)
    same_codes(triton_blockwise.quantize_rows(x, power_of_two=powers), rows)
    same_codes(triton_blockwise.quantize_columns(x, power_of_two=powers), columns)
    got = triton_blockwise.quantize_both(x, power_of_two=powers)
    same_codes(got[0], rows)
    same_codes(got[1], blockwise.quantize_columns.reference(x))
    view = torch.cat((x, x), 1)[:, : shape[1]]
    same_codes(triton_blockwise.quantize_rows(view, power_of_two=powers), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_rounded_to_fp8_as_in_32(dtype):
    x = spread(131, 144).to(dtype)
    rows, columns = triton_blockwise.quantize_both(x)
    same_codes(rows, blockwise.quantize_rows.reference(x.float()))
    same_codes(columns, blockwise.quantize_columns.reference(x.float()))


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_group_that_is_not_finite_gets_a_scale_that_is_not(bad, powers):
    x = draw(3, 256)
    x[1, 200] = bad
    rows, columns = triton_blockwise.quantize_both(x, power_of_two=powers)
    for scale in (triton_blockwise.quantize_rows(x, power_of_two=powers).scale, rows.scale):
        assert (~scale.isfinite()).nonzero().tolist() == [[1, 1]]
    for scale in (triton_blockwise.quantize_columns(x, power_of_two=powers).scale, columns.scale):
        assert (~scale.isfinite()).nonzero().tolist() == [[0, 200]]
    forms = triton_blockwise.quantize_weight(x)
    assert (~forms.forward.scale.isfinite()).nonzero().tolist() == [[0, 1]]
    assert (~forms.backward.scale.isfinite()).nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize("shape", [(16, 48), (3, 130, 257)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_weights_are_rounded_to_both_forms_as_the_reference_rounds_them(shape):
    weight = spread(*shape)
    assert triton_blockwise.quantize_weight_supports(weight) is None
    got, want = triton_blockwise.quantize_weight(weight), blockwise.quantize_weight.reference(weight)
    same_codes(got.forward, want.forward)
    same_codes(got.backward, want.backward)


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (40, 256), (33, 200)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_activated_rows_are_rounded_to_fp8_and_their_gradients_as_in_the_reference(rows, width):
    both, grad = draw(rows, 2 * width), draw(rows, width, seed=1)
    weights = draw(rows, seed=2).float()
    assert triton_blockwise.weighted_silu_mul_rows_backward_supports(grad, both, weights) is None
    want = blockwise.weighted_silu_mul_rows.reference(both, weights)
    near(triton_blockwise.weighted_silu_mul_rows(both, weights).dense(), want.dense())
    assert triton_blockwise.silu_mul_rows_supports(both) is None
    near(triton_blockwise.silu_mul_rows(both).dense(), blockwise.silu_mul_rows.reference(both).dense())
    got = triton_blockwise.weighted_silu_mul_rows_backward(grad, both, weights)
    want = blockwise.weighted_silu_mul_rows_backward.reference(grad, both, weights)
    for ours, theirs in zip(got[:3], want[:3], strict=True):
        close(ours, theirs)
    near(got[3].dense(), want[3].dense())


def near(got: Tensor, want: Tensor) -> None:
    """But for numbers on the border between two of FP8's."""
    assert got.shape == want.shape and (got - want).norm() <= 0.02 * want.norm()


TILES = [
    {},
    {"parts": 2, "flatten": True},
    {"rows": 64, "columns": 64, "warps": 4},
]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 140, 1], [0, 0, 0, 0], [128, 256, 0, 127], [0, 0, 0, 5]], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_columns_of_each_expert_are_rounded_to_fp8_from_a_group_of_their_own_on(counts, gathered):
    routed, width = sum(counts) + 6, 200  # six rows are nobody's, and go to the last
    x = spread(50 if gathered else routed, width)
    places = torch.randint(50, (routed,), generator=torch.Generator().manual_seed(5)).to(DEVICE) if gathered else None
    numbers = torch.tensor(counts, device=DEVICE)
    assert triton_blockwise.quantize_routed_columns_supports(x, places, numbers) is None
    got = triton_blockwise.quantize_routed_columns(x, places, numbers)
    want = blockwise.quantize_routed_columns.reference(x, places, numbers)
    assert torch.equal(got.firsts, want.firsts)
    for ours, theirs in zip(got.split(), want.split(), strict=True):
        same_codes(ours, theirs)


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize(
    "counts", [[40, 0, 133, 1], [0, 0, 0, 0], [3, 64, 61, 1, 190], [0, 0, 5, 0], [1] * 37, [66, 2, 127]], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_tiles_hold_every_row_of_every_expert_once_and_begin_where_they_may(counts, align):
    rows, size, taken = sum(counts) + 3, 64, []  # three rows are nobody's, and go to the last
    tiles, firsts, most = triton_grouped.planned(torch.tensor(counts, device=DEVICE), rows, size, align)
    number, *flat = tiles.tolist()
    assert number <= most and firsts.tolist()[-1] == number
    for i in range(number):
        expert, start, end = flat[3 * i : 3 * i + 3]
        assert firsts[expert] <= i < firsts[expert + 1]
        aligned = start - start % align
        taken += [(row, expert) for row in range(aligned, aligned + size) if start <= row < end]
    counts[-1] += 3
    assert taken == list(enumerate(expert for expert, count in enumerate(counts) for _ in range(count)))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("counts", [[40, 0, 133, 1], [0, 0, 5, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_experts_multiply_their_own_rows_in_fp8_whatever_their_number(counts, tile):
    width, depth, beyond = 144, 300, 9
    rows = blockwise.quantize_rows.reference(draw(sum(counts) + beyond, depth))
    stack = blockwise.quantize_weight.reference(draw(4, width, depth, seed=1)).forward
    on_device = torch.tensor(counts, device=DEVICE)
    assert triton_grouped.grouped_product_supports(rows, stack, on_device, DTYPE) is None
    got = triton_grouped.tiled_product(rows, stack, on_device, DTYPE, triton_grouped.Tile(**tile))
    want = blockwise.grouped_product.reference(rows, stack, on_device, DTYPE)
    assert torch.isfinite(got).all(), "nobody's rows are somebody's"
    if sum(counts):
        close(got[: sum(counts)], want[: sum(counts)])


def test_grouped_products_say_what_they_cannot_take():
    rows = blockwise.quantize_rows.reference(draw(5, 128))
    stack = blockwise.quantize_weight.reference(draw(3, 16, 128)).forward
    counts = torch.tensor([5, 0, 0], device=DEVICE)
    refuses = triton_grouped.grouped_product_supports
    assert "a count for each" in str(refuses(rows, stack, counts[:2], DTYPE))
    assert "no rows" in str(refuses(blockwise.Rows(rows.codes[:0], rows.scale[:, :0]), stack, counts, DTYPE))
    one = blockwise.Blocks(stack.codes[0], stack.scale[0])
    assert "one matrix for each" in str(refuses(rows, one, counts, DTYPE))


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kogia.ops.triton.grouped import TILE, _grouped

a, b = (f"tensordesc<fp8e4nv[{n}, 128]>" for n in (TILE.rows, TILE.columns))
types = dict(a=a, b=b, a_scale="*fp32", b_scale="*fp32", out="*bf16", tiles="*i32", width="i32")
fixed = dict(BLOCK_M=TILE.rows, BLOCK_N=TILE.columns, PARTS=TILE.parts, STAGES=TILE.stages, FLATTEN=TILE.flatten,
             INTERPRET=False)
names = _grouped.arg_names
source = ASTSource(_grouped, {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names},
                   {(names.index(n),): value for n, value in fixed.items()},
                   {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] in "*i"})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                        options={"num_warps": TILE.warps, "num_stages": TILE.stages})
sass = kernel.asm["sass"]
print(TILE.programs * kernel.metadata.shared, *(len(re.findall(p, sass)) for p in ("QGMMA", "UTMALDG", "STL|LDL")))
"""


@pytest.mark.skipif(not INTERPRETED, reason="where there is a GPU, the kernel itself runs")
def test_experts_products_compile_to_fp8_products_of_what_the_copy_engine_brings_and_stay_in_registers():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "ptxas" in done.stderr and "Cannot find" in done.stderr:
        pytest.skip("this Triton comes without an assembler")
    assert done.returncode == 0, done.stderr
    shared, products, copies, spills = map(int, done.stdout.split())
    assert shared <= 227 * 1024
    assert products == 8, "128 numbers, 32 at a time, by 64 of 128 rows"
    assert copies > 0 and spills == 0
