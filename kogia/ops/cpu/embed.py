"""The embedding of few tokens, of a decode step or a short prompt: a copy for each, where PyTorch takes a hundred
microseconds."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import Kernel, refusal

_embed = Kernel("kogia_embed", "6q")
_MOST = 128


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """A token that has no row gets zeros."""
    (vocab, dim), tokens = weight.shape, token_ids.shape[0]
    out = torch.empty(tokens, dim, dtype=weight.dtype)
    _embed(token_ids.data_ptr(), tokens, weight.data_ptr(), vocab, dim * weight.element_size(), out.data_ptr())
    return out


def embed_supports(token_ids: Tensor, weight: Tensor) -> str | None:
    if torch.is_grad_enabled() or token_ids.ndim != 1 or len(token_ids) > _MOST:
        return f"it is for up to {_MOST} tokens"
    return refusal(token_ids, dtypes=(torch.int64,)) or refusal(weight)
