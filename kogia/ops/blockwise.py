"""Products in FP8 for training, forward and backward, as in DeepSeek-V3 section 3.3.

Activations and their gradients are E4M3 with a scale per 128 neighbours of a row, weights with one per 128 x 128 block;
sums of 128 products are scaled and added up in float32:

    y[m, n] = sum_g a_scale[m, g] * b_scale[n // 128, g] * sum_{k in group g} a[m, k] * b[n, k]

A layer has three products. Each sums over the last axis of both operands, which is how tensor cores read FP8:

    y  = x  W^T     x by row, W by block
    dx = dy W       dy by row, W^T by block: the second form of a weight
    dW = dy^T x     both by column, as rows of dy^T and x^T, since it sums over tokens; or in 16 bits

A weight is rounded once for each of its values (`WeightForms`), and both forms have the same numbers. Activations are
rounded where they are used. For the backward pass a layer keeps x as it enters dW: by column in FP8, half of what 16
bits take, rounded once and not, as in the report, from the form by row.

The functions here are the reference, at any width: they make the operands dense and multiply in float32.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops import fp8
from kogia.ops.dispatch import op
from kogia.ops.fp8 import BLOCK
from kogia.ops.linear import grouped_outer, product
from kogia.ops.moe import ExpertOrder, order_by_expert, sum_copies, weighted_silu_mul, weighted_silu_mul_backward
from kogia.ops.packed import Packed


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A matrix in E4M3 with a scale per 128 neighbours of a row."""

    codes: Float[Tensor, "rows padded"]
    """Rows are filled up with zeros to a multiple of 128."""
    scale: Float[Tensor, "groups rows"]
    """float32, groups first, as products read them."""

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self) -> Float[Tensor, "rows padded"]:
        """The numbers it stands for, in float32."""
        return fp8.dequantize_groups(self.codes, self.scale.T, torch.float32)

    def gathered(self, places: Int[Tensor, " some"]) -> "Rows":
        """Some of the rows, in that order. Codes are moved eight at a time."""
        words = self.codes.view(torch.int64).index_select(0, places)
        return Rows(words.view(self.codes.dtype), self.scale.index_select(1, places))


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """Columns of rows in expert order, each expert's filled up with zeros to a multiple of 128."""

    columns: Rows
    """Groups beyond the last expert's mean nothing."""
    firsts: Int[Tensor, " experts_and_one"]
    """int32: the first group of each expert, and the end of the last one's."""

    @property
    def device(self) -> torch.device:
        return self.columns.device

    def split(self) -> list[Rows]:
        """Those of each expert; waits for `firsts`."""
        ends = self.firsts.tolist()
        return [
            Rows(self.columns.codes[:, BLOCK * start : BLOCK * end], self.columns.scale[start:end])
            for start, end in itertools.pairwise(ends)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A weight, or a stack of them, in E4M3 with a scale per 128 x 128 block."""

    codes: Float[Tensor, "*stack out padded"]
    """Rows are filled up as those of `Rows`."""
    scale: Float[Tensor, "*stack out_blocks groups"]
    """float32; of as many groups as `codes` have, and perhaps zeros up to a multiple of 4, as cuBLAS wants them."""

    @classmethod
    def of(cls, weight: Packed) -> "Blocks":
        """A packed FP8 weight, where it lies unless its rows must be filled up. Of [experts, parts, out, in] the parts
        are below each other; blocks end where they do."""
        codes, scale = weight.data, weight.scale
        if codes.ndim > 3:
            assert codes.shape[-2] % BLOCK == 0, f"blocks of parts of {codes.shape[-2]} rows go beyond them"
            codes, scale = codes.flatten(1, -2), scale.flatten(1, -2)
        return cls(_padded(codes), scale)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self) -> Float[Tensor, "*stack out padded"]:
        """The numbers it stands for, in float32."""
        return fp8.dequantize_blocks(self.codes, self.scale[..., : self.codes.shape[-1] // BLOCK], torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Forms:
    """A weight as its two products read it."""

    forward: Blocks
    backward: Blocks
    """Transposed."""


@dataclass(eq=False)
class WeightForms:
    """The forms of one weight, made when they are first needed and again when it has changed."""

    _made: Forms | None = field(default=None, init=False)
    _of: tuple[int, int] | None = field(default=None, init=False)
    """Where the weight lay, and how often it had been written to."""

    def of(self, weight: Float[Tensor, "*stack out in"]) -> Forms:
        """`weight` may be a stack; of [experts, parts, out, in] the parts are below each other. Who writes to it in a
        way that PyTorch does not count must say so (`torch.autograd.graph.increment_version`)."""
        found = weight.data_ptr(), weight._version
        if self._made is None or self._of != found:
            self._made = None  # first, so that old and new are not held at once
            flat = weight.detach().flatten(1, -2) if weight.ndim > 3 else weight.detach()
            self._made, self._of = quantize_weight(flat), found
        return self._made

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightForms":
        """A copy of the weight lies elsewhere and makes its own."""
        return WeightForms()


@op(cuda=("kogia.ops.triton.blockwise",))
def quantize_rows(x: Float[Tensor, "rows width"], *, power_of_two: bool = False) -> Rows:
    """By groups of 128 of a row, with scales that map the largest magnitude to 448, or rounded up to powers of two."""
    codes, scale = fp8.quantize_groups(x, power_of_two=power_of_two)
    return Rows(_padded(codes), scale.T.contiguous())


@op(cuda=("kogia.ops.triton.blockwise",))
def quantize_columns(x: Float[Tensor, "rows width"], *, power_of_two: bool = False) -> Rows:
    """The rows of x^T: by groups of 128 of a column."""
    return quantize_rows.reference(x.T, power_of_two=power_of_two)


@op(cuda=("kogia.ops.triton.blockwise",))
def quantize_both(x: Float[Tensor, "rows width"], *, power_of_two: bool = False) -> tuple[Rows, Rows]:
    """`quantize_rows` and `quantize_columns`, for one reading of x. Powers of two are for the rows alone, which the
    report rounds once more."""
    return quantize_rows.reference(x, power_of_two=power_of_two), quantize_columns.reference(x)


@op(cuda=("kogia.ops.triton.blockwise",))
def quantize_weight(weight: Float[Tensor, "*stack out in"]) -> Forms:
    """Both forms of a weight or a stack of them."""
    codes, scale = fp8.quantize_blocks(weight)
    turned = codes.view(torch.uint8).transpose(-2, -1).contiguous().view(codes.dtype)
    return Forms(
        Blocks(_padded(codes), _in_fours(scale)),
        Blocks(_padded(turned), _in_fours(scale.transpose(-2, -1))),
    )


@op(cuda=("kogia.ops.aten.blockwise",))
def rows_product(a: Rows, b: Blocks, dtype: torch.dtype) -> Float[Tensor, "rows out"]:
    """a b^T, without gradients."""
    return product(a.dense(), b.dense()).to(dtype)


@op(cuda=("kogia.ops.aten.blockwise",))
def rows_outer(a: Rows, b: Rows, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """a b^T of two that have a scale per row: the gradient of a weight, whose rows are columns of dy and x."""
    return product(a.dense(), b.dense()).to(dtype)


@op(cuda=("kogia.ops.triton.hopper_grouped", "kogia.ops.triton.grouped"))
def grouped_product(
    a: Rows, b: Blocks, counts: Int[Tensor, " experts"], dtype: torch.dtype
) -> Float[Tensor, "routed out"]:
    """Rows in expert order times the matrix of their expert. Rows beyond the sum of `counts` are nobody's: what comes
    out for them is finite, and zero where they are. The reference waits for `counts`."""
    dense, ends = a.dense(), counts.cumsum(0).tolist()
    out = dense.new_zeros(len(dense), b.codes.shape[-2])
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            out[start:end] = product(dense[start:end], Blocks(b.codes[e], b.scale[e]).dense())
    return out.to(dtype)


@op(cuda=("kogia.ops.triton.blockwise",))
def quantize_routed_columns(
    x: Float[Tensor, "rows width"], places: Int[Tensor, " routed"] | None, counts: Int[Tensor, " experts"]
) -> Routed:
    """`quantize_columns` of the rows at `places`, or of all, in expert order; groups begin anew with each expert. Rows
    beyond the sum of `counts` are the last expert's. The reference waits for `counts`."""
    x = x if places is None else x.index_select(0, places)
    sizes = counts.tolist()
    sizes[-1] += len(x) - sum(sizes)
    parts = [quantize_columns.reference(part) for part in x.split(sizes)]
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts], 1).view(parts[0].codes.dtype)
    firsts = torch.tensor([0, *(len(part.scale) for part in parts)], dtype=torch.int32, device=x.device).cumsum(0)
    return Routed(Rows(codes, torch.cat([part.scale for part in parts])), firsts.int())


