"""The embedding of tokens."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op


@op(cpu=("kogia.ops.cpu.embed",))
def embed(token_ids: Int[Tensor, " tokens"], weight: Float[Tensor, "vocab dim"]) -> Float[Tensor, "tokens dim"]:
    """The rows of `weight` that tokens have."""
    return F.embedding(token_ids, weight)
