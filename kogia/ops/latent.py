"""What stands around latent attention (DeepSeek-V2 section 2.1.2): queries and keys of two parts, and the products that
move queries into the space of the latents and values out of it."""

import torch
from jaxtyping import Float
from torch import Tensor

from kogia.ops.dispatch import op
from kogia.ops.norm import rms_norm
from kogia.ops.rope import rotate_interleaved


@op(cuda=("kogia.ops.triton.latent",), invariant=("kogia.ops.invariant.latent",), cpu=("kogia.ops.cpu.latent",))
def absorb_query(
    q: Float[Tensor, "tokens heads nope_rope"],
    w_uk: Float[Tensor, "heads nope latent"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
) -> Float[Tensor, "tokens heads latent_rope"]:
    """[W_UK^T q_nope ; RoPE(q_rope)]: what the cached rows are compared with."""
    nope = w_uk.shape[1]
    q_nope, q_rope = q.split([nope, q.shape[-1] - nope], -1)
    q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((q_latent, rotate_interleaved(q_rope, cos, sin)), -1)


@op(cuda=("kogia.ops.triton.latent",), invariant=("kogia.ops.invariant.latent",), cpu=("kogia.ops.cpu.latent",))
def project_values(
    mixed: Float[Tensor, "tokens heads latent"], w_uv: Float[Tensor, "heads v latent"]
) -> Float[Tensor, "tokens heads v"]:
    """W_UV of each head, behind the attention's sum."""
    return torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)


@op(cuda=("kogia.ops.triton.latent",))
def join_rope(
    nope: Float[Tensor, "tokens heads nope"],
    rope: Float[Tensor, "tokens heads_or_1 rope"],
    cos: Float[Tensor, "tokens half"] | None = None,
    sin: Float[Tensor, "tokens half"] | None = None,
) -> Float[Tensor, "tokens heads nope_rope"]:
    """[nope ; rope] of every head, the second part rotated where there are angles, and shared where it has one head."""
    if cos is not None and sin is not None:
        rope = rotate_interleaved(rope, cos, sin)
    return torch.cat((nope, rope.expand(-1, nope.shape[1], -1)), -1)


@op(cuda=("kogia.ops.triton.latent_training",), cpu=("kogia.ops.cpu.latent_training",))
def latent_and_key(
    kv: Float[Tensor, "tokens rank_rope"],
    weight: Float[Tensor, " rank"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    eps: float,
) -> tuple[Float[Tensor, "tokens rank"], Float[Tensor, "tokens 1 rope"]]:
    """(normed latent, rotated shared key) of what the down-projection gives."""
    latent, key = kv.split([len(weight), kv.shape[1] - len(weight)], -1)
    return rms_norm(latent, weight, eps), rotate_interleaved(key[:, None], cos, sin)


@op(cuda=("kogia.ops.triton.latent_training",), cpu=("kogia.ops.cpu.latent_training",))
def rotate_query(
    q: Float[Tensor, "tokens heads nope_rope"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    nope: int,
) -> Float[Tensor, "tokens heads nope_rope"]:
    """[q_nope ; RoPE(q_rope)]."""
    q_nope, q_rope = q.split([nope, q.shape[-1] - nope], -1)
    return join_rope(q_nope, q_rope, cos, sin)


@op(cuda=("kogia.ops.triton.latent_training",), cpu=("kogia.ops.cpu.latent_training",))
def keys_and_values(
    both: Float[Tensor, "keys heads nope_v"], key: Float[Tensor, "keys 1 rope"], nope: int
) -> tuple[Float[Tensor, "keys heads nope_rope"], Float[Tensor, "keys heads v"]]:
    """([k_nope ; the shared rotated key], v) of every head, from [k_nope ; v]; v may share its memory."""
    k_nope, v = both.split([nope, both.shape[-1] - nope], -1)
    return join_rope(k_nope, key), v
