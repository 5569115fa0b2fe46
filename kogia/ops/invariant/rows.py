"""Products over blocks of a fixed number of rows."""

import torch
from jaxtyping import Float
from torch import Tensor

CPU_ROWS, GPU_ROWS = 16, 64


def block_rows(x: Tensor) -> int:
    """Rows of a block on the device of `x`: few cost little where there is one token, many cost little where there are
    thousands."""
    return CPU_ROWS if x.device.type == "cpu" else GPU_ROWS


def in_blocks(x: Float[Tensor, "rows ..."], rows: int) -> Float[Tensor, "blocks block ..."]:
    """A copy of `x` in blocks of so many rows, zeros behind its end. New memory is aligned alike, whatever `x` is."""
    blocks = -(-x.shape[0] // rows)
    padded = x.new_zeros(blocks * rows, *x.shape[1:])
    padded[: x.shape[0]] = x
    return padded.view(blocks, rows, *x.shape[1:])


def times(x: Float[Tensor, "rows in"], matrix: Float[Tensor, "out in"]) -> Float[Tensor, "rows out"]:
    """x matrix^T."""
    blocks = in_blocks(x, block_rows(x))
    out = x.new_empty(*blocks.shape[:2], matrix.shape[0])
    for block, to in zip(blocks, out, strict=True):
        torch.mm(block, matrix.T, out=to)
    return out.flatten(0, 1)[: x.shape[0]]


def times_each(
    x: Float[Tensor, "rows heads in"], matrices: Float[Tensor, "heads in out"]
) -> Float[Tensor, "rows heads out"]:
    """Every head times its own matrix."""
    blocks = in_blocks(x, block_rows(x))
    out = [torch.bmm(block.transpose(0, 1), matrices).transpose(0, 1) for block in blocks]
    return torch.cat(out)[: x.shape[0]]