@op(cuda=("kogia.ops.triton.hopper_grouped",))
def routed_outer(a: Routed, b: Routed, dtype: torch.dtype) -> Float[Tensor, "experts out in"]:
    """a_e b_e^T over the groups of each expert: the gradient of a stack of weights. The reference waits."""
    return torch.stack([rows_outer(x, y, dtype) for x, y in zip(a.split(), b.split(), strict=True)])


@op(cuda=("kogia.ops.triton.blockwise",))
def weighted_silu_mul_rows(both: Float[Tensor, "routed gate_and_up"], weights: Float[Tensor, " routed"]) -> Rows:
    """`weighted_silu_mul`, rounded to FP8 alone."""
    wide = both.to(torch.promote_types(both.dtype, torch.float32))
    return quantize_rows.reference(weighted_silu_mul.reference(wide, weights))


@op(cuda=("kogia.ops.triton.blockwise",))
def silu_mul_rows(both: Float[Tensor, "routed gate_and_up"]) -> Rows:
    """silu(gate) * up of rows [gate ; up], rounded to FP8 alone."""
    gate, up = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, -1)
    return quantize_rows.reference(F.silu(gate) * up)


@op(cuda=("kogia.ops.triton.blockwise",))
def weighted_silu_mul_rows_backward(
    grad: Float[Tensor, "routed width"], both: Float[Tensor, "routed gate_and_up"], weights: Float[Tensor, " routed"]
) -> tuple[Float[Tensor, "routed gate_and_up"], Float[Tensor, " routed"], Float[Tensor, "routed width"], Rows]:
    """What `weighted_silu_mul_backward` gives, and its first by row."""
    grad_both, grad_weights, hidden = weighted_silu_mul_backward(grad, both, weights)
    return grad_both, grad_weights, hidden, quantize_rows(grad_both)


