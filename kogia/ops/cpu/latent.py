"""What stands around latent attention: rows of the cache, queries and values."""

import torch
from torch import Tensor

from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.cpu.common import Kernel, refusal

_write = Kernel("kogia_write_latent", "5q 3q d 3q")
_absorb = Kernel("kogia_absorb_query", "8q 3q 4q")
_project = Kernel("kogia_project_values", "5q 3q 2q")


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
        kv.data_ptr(), kv.shape[0], norm_weight.shape[0], row.rope, row.latent,
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
        refusal(kv, norm_weight, cache.rows)
        or refusal(cos, sin, dtypes=(torch.float32,))
        or refusal(cache.slots, dtypes=(torch.int64,))
    )


def absorb_query(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Eight tokens of a head at once."""
    (tokens, heads, _), (_, nope, latent) = q.shape, w_uk.shape
    rope = q.shape[2] - nope
    out = torch.empty(tokens, heads, latent + rope, dtype=q.dtype)
    _absorb(
        q.data_ptr(), q.stride(0), q.stride(1), tokens, heads, nope, rope, latent,
        w_uk.data_ptr(), w_uk.stride(0), w_uk.stride(1),
        cos.data_ptr(), sin.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def absorb_query_supports(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    _, nope, latent = w_uk.shape
    if nope % 2 or latent % 32 or q.stride(2) != 1 or q.stride(1) % 2 or q.stride(0) % 2:
        return f"it takes an even part without rotation and latents of a multiple of 32, not {nope} and {latent}"
    return _matrix_refusal(w_uk) or refusal(q) or refusal(cos, sin, dtypes=(torch.float32,))


def project_values(mixed: Tensor, w_uv: Tensor) -> Tensor:
    """One head after the other."""
    (tokens, heads, latent), v = mixed.shape, w_uv.shape[1]
    out = torch.empty(tokens, heads, v, dtype=mixed.dtype)
    _project(
        mixed.data_ptr(), tokens, heads, latent, v, w_uv.data_ptr(), w_uv.stride(0), w_uv.stride(1),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def project_values_supports(mixed: Tensor, w_uv: Tensor) -> str | None:
    if w_uv.shape[2] % 32:
        return f"it takes latents of a multiple of 32, not {w_uv.shape[2]}"
    return _matrix_refusal(w_uv) or refusal(mixed)


def _matrix_refusal(weight: Tensor) -> str | None:
    """Of the absorbed matrices, which are views: only their rows lie side by side."""
    if weight.dtype != torch.bfloat16 or weight.stride(2) != 1:
        return f"it takes matrices in bfloat16 with rows side by side, not {weight.dtype}, {weight.stride()}"
    return "it has no backward" if weight.requires_grad and torch.is_grad_enabled() else None
