"""Every Triton kernel against its reference: on a GPU as compiled, elsewhere in Triton's interpreter, which is slow.

Inputs are random, outputs are poisoned where a kernel writes into given memory, sizes are odd, single and ragged.
"""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="kernels need Triton")

from kogia.ops import attention, cache, integers, latent, logprob, moe, norm, sample  # noqa: E402
from kogia.ops.cache import LatentRow, LayerCache  # noqa: E402
from kogia.ops.packed import Packed  # noqa: E402
from kogia.ops.segments import segments_of  # noqa: E402
from kogia.ops.triton import attention as triton_attention  # noqa: E402
from kogia.ops.triton import experts as triton_experts  # noqa: E402
from kogia.ops.triton import integers as triton_integers  # noqa: E402
from kogia.ops.triton import latent as triton_latent  # noqa: E402
from kogia.ops.triton import linear as triton_linear  # noqa: E402
from kogia.ops.triton import logprob as triton_logprob  # noqa: E402
from kogia.ops.triton import moe as triton_moe  # noqa: E402
from kogia.ops.triton import norm as triton_norm  # noqa: E402
from kogia.ops.triton import packed as triton_packed  # noqa: E402
from kogia.ops.triton import prefill as triton_prefill  # noqa: E402
from kogia.ops.triton import sample as triton_sample  # noqa: E402
from kogia.ops.triton.common import INTERPRETED  # noqa: E402

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOLERANCE = 1e-5 if INTERPRETED else 0.01


