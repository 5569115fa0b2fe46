"""The products around latent attention, over blocks of rows."""

import torch
from jaxtyping import Float
from torch import Tensor

from kogia.ops.invariant.rows import times_each
from kogia.ops.rope import rotate_interleaved


def absorb_query(
    q: Float[Tensor, "tokens heads nope_rope"],
    w_uk: Float[Tensor, "heads nope latent"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
) -> Float[Tensor, "tokens heads latent_rope"]:
    nope = w_uk.shape[1]
    q_nope, q_rope = q.split([nope, q.shape[-1] - nope], -1)
    return torch.cat((times_each(q_nope, w_uk), rotate_interleaved(q_rope, cos, sin)), -1)


def absorb_query_supports(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return None


def project_values(
    mixed: Float[Tensor, "tokens heads latent"], w_uv: Float[Tensor, "heads v latent"]
) -> Float[Tensor, "tokens heads v"]:
    return times_each(mixed, w_uv.transpose(1, 2))


def project_values_supports(mixed: Tensor, w_uv: Tensor) -> str | None:
    return None