def fp8_linears(
    x: Float[Tensor, "... in"],
    weights: Sequence[Float[Tensor, "_ in"]],
    forms: Sequence[WeightForms],
    *,
    fp8_gradient: bool,
    power_of_two: bool = False,
) -> tuple[Float[Tensor, "... _"], ...]:
    """x W^T of one weight or several, with all products in FP8, those of the weights' gradients where `fp8_gradient`
    says so; x is rounded once. `power_of_two` is of the scales of x, by row."""
    made = [each.of(weight) for each, weight in zip(forms, weights, strict=True)]
    return _Linears.apply(x, made, fp8_gradient, power_of_two, *weights)  # pyright: ignore[reportReturnType]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, forms: Sequence[Forms], fp8_gradient: bool, power_of_two: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        ctx.forms, ctx.shape, ctx.dtype, ctx.in_fp8 = forms, x.shape, weights[0].dtype, fp8_gradient
        kept: tuple[Tensor, ...] = ()
        if not any(ctx.needs_input_grad[_WEIGHTS:]):
            rows = quantize_rows(flat, power_of_two=power_of_two)
        elif fp8_gradient:
            rows, columns = quantize_both(flat, power_of_two=power_of_two)
            kept = columns.codes, columns.scale
        else:
            rows, kept = quantize_rows(flat, power_of_two=power_of_two), (flat,)
        ctx.save_for_backward(*kept)
        return tuple(rows_product(rows, each.forward, x.dtype).view(*x.shape[:-1], -1) for each in forms)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, dx, dw = ctx.saved_tensors, None, []
        for i, (grad, form) in enumerate(zip(grads, ctx.forms, strict=True)):
            dy = grad.reshape(-1, grad.shape[-1])
            rows = of_weight = None
            if ctx.needs_input_grad[_WEIGHTS + i]:
                if ctx.in_fp8:
                    rows, columns = quantize_both(dy)
                    of_weight = rows_outer(columns, Rows(*kept), ctx.dtype)
                else:
                    of_weight = product(dy.T, kept[0].T)
            dw.append(of_weight)
            if ctx.needs_input_grad[0]:
                rows = quantize_rows(dy) if rows is None else rows
                part = rows_product(rows, form.backward, dy.dtype)
                dx = part if dx is None else dx.add_(part)
        return None if dx is None else dx.view(ctx.shape), None, None, None, *dw


