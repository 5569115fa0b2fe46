"""Products in FP8 by cuBLAS, which takes scales per 1 x 128 and 128 x 128 on Hopper."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kogia.ops.blockwise import Blocks, Rows

_ROWS = 4  # scales of 16 bytes: their rows are as many as those of the codes
_GROUPS = 4  # likewise the groups of a weight


def rows_product(a: Rows, b: Blocks, dtype: torch.dtype) -> Tensor:
    rows = len(a.codes)
    a, missing = _whole(a), -b.scale.shape[1] % _GROUPS
    b_scale = F.pad(b.scale, (0, missing)) if missing else b.scale
    kinds = F.ScalingType
    return F.scaled_mm(
        a.codes,
        b.codes.T,
        a.scale.T,
        kinds.BlockWise1x128,
        b_scale.T,
        kinds.BlockWise128x128,
        output_dtype=dtype,
    )[:rows]


def rows_product_supports(a: Rows, b: Blocks, dtype: torch.dtype) -> str | None:
    if b.codes.ndim != 2:
        return f"it takes one matrix, not {tuple(b.codes.shape)}"
    return _refusal(a, b.codes.shape[0], dtype)


def rows_outer(a: Rows, b: Rows, dtype: torch.dtype) -> Tensor:
    kinds = F.ScalingType
    return F.scaled_mm(
        a.codes, b.codes.T, a.scale.T, kinds.BlockWise1x128, b.scale.T, kinds.BlockWise1x128, output_dtype=dtype
    )


def rows_outer_supports(a: Rows, b: Rows, dtype: torch.dtype) -> str | None:
    if len(a.codes) % _ROWS:
        return f"it takes a multiple of {_ROWS} rows, not {len(a.codes)}"
    return _refusal(a, len(b.codes), dtype)


def _whole(a: Rows) -> Rows:
    missing = -len(a.codes) % _ROWS
    if not missing:
        return a
    codes = F.pad(a.codes.view(torch.uint8), (0, 0, 0, missing)).view(a.codes.dtype)
    return Rows(codes, F.pad(a.scale, (0, missing)))


def _refusal(a: Rows, width: int, dtype: torch.dtype) -> str | None:
    if torch.cuda.get_device_capability(a.device)[0] != 9:
        return "cuBLAS has scales by block on Hopper alone"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it makes numbers of 16 or 32 bits, not {dtype}"
    if width % 16 or not a.codes.numel():
        return f"it takes widths that are multiples of 16, not {width}, and at least one row"
    return None
