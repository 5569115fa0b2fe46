"""Many rows times packed FP8 weights, in FP8, as DeepSeek-V3 is served: rows are rounded with a scale per 128 numbers,
and tensor cores multiply the codes (kogia.ops.blockwise). Nothing is made dense.

Few rows wait for the weights' bytes, not for arithmetic: kogia.ops.triton reads those and leaves the rows in 16 bits.
What rounding the rows costs is in docs/quantisation.md.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.blockwise import Blocks, Rows, grouped_product, quantize_rows, rows_product, silu_mul_rows
from kogia.ops.fp8 import BLOCK
from kogia.ops.moe import SharedExperts, combine, order_by_expert, silu_mul
from kogia.ops.packed import Packed

LEAST_ROWS = 384
"""Of one matrix. `python benchmarks/engine_gpu_packed.py --products` measures from where on it is faster."""
LEAST_TOKENS = 384
"""Of experts; measured likewise."""
_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16
"""Numbers that a row of cuBLAS's results must be a multiple of."""


def linear(
    x: Float[Tensor, "... in"], weight: Tensor | Packed, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "... out"]:
    """The bias is added to the rounded product."""
    assert isinstance(weight, Packed), "see linear_supports"
    y = _times(quantize_rows(x.reshape(-1, x.shape[-1])), weight, x.dtype)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1)


def _times(rows: Rows, weight: Tensor | Packed, dtype: torch.dtype) -> Float[Tensor, "rows out"]:
    assert isinstance(weight, Packed), "the op has been asked"
    return rows_product(rows, Blocks.of(weight), dtype)


def linear_supports(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> str | None:
    if not isinstance(weight, Packed):
        return "dense weights are for cuBLAS"
    if weight.data.ndim != 2:
        return f"it takes one matrix, not a stack of {tuple(weight.data.shape[:-2])}"
    rows = x.numel() // x.shape[-1]
    if rows < LEAST_ROWS:
        return f"it is made for at least {LEAST_ROWS} rows, not {rows}"
    return _refusal(x) or _weight_refusal(weight)


def mix_experts(
    x: Float[Tensor, "tokens dim"],
    expert_ids: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up: Tensor | Packed,
    down: Tensor | Packed,
    *,
    shared: SharedExperts | None = None,
    residual: Float[Tensor, "tokens dim"] | None = None,
) -> Float[Tensor, "tokens dim"]:
    """Tokens are rounded once, before they are copied to their experts, and for the shared ones too."""
    assert isinstance(gate_up, Packed) and isinstance(down, Packed), "see mix_experts_supports"
    order = order_by_expert(expert_ids, len(gate_up))
    weights = weights.masked_fill(expert_ids < 0, 0.0)
    rows = quantize_rows(x)
    both = grouped_product(rows.gathered(order.order // expert_ids.shape[1]), Blocks.of(gate_up), order.counts, x.dtype)
    y = grouped_product(silu_mul_rows(both), Blocks.of(down), order.counts, x.dtype)
    added = []
    if shared is not None:
        gate, up, back = shared
        hidden = silu_mul(_times(rows, gate, x.dtype), _times(rows, up, x.dtype))
        added.append(_times(quantize_rows(hidden), back, x.dtype))
    if residual is not None:
        added.append(residual)
    return combine(y, weights, order, *added)


def mix_experts_supports(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | Packed,
    down: Tensor | Packed,
    *,
    shared: SharedExperts | None = None,
    residual: Tensor | None = None,
) -> str | None:
    if not (isinstance(gate_up, Packed) and isinstance(down, Packed)):
        return "dense experts are for grouped_mm"
    if len(x) < LEAST_TOKENS:
        return f"it is made for at least {LEAST_TOKENS} tokens, not {len(x)}"
    if gate_up.data.shape[2] % BLOCK:
        return f"blocks of experts {gate_up.data.shape[2]} wide do not end where the gate does"
    return _refusal(x) or next(filter(None, map(_weight_refusal, (gate_up, down, *(shared or ())))), None)


def _weight_refusal(weight: Tensor | Packed) -> str | None:
    if not isinstance(weight, Packed) or weight.format != "fp8":
        return f"it takes weights stored as fp8, not {weight.format if isinstance(weight, Packed) else weight.dtype}"
    if not weight.data.is_contiguous() or not weight.data.numel():
        return f"it takes contiguous weights, not strides {weight.data.stride()} of {tuple(weight.data.shape)}"
    if weight.data.shape[-2] % _ALIGNMENT:
        return f"it makes rows of a multiple of {_ALIGNMENT} numbers, not {weight.data.shape[-2]}"
    return None


def _refusal(x: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it rounds rows of one of {_DTYPES}, not {x.dtype}"
    if x.stride(-1) != 1:
        return f"it takes rows of numbers side by side, not strides {x.stride()}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "it has no backward"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] != 9:
        return "only Hopper multiplies FP8 with scales by block"
    return None