_WEIGHTS = 4
"""Where they begin among the arguments of `_Linears.forward`."""


def fp8_experts(
    x: Float[Tensor, "tokens dim"],
    expert_ids: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up: Float[Tensor, "experts 2 width dim"],
    down: Float[Tensor, "experts dim width"],
    forms: tuple[WeightForms, WeightForms],
    *,
    fp8_gradient: bool,
    power_of_two: bool = False,
) -> Float[Tensor, "tokens dim"]:
    """The routed experts of `mix_experts` in FP8; `forms` are those of `gate_up`, which are taken for one matrix an
    expert, and of `down`. Tokens and gradients are rounded before they are copied to their experts: with `power_of_two`
    to such scales."""
    made = forms[0].of(gate_up), forms[1].of(down)
    order = order_by_expert(expert_ids, len(gate_up))
    weights = weights.masked_fill(expert_ids < 0, 0.0)
    return _Experts.apply(x, weights, gate_up, down, made, order, fp8_gradient, power_of_two)  # pyright: ignore[reportReturnType]


class _Experts(torch.autograd.Function):
    """Keeps what kogia.ops.moe's does: x, and gate and up of every copy of a token."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        forms: tuple[Forms, Forms],
        order: ExpertOrder,
        fp8_gradient: bool,
        power_of_two: bool,
    ) -> Tensor:
        topk = weights.shape[1]
        by_row = weights.flatten().index_select(0, order.order)
        rows = quantize_rows(x, power_of_two=power_of_two).gathered(order.order // topk)
        both = grouped_product(rows, forms[0].forward, order.counts, x.dtype)
        y = grouped_product(weighted_silu_mul_rows(both, by_row), forms[1].forward, order.counts, x.dtype)
        ctx.save_for_backward(x, both, by_row, order.order, order.inverse, order.counts)
        ctx.forms, ctx.topk, ctx.settings, ctx.shape = forms, topk, (fp8_gradient, power_of_two), gate_up.shape
        return sum_copies(y, order.inverse, topk)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, both, by_row, order, inverse, counts = ctx.saved_tensors
        (gate_up, down), (fp8_gradient, power_of_two), token = ctx.forms, ctx.settings, order // ctx.topk
        dy = quantize_rows(grads[0], power_of_two=power_of_two).gathered(token)
        grad_hidden = grouped_product(dy, down.backward, counts, x.dtype)
        grad_both, grad_by_row, hidden, grad_rows = weighted_silu_mul_rows_backward(grad_hidden, both, by_row)
        grad_gate_up = grad_down = None
        if ctx.needs_input_grad[2]:
            if fp8_gradient:
                grad_down = _outer(grads[0], token, hidden, None, counts)
                grad_gate_up = _outer(grad_both, None, x, token, counts).view(ctx.shape)
            else:
                grad_down = grouped_outer(grads[0].index_select(0, token), hidden, counts)
                grad_gate_up = grouped_outer(grad_both, x.index_select(0, token), counts).view(ctx.shape)
        dx = sum_copies(grouped_product(grad_rows, gate_up.backward, counts, x.dtype), inverse, ctx.topk)
        grad_weights = grad_by_row.index_select(0, inverse).view(-1, ctx.topk)
        return dx, grad_weights, grad_gate_up, grad_down, None, None, None, None


def _outer(a: Tensor, a_places: Tensor | None, b: Tensor, b_places: Tensor | None, counts: Tensor) -> Tensor:
    """`grouped_outer` in FP8, of rows that are brought into expert order as they are rounded."""
    of_a, of_b = quantize_routed_columns(a, a_places, counts), quantize_routed_columns(b, b_places, counts)
    return routed_outer(of_a, of_b, a.dtype)


def _padded(codes: Tensor) -> Tensor:
    """Rows filled up with zeros to a multiple of 128."""
    missing = -codes.shape[-1] % BLOCK
    return F.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype) if missing else codes.contiguous()


def _in_fours(scale: Tensor) -> Tensor:
    return F.pad(scale, (0, -scale.shape[-1] % 4)).contiguous()
