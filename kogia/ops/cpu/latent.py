"""What stands around latent attention: rows of the cache, queries and values."""

import torch
from torch import Tensor

from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.cpu.common import DTYPES, Kernel, alike_refusal, refusal

_write = Kernel("kogia_write_latent", "6q 3q d 3q")
_absorb = Kernel("kogia_absorb_query", "9q 3q 4q")
_project = Kernel("kogia_project_values", "6q 3q 2q")


def write_latent(
    kv: Tensor,
    cache: LayerCache,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    index_key: Tensor | None = None,
) -> None:
    """Straight into the rows."""
    row, rows = cache.row, cache.rows
    assert isinstance(row, LatentRow), "see write_latent_supports"
    _write(
        DTYPES[kv.dtype], kv.data_ptr(), kv.shape[0], norm_weight.shape[0], row.rope, row.latent,
        norm_weight.data_ptr(), cos.data_ptr(), sin.data_ptr(), eps,
        rows.data_ptr(), rows.stride(0), cache.slots.data_ptr(),
    )  # fmt: skip


def write_latent_supports(
    kv: Tensor,
    cache: LayerCache,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    index_key: Tensor | None = None,
) -> str | None:
    if not isinstance(cache.row, LatentRow) or cache.row.fp8 or index_key is not None:
        return "it writes dense latent rows without index keys"
    return (
        alike_refusal(kv, norm_weight, cache.rows)
        or refusal(cos, sin, dtypes=(torch.float32,))
        or refusal(cache.slots, dtypes=(torch.int64,))
    )


def absorb_query(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Eight tokens of a head at once."""
    (tokens, heads, _), (_, nope, latent) = q.shape, w_uk.shape
    rope = q.shape[2] - nope
    out = torch.empty(tokens, heads, latent + rope, dtype=q.dtype)
    _absorb(
        DTYPES[q.dtype], q.data_ptr(), q.stride(0), q.stride(1), tokens, heads, nope, rope, latent,
        w_uk.data_ptr(), w_uk.stride(0), w_uk.stride(1),
        cos.data_ptr(), sin.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def absorb_query_supports(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if q.stride(2) != 1:
        return f"it takes queries whose numbers lie side by side, not strides {q.stride()}"
    return _matrix_refusal(w_uk, q) or refusal(cos, sin, dtypes=(torch.float32,))


def project_values(mixed: Tensor, w_uv: Tensor) -> Tensor:
    """One head after the other."""
    (tokens, heads, latent), v = mixed.shape, w_uv.shape[1]
    out = torch.empty(tokens, heads, v, dtype=mixed.dtype)
    _project(
        DTYPES[mixed.dtype], mixed.data_ptr(), tokens, heads, latent, v,
        w_uv.data_ptr(), w_uv.stride(0), w_uv.stride(1), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def project_values_supports(mixed: Tensor, w_uv: Tensor) -> str | None:
    return _matrix_refusal(w_uv, mixed)


def _matrix_refusal(weight: Tensor, x: Tensor) -> str | None:
    """Of the absorbed matrices, which are views: only the numbers of a row lie side by side."""
    if weight.dtype != x.dtype or weight.stride(2) != 1:
        return f"it takes matrices in {x.dtype} with rows side by side, not {weight.dtype}, {weight.stride()}"
    return "it has no backward" if weight.requires_grad and torch.is_grad_enabled() else refusal(x)
