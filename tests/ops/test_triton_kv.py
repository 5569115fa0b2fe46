"""Kernels of key/value heads: attention over pages, what writes them, and the rotation, beside their references."""

import os

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are Triton's")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from kogia.ops import attention, cache, rope  # noqa: E402
from kogia.ops.cache import KVRow, LatentRow, LayerCache  # noqa: E402
from kogia.ops.segments import Segments  # noqa: E402
from kogia.ops.triton import kv as triton_kv  # noqa: E402
from kogia.ops.triton import rope as triton_rope  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE == "cuda" else 2e-5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), want.double(), rtol=TOLERANCE, atol=TOLERANCE)


def segments_of(lengths: list[int]) -> Segments:
    ends = np.cumsum([0, *lengths])
    return Segments(torch.from_numpy(ends).to(DEVICE), np.array(lengths))


def paged(contexts: list[int], queries: int, heads: int, row: KVRow, page: int, poison: float = 0.0):
    """A query per head and token, and a cache of shuffled pages whose unused rows are `poison`."""
    pages = [-(-n // page) for n in contexts]
    order = np.random.default_rng(0).permutation(sum(pages) + 1)
    rows = torch.full(((sum(pages) + 1) * page, row.width), poison, device=DEVICE, dtype=DTYPE)
    tables, start = np.full((len(contexts), max(pages)), order[-1]), 0
    for s, (count, context) in enumerate(zip(pages, contexts, strict=True)):
        tables[s, :count] = order[start : start + count]
        slots = (tables[s, :count, None] * page + np.arange(page)).ravel()[:context]
        rows[torch.from_numpy(slots).to(DEVICE)] = draw(context, row.width, seed=s)
        start += count
    lens, num_tokens = np.array(contexts), len(contexts) * queries
    slots = torch.arange(num_tokens, device=DEVICE)
    at = LayerCache(rows, slots, *(torch.from_numpy(x).to(DEVICE) for x in (tables, lens)), lens, page, row)
    return draw(num_tokens, heads, row.head_dim), at, segments_of([queries] * len(contexts))


def clean(at: LayerCache) -> LayerCache:
    """In double precision and without poison: the reference multiplies what it masks by zero."""
    rows = at.rows.double().nan_to_num()
    return LayerCache(rows, at.slots, at.block_tables, at.context_lens, at.contexts, at.block_size, at.row)


@pytest.mark.parametrize(
    ("contexts", "queries", "heads", "kv_heads"),
    [([1], 1, 4, 4), ([3, 170, 33], 1, 6, 2), ([2, 90], 2, 3, 1), ([4, 9, 141], 4, 24, 2)],
)
@pytest.mark.parametrize("page", [4, 16])
def test_attention_over_pages_equals_the_reference_whatever_lies_in_unused_rows(
    contexts, queries, heads, kv_heads, page
):
    q, at, segments = paged(contexts, queries, heads, KVRow(kv_heads, 32), page, poison=float("nan"))
    want = attention.cached_attention.reference(q.double(), clean(at), segments, scale=0.2)
    assert triton_kv.cached_attention_supports(q, at, segments, scale=0.2) is None
    for parts in (None, 1, 2, 5):
        close(triton_kv.cached_attention(q, at, segments, scale=0.2, parts=parts), want)


def test_attention_says_what_it_cannot_take():
    q, at, segments = paged([8, 9], 1, 4, KVRow(2, 16), 4)
    says = triton_kv.cached_attention_supports
    assert "at most 4" in str(says(q, at, segments_of([1, 9]), scale=1.0))
    assert "strides" in str(says(q.transpose(0, 1), at, segments, scale=1.0))
    latent = LayerCache(
        at.rows, at.slots, at.block_tables, at.context_lens, at.contexts, at.block_size, LatentRow(32, 32)
    )
    assert "several heads" in str(says(q, latent, segments, scale=1.0))
    q, at, segments = paged([8], 1, 4, KVRow(2, 24), 4)
    assert "power" in str(says(q, at, segments, scale=1.0))
    q, at, segments = paged([8], 1, 4, KVRow(1, 512), 4)
    assert "256 at most" in str(says(q, at, segments, scale=1.0))


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 16), (5, 3, 20), (9, 8, 64)])
def test_keys_and_values_are_written_to_their_slots_alone(tokens, heads, dim):
    row = KVRow(heads, dim)
    k, wide = draw(tokens, heads, dim), draw(tokens, heads * dim + 6, seed=1)
    v = wide[:, : heads * dim].unflatten(-1, (heads, dim))  # a view of a wider product
    slots = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(2))[:tokens].to(DEVICE)
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    found, want = (
        LayerCache(
            torch.full((3 * tokens, row.width), 7.0).to(DEVICE, DTYPE),
            slots,
            one[:, None],
            one,
            np.ones(1, dtype=np.int64),
            1,
            row,
        )
        for _ in range(2)
    )
    assert triton_kv.write_kv_supports(k, v, found) is None
    triton_kv.write_kv(k, v, found)
    cache.write_kv.reference(k, v, want)
    assert torch.equal(found.rows, want.rows)
    if heads > 1:
        assert "side by side" in str(triton_kv.write_kv_supports(k.mT.contiguous().mT, v, found))


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (5, 3, 16), (9, 7, 64)])
def test_pairs_are_rotated_as_by_the_reference(tokens, heads, width):
    x = draw(tokens, heads + 2, width + 3)[:, 1:-1, :width]
    angle = torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert triton_rope.rotate_half_split_supports(x, angle.cos(), angle.sin()) is None
    want = rope.rotate_half_split.reference(x, angle.cos(), angle.sin())
    close(triton_rope.rotate_half_split(x, angle.cos(), angle.sin()), want)
    assert "power" in str(triton_rope.rotate_half_split_supports(draw(2, 2, 6), angle.cos(), angle.sin()))
