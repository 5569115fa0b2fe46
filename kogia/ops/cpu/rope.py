"""Rotary angles of few positions, of a decode step or a short prompt."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import Kernel, refusal

_angles = Kernel("kogia_angles", "4q d 2q")
_MOST = 128


def rope_angles(positions: Tensor, theta: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """One call for what takes PyTorch five."""
    tokens, half = positions.shape[0], theta.shape[0]
    cos, sin = torch.empty(tokens, half), torch.empty(tokens, half)
    _angles(positions.data_ptr(), tokens, theta.data_ptr(), half, scale, cos.data_ptr(), sin.data_ptr())
    return cos, sin


def rope_angles_supports(positions: Tensor, theta: Tensor, scale: float = 1.0) -> str | None:
    if torch.is_grad_enabled() or positions.shape[0] > _MOST:
        return f"it is for up to {_MOST} positions"
    return refusal(positions, dtypes=(torch.int64,)) or refusal(theta, dtypes=(torch.float32,))