def draw(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return (torch.randn(shape, generator=generator) * std).to(DEVICE, DTYPE)


def close(got: Tensor, want: Tensor) -> None:
    got, want = got.double(), want.double()
    assert got.shape == want.shape and torch.isfinite(got).all()
    assert (got - want).norm() <= TOLERANCE * want.norm() + 1e-12


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = (draw(tokens, half).float() * 3).contiguous()
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 5, 33)])
def test_norms_of_any_width_equal_the_reference(shape):
    x, delta, weight = draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2)
    assert triton_norm.add_rms_norm_supports(x, delta, weight, 1e-6) is None
    close(triton_norm.rms_norm(x, weight, 1e-3), norm.rms_norm.reference(x, weight, 1e-3))
    total, normed = triton_norm.add_rms_norm(x, delta, weight, 1e-3)
    assert torch.equal(total, x + delta)
    close(normed, norm.rms_norm.reference(total, weight, 1e-3))


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_queries_and_values_move_through_the_latents_as_in_the_reference(tokens):
    heads, nope, rope, width, v = 3, 16, 8, 32, 16
    both = draw(heads, nope + v, width)
    w_uk, w_uv = both.split([nope, v], 1)
    wide = draw(tokens, heads * (nope + rope) + 5)  # a view of a wider product, as the joint projection leaves it
    q = wide[:, : heads * (nope + rope)].unflatten(-1, (heads, -1))
    cos, sin = angles(tokens, rope // 2)
    assert triton_latent.absorb_query_supports(q, w_uk, cos, sin) is None
    close(triton_latent.absorb_query(q, w_uk, cos, sin), latent.absorb_query.reference(q, w_uk, cos, sin))
    mixed = draw(tokens, heads, width)
    assert triton_latent.project_values_supports(mixed, w_uv) is None
    close(triton_latent.project_values(mixed, w_uv), latent.project_values.reference(mixed, w_uv))
    nope_part, rope_part = q.split([nope, rope], -1)
    assert triton_latent.join_rope_supports(nope_part, rope_part, cos, sin) is None
    turned = latent.join_rope.reference(nope_part, rope_part, cos, sin)
    close(triton_latent.join_rope(nope_part, rope_part, cos, sin), turned)
    shared = rope_part[:, :1]
    assert torch.equal(triton_latent.join_rope(nope_part, shared), latent.join_rope.reference(nope_part, shared))


def paged(contexts: list[int], queries: int, heads: int, width: int, rope: int, page: int, poison: float = 0.0):
    """A query per head and token, and a cache of shuffled pages whose unused rows are `poison`."""
    pages = [-(-n // page) for n in contexts]
    order = np.random.default_rng(0).permutation(sum(pages) + 1)
    rows = torch.full(((sum(pages) + 1) * page, width + rope), poison, device=DEVICE, dtype=DTYPE)
    tables, start = np.full((len(contexts), max(pages)), order[-1]), 0
    for s, (count, context) in enumerate(zip(pages, contexts, strict=True)):
        tables[s, :count] = order[start : start + count]
        slots = (tables[s, :count, None] * page + np.arange(page)).ravel()[:context]
        rows[torch.from_numpy(slots).to(DEVICE)] = draw(context, width + rope, seed=s)
        start += count
    lens = np.array(contexts)
    at = LayerCache(
        rows,
        torch.arange(len(contexts) * queries, device=DEVICE),
        torch.from_numpy(tables).to(DEVICE),
        torch.from_numpy(lens).to(DEVICE),
        lens,
        page,
        LatentRow(width, rope),
    )
    return draw(len(contexts) * queries, heads, width + rope), at, segments_of([queries] * len(contexts), DEVICE)


@pytest.mark.parametrize(
    ("contexts", "queries", "heads"),
    [([1], 1, 4), ([3, 70, 33], 1, 5), ([2, 90], 2, 3), ([4, 9, 41], 4, 16)],
)
@pytest.mark.parametrize("page", [4, 16])
def test_attention_over_pages_equals_the_reference_whatever_lies_in_unused_rows(contexts, queries, heads, page):
    q, at, segments = paged(contexts, queries, heads, 16, 16, page, poison=float("nan"))
    want = attention.cached_attention.reference(q.double(), clean(at), segments, scale=0.2)
    assert triton_attention.cached_attention_supports(q, at, segments, scale=0.2) is None
    close(triton_attention.cached_attention(q, at, segments, scale=0.2), want)
    for parts in (1, 2, 5):
        part, lse = triton_attention.attention_parts(q, at, segments, 0.2, parts)
        out = torch.full_like(q[..., :16], float("nan"))
        triton_attention.merge_parts(part, lse, out)
        close(out, want)


def clean(at: LayerCache) -> LayerCache:
    """In double precision and without poison: the reference multiplies what it masks by zero."""
    return LayerCache(
        at.rows.double().nan_to_num(), at.slots, at.block_tables, at.context_lens, at.contexts, at.block_size, at.row
    )


def in_fp8(at: LayerCache) -> LayerCache:
    """The same rows, rounded; unused ones are bytes that stand for NaN."""
    row = LatentRow(at.row.latent, at.row.rope, fp8=True)
    numbers = at.rows.nan_to_num().split([row.latent, row.rope], -1)
    rows = torch.where(at.rows.isnan().any(1, keepdim=True), 0xFF, row.pack(*numbers, None))
    return LayerCache(rows, at.slots, at.block_tables, at.context_lens, at.contexts, at.block_size, row)


@pytest.mark.parametrize(("contexts", "queries", "heads"), [([3, 70, 33], 1, 5), ([4, 9, 41], 4, 16)])
def test_attention_over_fp8_rows_equals_the_reference(contexts, queries, heads):
    q, dense, segments = paged(contexts, queries, heads, 512, 16, 4, poison=float("nan"))
    at = in_fp8(dense)
    numbers = LayerCache(
        at.row.unpack(at.rows, DTYPE), at.slots, at.block_tables, at.context_lens, at.contexts, 4, dense.row
    )
    want = attention.cached_attention.reference(q.double(), clean(numbers), segments, scale=0.1)
    assert triton_attention.cached_attention_supports(q, at, segments, scale=0.1) is None
    close(triton_attention.cached_attention(q, at, segments, scale=0.1), want)


@pytest.mark.parametrize(("full", "latent"), [(16, 16), (512, 512), (512, 200)])
def test_fp8_rows_are_written_as_the_reference_writes_them(full, latent):
    _, dense, _ = paged([8, 9], 1, 2, latent, 8, 4)
    at = in_fp8(dense)
    kv, weight = draw(3, full + 8, seed=3), draw(full, seed=4)
    kv[2, :full] = 0  # a block of zeros has scale 1
    cos, sin = angles(3, 4)
    object.__setattr__(at, "slots", torch.tensor([5, 2, 7], device=DEVICE))
    before = at.rows.clone()
    cache.write_latent.reference(kv, at, weight, cos, sin, eps=1e-6)
    want = at.rows.clone()
    at.rows.copy_(before)
    assert triton_latent.write_latent_supports(kv, at, weight, cos, sin, eps=1e-6) is None
    triton_latent.write_latent(kv, at, weight, cos, sin, eps=1e-6)
    others = [i for i in range(len(want)) if i not in (5, 2, 7)]
    assert torch.equal(at.rows[others], before[others])
    got, want = (at.row.unpack(rows[[5, 2, 7]], torch.float32) for rows in (at.rows, want))
    allowed = 0.1 if INTERPRETED else 0.003  # the interpreter cuts bfloat16 off, and halves some E4M3 numbers
    assert (got - want).norm() <= allowed * want.norm()


def test_attention_says_what_it_cannot_take():
    q, at, segments = paged([8, 9], 1, 2, 16, 16, 4)
    assert "power" in str(triton_attention.cached_attention_supports(q, odd(at, 24), segments, scale=1.0))
    assert "4" in str(triton_attention.cached_attention_supports(q, at, segments_of([1, 9], DEVICE), scale=1.0))
    assert "strides" in str(triton_attention.cached_attention_supports(q.transpose(0, 1), at, segments, scale=1.0))
    fp8 = in_fp8(at)
    assert "16 bytes" in str(triton_attention.cached_attention_supports(q, fp8, segments, scale=1.0))
    if not INTERPRETED:
        assert "float32" in str(triton_attention.cached_attention_supports(q.float(), at, segments, scale=1.0))


def odd(at: LayerCache, width: int) -> LayerCache:
    row = LatentRow(width, 16)
    return LayerCache(at.rows, at.slots, at.block_tables, at.context_lens, at.contexts, at.block_size, row)


def test_rows_are_written_normed_and_rotated_to_their_slots_alone():
    _, at, _ = paged([8, 9], 1, 2, 16, 8, 4)
    kv, weight = draw(2, 24, seed=3), draw(16, seed=4)
    cos, sin = angles(2, 4)
    object.__setattr__(at, "slots", torch.tensor([5, 2], device=DEVICE))
    before = at.rows.clone()
    cache.write_latent.reference(kv, at, weight, cos, sin, eps=1e-6)
    want = at.rows.clone()
    at.rows.copy_(before)
    assert triton_latent.write_latent_supports(kv, at, weight, cos, sin, eps=1e-6) is None
    triton_latent.write_latent(kv, at, weight, cos, sin, eps=1e-6)
    close(at.rows[[5, 2]], want[[5, 2]])
    others = [i for i in range(len(want)) if i not in (5, 2)]
    assert torch.equal(at.rows[others], before[others])


@pytest.mark.parametrize(("width", "v", "kv_heads"), [(16, 16, 2), (48, 32, 1)])
def test_prefill_with_and_without_a_context_equals_the_reference(width, v, kv_heads):
    lengths, contexts = [5, 1, 40], [0, 7, 30]
    keys = [n + c for n, c in zip(lengths, contexts, strict=True)]
    q, k, values = draw(46, 4, width), draw(83, kv_heads, width, seed=1), draw(83, kv_heads, v, seed=2)
    segments, key_segments = segments_of(lengths, DEVICE), segments_of(keys, DEVICE)
    wide = q.double(), k.double(), values.double()
    want = attention.varlen_attention.reference(*wide, segments, scale=0.3, keys=key_segments)
    assert triton_prefill.varlen_attention_supports(q, k, values, segments, scale=0.3, keys=key_segments) is None
    options: Any = {"scale": 0.3, "config": (32, 16, 4, 2) if INTERPRETED else (128, 64, 8, 3)}
    close(triton_prefill.varlen_attention(q, k, values, segments, keys=key_segments, **options), want)
    own = k[: segments.num_tokens], values[: segments.num_tokens]
    wide = q.double(), own[0].double(), own[1].double()
    want = attention.varlen_attention.reference(*wide, segments, scale=0.3)
    close(triton_prefill.varlen_attention(q, *own, segments, **options), want)


ROUTERS = [
    ("sigmoid", True, 8, 3, 1, 1),
    ("softmax", False, 6, 2, 1, 1),
    ("sigmoid", True, 16, 4, 4, 2),
    ("softmax", False, 12, 3, 4, 2),
    ("sigmoid", True, 4, 2, 4, 2),
]


@pytest.mark.parametrize(("score", "biased", "experts", "topk", "groups", "kept"), ROUTERS)
@pytest.mark.parametrize("tokens", [1, 18])
@pytest.mark.parametrize("single", [True, False])
def test_routing_equals_the_reference(score, biased, experts, topk, groups, kept, tokens, single, monkeypatch):
    monkeypatch.setattr(triton_moe, "_SINGLE", 2**30 if single else 0)
    x, weight = draw(tokens, 40), draw(experts, 40, seed=1)
    bias = (draw(experts, seed=2).float() * 0.3).contiguous() if biased else None
    options: Any = {
        "score": score,
        "topk": topk,
        "num_groups": groups,
        "topk_groups": kept,
        "normalize": True,
        "scale": 2.5,
    }
    assert triton_moe.route_supports(x, weight, bias, **options) is None
    got, want = triton_moe.route(x, weight, bias, **options), moe.route.reference(x, weight, bias, **options)
    assert torch.equal(got.expert_ids.sort().values, want.expert_ids.sort().values)
    close(dense_weights(got, experts), dense_weights(want, experts))
    close(got.scores, want.scores)
    assert not triton_moe.counters(x.device, 1).any(), "a counter was left standing"


ACTIVATIONS = {
    "fewer": lambda tokens: moe.Activation(2),
    "more": lambda tokens: moe.Activation(6),
    "each its own": lambda tokens: moe.Activation(5, limits=torch.arange(tokens, device=DEVICE) % 5 + 1),
    "by threshold": lambda tokens: moe.Activation(4, thresholds=torch.linspace(0, 1, tokens, device=DEVICE)),
    "both": lambda tokens: moe.Activation(
        5, torch.arange(tokens, device=DEVICE) % 5 + 1, torch.full((tokens,), 0.8, device=DEVICE)
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_routing_to_other_numbers_of_experts_equals_the_reference(activation, normalize, single, monkeypatch):
    monkeypatch.setattr(triton_moe, "_SINGLE", 2**30 if single else 0)
    x, weight, bias = draw(18, 40), draw(16, 40, seed=1), (draw(16, seed=2).float() * 0.3).contiguous()
    options: Any = {"score": "sigmoid", "topk": 4, "num_groups": 4, "topk_groups": 2, "normalize": normalize}
    options |= {"scale": 2.5, "activation": ACTIVATIONS[activation](18)}
    assert triton_moe.route_supports(x, weight, bias, **options) is None
    got, want = triton_moe.route(x, weight, bias, **options), moe.route.reference(x, weight, bias, **options)
    assert torch.equal(got.expert_ids, want.expert_ids)
    close(got.weights, want.weights)


@pytest.mark.parametrize("single", [True, False])
def test_a_token_that_is_not_a_number_chooses_experts_that_exist_and_leaves_others_alone(single, monkeypatch):
    monkeypatch.setattr(triton_moe, "_SINGLE", 2**30 if single else 0)
    x, weight = draw(5, 40), draw(12, 40, seed=1)  # padded to 16 experts
    options: Any = {"score": "softmax", "topk": 3, "num_groups": 1, "topk_groups": 1, "normalize": True, "scale": 1.0}
    good = triton_moe.route(x, weight, None, **options)
    x[2] = float("nan")
    found = triton_moe.route(x, weight, None, **options)
    assert int(found.expert_ids.min()) >= 0 and int(found.expert_ids.max()) < 12
    rest = [0, 1, 3, 4]
    assert torch.equal(found.expert_ids[rest], good.expert_ids[rest])
    assert torch.equal(found.weights[rest], good.weights[rest])
    assert found.weights[2].isnan().all()


def dense_weights(routed: moe.Routed, experts: int) -> Tensor:
    grid = routed.weights.new_zeros(len(routed.weights), experts)
    return grid.scatter(1, routed.expert_ids, routed.weights)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_mixed_experts_equal_the_reference_with_nobody_shared_and_residual(tokens, num_shared):
    experts, topk, dim, width = 5, 2, 48, 24
    x, residual = draw(tokens, dim), draw(tokens, dim, seed=1)
    ids = torch.rand(tokens, experts - 1).topk(topk).indices.to(DEVICE)  # the last expert has no token
    ids[tokens // 2, 1] = -1
    weights = torch.rand(tokens, topk).to(DEVICE)
    gate_up, down = draw(experts, 2, width, dim, std=0.3), draw(experts, dim, width, std=0.3)
    shared = None
    if num_shared:
        wide = num_shared * width
        shared = (draw(wide, dim, std=0.3), draw(wide, dim, std=0.3, seed=1), draw(dim, wide, std=0.3))
    for add in (None, residual):
        assert triton_moe.mix_experts_supports(x, ids, weights, gate_up, down, shared=shared, residual=add) is None
        got = triton_moe.mix_experts(x, ids, weights, gate_up, down, shared=shared, residual=add)
        doubles = [t.double() for t in (gate_up, down)]
        more: Any = None if shared is None else tuple(t.double() for t in shared)
        want = moe.mix_experts.reference(
            x.double(), ids, weights.double(), *doubles, shared=more, residual=None if add is None else add.double()
        )
        close(got, want)


def packed(*shape: int, format: str, group: int = 0, zeros: bool = False, seed: int = 0) -> tuple[Packed, Tensor]:
    """A random packed weight of [*shape], and the numbers that it stands for in double precision."""
    generator = torch.Generator().manual_seed(hash((shape, format, seed)) % 2**31)
    *stack, rows, columns = shape

    def scales(*of: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.rand(*stack, *of, generator=generator) * 0.1 + 0.02).to(dtype)

    if format == "fp8":
        data = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        scale = scales(-(-rows // 128), -(-columns // 128))
        spread = scale.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
        dense, zero = data.double() * spread, None
    elif format == "int8":
        data = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        scale, zero = scales(rows, 1) / 50, None
        dense = data.double() * scale
    else:
        codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
        data = codes[..., 0::2] | codes[..., 1::2] << 4
        scale = scales(rows, columns // group, dtype=torch.bfloat16)
        zero = torch.randint(0, 16, scale.shape, generator=generator).to(torch.uint8) if zeros else None
        base = torch.tensor(8.0) if zero is None else zero.repeat_interleave(group, -1).double()
        dense = (codes.double() - base) * scale.double().repeat_interleave(group, -1)
    zero = None if zero is None else zero.to(DEVICE)
    return Packed(data.to(DEVICE), scale.to(DEVICE), zero, format), dense.to(DEVICE)


PACKED: list[dict[str, Any]] = [
    {"format": "fp8"},
    {"format": "int8"},
    {"format": "int4", "group": 32},
    {"format": "int4", "group": 64},
    {"format": "int4", "group": 128, "zeros": True},
]


@pytest.mark.parametrize("kind", PACKED, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_mixed_packed_experts_equal_the_reference_with_the_numbers_they_stand_for(tokens, kind):
    experts, topk, dim, width, num_shared = 4, 2, 128, 128, 2
    x, residual = draw(tokens, dim), draw(tokens, dim, seed=1)
    ids = torch.rand(tokens, experts).topk(topk).indices.to(DEVICE)
    ids[tokens // 2, 1] = -1
    weights = torch.rand(tokens, topk).to(DEVICE)
    wide = num_shared * width
    shapes = ((experts, 2, width, dim), (experts, dim, width), (wide, dim), (wide, dim), (dim, wide))
    made = [packed(*shape, seed=i, **kind) for i, shape in enumerate(shapes)]
    routed, shared = [m[0] for m in made[:2]], tuple(m[0] for m in made[2:])
    doubles, more = [m[1] for m in made[:2]], tuple(m[1] for m in made[2:])
    for given, wanted in ((None, None), (shared, more)):
        assert triton_moe.mix_experts_supports(x, ids, weights, *routed, shared=given, residual=residual) is None
        got = triton_moe.mix_experts(x, ids, weights, *routed, shared=given, residual=residual)
        want = moe.mix_experts.reference(
            x.double(), ids, weights.double(), *doubles, shared=wanted, residual=residual.double()
        )
        close(got, want)


@pytest.mark.parametrize("kind", PACKED, ids=str)
@pytest.mark.parametrize(("rows", "width"), [((1,), 48), ((3, 7), 33), ((70,), 130)])
def test_products_with_packed_weights_equal_those_with_the_numbers_they_stand_for(rows, width, kind):
    weight, dense = packed(width, 256, **kind)
    wide = draw(*rows, 256 + 6)  # a view of a wider product
    x, bias = wide[..., 4:-2], draw(width, seed=1)
    for b in (None, bias):
        assert triton_linear.linear_supports(x, weight, b) is None
        want = torch.nn.functional.linear(x.double(), dense, None if b is None else b.double())
        close(triton_linear.linear(x, weight, b), want)


@pytest.mark.parametrize("kind", PACKED, ids=str)
@pytest.mark.parametrize("shape", [(33, 256), (2, 1, 130, 128)])
def test_packed_weights_are_made_dense_to_the_last_bit(shape, kind):
    weight, dense = packed(*shape, **kind)
    assert triton_packed.dequantize_supports(weight, DTYPE) is None
    assert torch.equal(triton_packed.dequantize(weight, DTYPE), dense.to(torch.float32).to(DTYPE))


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_packed_products_take_depths_that_end_within_a_block(format):
    weight, dense = packed(20, 200, format=format)
    x = draw(5, 200)
    close(triton_linear.linear(x, weight), x.double() @ dense.T)
    close(triton_packed.dequantize(weight, DTYPE), dense)


def test_packed_products_say_what_they_cannot_take():
    weight, _ = packed(16, 64, format="int4", group=64)
    x = draw(3, 66)
    assert "dense" in str(triton_linear.linear_supports(x, draw(16, 66)))
    assert "two numbers" in str(triton_linear.linear_supports(x[:, 1:65], weight))
    assert "512" in str(triton_linear.linear_supports(draw(513, 64), weight))
    assert "stack" in str(triton_linear.linear_supports(x[:, :64], packed(2, 8, 64, format="int8")[0]))
    assert "16" in str(triton_linear.linear_supports(x[:, :64], packed(8, 64, format="int4", group=16)[0]))
    ids, weights = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    x, routed = draw(3, 64), (packed(2, 2, 32, 64, format="int8")[0], packed(2, 64, 32, format="int8")[0])
    shared = draw(32, 64), draw(32, 64), draw(64, 32)
    assert "routed ones" in str(triton_moe.mix_experts_supports(x, ids, weights, *routed, shared=shared))
    fp8 = [packed(*shape, format="fp8")[0] for shape in ((2, 2, 32, 64), (2, 64, 32), (32, 64), (32, 64), (64, 32))]
    reason = triton_moe.mix_experts_supports(x, ids, weights, fp8[0], fp8[1], shared=tuple(fp8[2:]))
    assert "32 wide" in str(reason)


def test_every_token_may_choose_the_same_expert():
    x, weights = draw(70, 32), torch.rand(70, 1).to(DEVICE)
    gate_up, down = draw(4, 2, 16, 32, std=0.3), draw(4, 32, 16, std=0.3)
    ids = torch.full((70, 1), 2, device=DEVICE)
    want = moe.mix_experts.reference(x.double(), ids, weights.double(), gate_up.double(), down.double())
    close(triton_moe.mix_experts(x, ids, weights, gate_up, down), want)


def test_products_for_many_tokens_are_activated_and_gathered_as_in_the_reference():
    halves, y = draw(7, 2 * 20).chunk(2, -1), draw(14, 33)
    close(triton_moe.silu_mul(*halves), moe.silu_mul.reference(*halves))
    inverse, weights = torch.randperm(14).to(DEVICE), torch.rand(7, 2).to(DEVICE)
    added = draw(7, 33, seed=1), draw(7, 33, seed=2)
    for count in (0, 1, 2):
        arguments = y, inverse, weights, *added[:count]
        assert triton_moe.gathered_sum_supports(*arguments) is None
        close(triton_moe.gathered_sum(*arguments), moe.gathered_sum.reference(*arguments))


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_numbers_to_draw_with_are_the_references(rows):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789], device=DEVICE).repeat(rows)[:rows]
    positions = torch.arange(rows, device=DEVICE) * 7919
    assert triton_sample.counter_uniforms_supports(seeds, positions) is None
    found = triton_sample.counter_uniforms(seeds, positions)
    assert found.equal(sample.counter_uniforms.reference(seeds, positions))


@pytest.mark.parametrize("vocab", [5, 130, 9000])
def test_samples_equal_the_references(vocab):
    logits = draw(6, vocab, std=2)
    temperature = torch.tensor([0.0, 1.0, 0.7, 2.0, 1.0, 1.0], device=DEVICE)
    uniforms = torch.tensor([0.5, 0.0, 0.3, 0.999999, 1 - 2**-53, 0.6], dtype=torch.float64, device=DEVICE)
    assert triton_sample.sample_supports(logits, temperature, uniforms) is None
    for u in (None, uniforms):
        tokens, logprobs = triton_sample.sample(logits, temperature, u)
        want_tokens, want_logprobs = sample.sample.reference(logits, temperature, u)
        assert torch.equal(tokens, want_tokens)
        torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [5, 130, 9000])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (3, None, None),
        (None, 0.8, None),
        (None, None, 0.2),
        (40, 0.9, None),
        (4, 0.5, 0.1),
        (9000, 1e-6, 0.0),
        (1, 1, 1),
    ],
)
def test_filtered_samples_equal_the_references(vocab, top_k, top_p, min_p):
    """Beside each row with the filters one without, one that is greedy, and one of many equal logits."""
    logits = draw(8, vocab, std=2)
    logits[5:] = (logits[5:] * 2).round() / 2
    logits[6, ::3] = float("-inf")
    temperature = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.5], device=DEVICE)
    on = torch.tensor([True, False, True, True, True, True, True, True], device=DEVICE)
    filters = [
        None if value is None else torch.where(on, value, off).to(kind)
        for value, off, kind in ((top_k, 0, torch.int64), (top_p, 1.0, torch.float32), (min_p, 0.0, torch.float32))
    ]
    for seed in range((1 if vocab > 1000 else 2) if INTERPRETED else 20):
        uniforms = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
        if seed == 0:
            uniforms[:2], uniforms[6:] = 0.0, 1 - 2**-53
        assert triton_sample.sample_supports(logits, temperature, uniforms, *filters) is None
        tokens, logprobs = triton_sample.sample(logits, temperature, uniforms, *filters)
        want, want_logprobs = sample.sample.reference(logits, temperature, uniforms, *filters)
        assert tokens.tolist() == want.tolist()
        torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)


def test_filters_pass_over_rows_that_are_not_numbers():
    logits = draw(3, 40)
    logits[1, 7] = float("nan")
    ones = torch.ones(3, device=DEVICE)
    tokens, logprobs = triton_sample.sample(logits, ones, ones.double() / 2, ones.long() * 5, ones * 0.9, ones * 0.1)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 40
    assert torch.isfinite(logprobs).tolist() == [True, False, True]


def test_of_equal_logits_the_lowest_id_is_greedy_and_nan_is_seen():
    logits = torch.zeros(2, 9, device=DEVICE, dtype=DTYPE)
    logits[1, 4] = float("nan")
    tokens, logprobs = triton_sample.sample(logits, torch.zeros(2, device=DEVICE), None)
    assert tokens[0] == 0 and 0 <= int(tokens[1]) < 9
    assert not torch.isfinite(logprobs[1])


HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not HOPPER, reason="the kernel is for Hopper GPUs, and has no interpreter")
@pytest.mark.parametrize(
    ("contexts", "queries", "heads"),
    [([1], 1, 16), ([3, 700, 33], 1, 5), ([2, 90, 129], 2, 16), ([4, 1000, 64], 1, 128), ([900], 3, 64)],
)
@pytest.mark.parametrize("page", [4, 16, 64])
def test_hoppers_attention_equals_the_reference_whatever_lies_in_unused_rows(contexts, queries, heads, page):
    from kogia.ops.triton import hopper

    q, at, segments = paged(contexts, queries, heads, 512, 64, page, poison=float("nan"))
    want = attention.cached_attention.reference(q.double(), clean(at), segments, scale=0.07)
    assert hopper.cached_attention_supports(q, at, segments, scale=0.07) is None
    close(hopper.cached_attention(q, at, segments, scale=0.07), want)
    for parts in (1, 3):
        part, lse = hopper.attention_parts(q, at, segments, 0.07, parts)
        close(triton_attention.merged(part, lse, q.dtype), want)


@pytest.mark.skipif(not HOPPER, reason="the kernel is for Hopper GPUs, and has no interpreter")
def test_hoppers_attention_says_what_it_leaves_to_the_other_kernel():
    from kogia.ops.triton import hopper

    q, at, segments = paged([8, 9], 1, 16, 512, 32, 4)
    assert "512 + 64" in str(hopper.cached_attention_supports(q, at, segments, scale=1.0))
    q, at, segments = paged([8] * 1000, 1, 16, 512, 64, 4)
    assert "1000 sequences" in str(hopper.cached_attention_supports(q, at, segments, scale=1.0))
    assert "bfloat16" in str(hopper.cached_attention_supports(q.half(), at, segments, scale=1.0))
    assert "bfloat16" in str(hopper.cached_attention_supports(q, in_fp8(at), segments, scale=1.0))


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kogia.ops.triton.hopper import REGISTERS, _parts

fixed = dict(HEADS=int(sys.argv[1]), QUERIES=1, PAGE=16, REGISTERS=REGISTERS, PDL=True)
types = dict(q="*bf16", cache="*bf16", tables="*i64", context_lens="*i64", cu_seqlens="*i64", part_out=sys.argv[2],
             part_lse="*fp32", scale="fp32", table_width="i32", num_parts="i32")
names = _parts.arg_names
source = GluonASTSource(_parts, {n: types.get(n, "constexpr") for n in names},
                        {(names.index(n),): value for n, value in fixed.items()},
                        {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
sass = kernel.asm["sass"]
print(kernel.metadata.shared, *(len(re.findall(p, sass)) for p in ("HGMMA", "WARPGROUP.DEPBAR", "STL|LDL")))
"""


@pytest.mark.skipif(not INTERPRETED, reason="where there is a Hopper GPU, the kernel itself runs")
def test_hoppers_attention_compiles_to_products_that_need_not_wait_for_one_another_and_keeps_its_sums_in_registers():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, "128", "*bf16"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "ptxas" in done.stderr and "Cannot find" in done.stderr:
        pytest.skip("this Triton comes without an assembler")
    assert done.returncode == 0, done.stderr
    shared, products, waits, spills = map(int, done.stdout.split())
    assert shared <= 227 * 1024
    assert products == 36 + 2 * 4  # 576 numbers 16 at a time; 64 keys, in each of the two groups
    assert waits == 3  # one for each group; serialised products would have one each
    assert spills == 0


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("shape", "weighted"), [((1, 32), False), ((3, 5, 192), True), ((40, 384), False)], ids=str)
def test_a_weight_is_rounded_to_int4_as_the_reference_rounds_it(shape, weighted, asymmetric):
    weight, importance = draw(*shape), draw(shape[-1], seed=3).abs().float() if weighted else None
    weight.view(-1, shape[-1])[-1, :32] = 0
    assert triton_integers.quantize_nibbles_supports(weight) is None
    got = triton_integers.quantize_nibbles(weight, asymmetric=asymmetric, importance=importance)
    weight, importance = weight.cpu(), None if importance is None else importance.cpu()  # a GPU divides less exactly
    want = integers.quantize_nibbles.reference(weight, asymmetric=asymmetric, importance=importance)
    got = [None if each is None else each.cpu() for each in got]
    dense, wanted = (integers.dequantize_nibbles(*each, torch.float32) for each in (got, want))
    differs = (dense != wanted).float().mean()  # where two scales are as good as one another
    assert differs < 0.02
    gaps = [(each - weight.float()).square().mean() for each in (dense, wanted)]
    torch.testing.assert_close(*gaps, rtol=1e-4, atol=1e-12)


def test_no_group_of_int4_divides_a_row_of_40():
    assert "no group" in str(triton_integers.quantize_nibbles_supports(draw(2, 40)))


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 24), (5, 130), (3, 2100)], ids=str)
def test_weighted_activations_of_experts_and_their_gradients_equal_the_reference(rows, width):
    both, grad = draw(rows, 2 * width), draw(rows, width, seed=1)
    weights = draw(rows, seed=2).float()
    assert triton_experts.weighted_silu_mul_backward_supports(grad, both, weights) is None
    close(triton_experts.weighted_silu_mul(both, weights), moe.weighted_silu_mul.reference(both, weights))
    got = triton_experts.weighted_silu_mul_backward(grad, both, weights)
    for ours, theirs in zip(got, moe.weighted_silu_mul_backward.reference(grad, both, weights), strict=True):
        close(ours, theirs)


def test_the_gradient_of_weighted_activations_is_that_of_numerical_differentiation():
    both, weights = draw(3, 8).double().requires_grad_(), draw(3, seed=1).double().requires_grad_()
    grad = draw(3, 4, seed=2).double()
    gate, up = both.chunk(2, -1)
    want = torch.autograd.grad(torch.nn.functional.silu(gate) * up * weights[:, None], (both, weights), grad)
    got = moe.weighted_silu_mul_backward.reference(grad, both.detach(), weights.detach())
    torch.testing.assert_close(got[:2], want)


@pytest.mark.parametrize(("tokens", "topk", "dim"), [(1, 1, 16), (5, 3, 40), (4, 2, 2100)], ids=str)
def test_copies_are_summed_as_the_reference_sums_them(tokens, topk, dim):
    y, inverse = draw(tokens * topk, dim), torch.randperm(tokens * topk).to(DEVICE)
    assert triton_experts.sum_copies_supports(y, inverse, topk) is None
    close(triton_experts.sum_copies(y, inverse, topk), moe.sum_copies.reference(y, inverse, topk))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (4, 64), (3, 4099)], ids=str)
def test_the_gradient_of_the_loss_takes_the_place_of_the_logits(rows, vocab, masked):
    logits = draw(rows, vocab, std=4.0)
    targets = (torch.arange(rows) * 7 % vocab).to(DEVICE)
    counted = (torch.arange(rows) % 2 == 0).to(DEVICE) if masked else None
    assert triton_logprob.loss_gradient_supports(logits, targets, counted) is None
    want = logprob.loss_gradient.reference(logits.clone(), targets, counted)
    got = triton_logprob.loss_gradient(logits, targets, counted)
    assert got[2] is logits
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs)


def test_huge_and_infinitely_small_logits_leave_the_loss_finite():
    logits = draw(2, 40, std=1e4)
    logits[:, 3] = float("-inf")
    targets = logits.argmax(-1)
    want = logprob.loss_gradient.reference(logits.clone(), targets)[0]
    values, _, gradient = triton_logprob.loss_gradient(logits, targets)
    close(values, want)
    assert gradient.isfinite().all()
