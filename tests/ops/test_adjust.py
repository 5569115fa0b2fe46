"""Adjusted logits against a loop in float64 that follows the definitions word by word."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kogia.engine.rules import pack_bits
from kogia.ops.adjust import Bias, Masks, Penalties, adjust_logits, sample_adjusted
from kogia.ops.dispatch import use_backend
from kogia.ops.sample import filter_logits, most_likely, token_logprobs

VOCAB = 70
TOKEN = st.integers(0, VOCAB - 1)
ROW = st.fixed_dictionaries(
    {
        "bias": st.dictionaries(TOKEN, st.floats(-100, 100, width=32), max_size=4),
        "counts": st.dictionaries(TOKEN, st.integers(0, 5), max_size=6),
        "penalties": st.tuples(st.floats(0.5, 2, width=32), st.floats(-2, 2, width=32), st.floats(-2, 2, width=32)),
        "allowed": st.none() | st.sets(TOKEN, min_size=1),
        "bans": st.lists(TOKEN, max_size=4),
    }
)


def by_loop(logits: list[float], row: dict) -> list[float]:
    z = [value + row["bias"].get(token, 0.0) for token, value in enumerate(logits)]
    repetition, frequency, presence = row["penalties"]
    for token, count in row["counts"].items():
        z[token] = z[token] / repetition if z[token] > 0 else z[token] * repetition
        z[token] -= frequency * count
        z[token] -= presence if count else 0.0
    z = [value if row["allowed"] is None or token in row["allowed"] else -math.inf for token, value in enumerate(z)]
    rest = [-math.inf if token in row["bans"] else value for token, value in enumerate(z)]
    return z if max(rest) == -math.inf else rest


@given(st.lists(ROW, min_size=1, max_size=4), st.integers(0, 99))
def test_adjusted_logits_are_those_of_a_float64_loop(rows, seed):
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    got = adjust_logits(logits, *operands(rows))
    expected = torch.tensor([by_loop(logits[i].double().tolist(), row) for i, row in enumerate(rows)])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-4)
    assert logits.equal(before)


def operands(rows: list[dict]) -> tuple[Bias | None, Penalties | None, Masks | None, torch.Tensor | None]:
    bias = {i * VOCAB + t: b for i, row in enumerate(rows) for t, b in row["bias"].items()}
    seen = {i * VOCAB + t: c for i, row in enumerate(rows) for t, c in row["counts"].items()}
    masked = [i for i, row in enumerate(rows) if row["allowed"] is not None]
    bits = [torch.from_numpy(pack_bits(sorted(rows[i]["allowed"]), VOCAB)) for i in masked]
    bans = [i * VOCAB + t for i, row in enumerate(rows) for t in row["bans"]]
    penalties = torch.tensor([row["penalties"] for row in rows], dtype=torch.float32).T.contiguous()
    return (
        Bias(torch.tensor(list(bias)), torch.tensor(list(bias.values()))) if bias else None,
        Penalties(torch.tensor(list(seen)), torch.tensor(list(seen.values())), *penalties) if seen else None,
        Masks(torch.tensor(masked), torch.stack(bits)) if masked else None,
        torch.tensor(bans) if bans else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", sample_adjusted.backend_names)
@settings(max_examples=30)
@given(
    rows=st.lists(ROW, min_size=1, max_size=4), seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 0.3, 1.0])
)
def test_tokens_are_drawn_from_adjusted_logits_and_scored_by_the_models_own(backend, dtype, rows, seed, temperature):
    if backend == "cpu" and sample_adjusted.backends("cpu")[0].load() is not None:
        pytest.skip("no kernels for this processor")
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(rows), VOCAB, generator=random) * 3).to(dtype)
    uniforms = torch.rand(len(rows), generator=random, dtype=torch.float64)
    t = torch.tensor([temperature, 1.0, 0.0, 0.7][: len(rows)])
    with use_backend(backend, ["sample_adjusted"]):
        tokens, logprobs = sample_adjusted(logits, t, uniforms, *operands(rows))
        assert sample_adjusted(logits, t, None, *operands(rows))[0].equal(
            adjust_logits(logits, *operands(rows)).argmax(-1)
        )
    torch.testing.assert_close(logprobs, token_logprobs(logits, t, tokens), rtol=1e-4, atol=1e-5)
    for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
        wanted = torch.tensor(by_loop(logits[i].double().tolist(), row), dtype=torch.float64)
        if not t[i]:
            assert wanted[token] >= wanted.max() - 1e-4
            continue
        cumulative = (wanted / t[i].double()).softmax(-1).cumsum(-1)
        assert wanted[token] > -math.inf
        assert cumulative[token] - uniforms[i] > -1e-5
        assert uniforms[i] - (cumulative[token - 1] if token else 0.0) > -1e-5


@pytest.mark.parametrize("backend", sample_adjusted.backend_names)
@settings(max_examples=40)
@given(rows=st.lists(ROW, min_size=1, max_size=4), seed=st.integers(0, 99), top_k=st.integers(0, 9))
def test_filters_see_the_adjusted_logits(backend, rows, seed, top_k):
    if backend == "cpu" and sample_adjusted.backends("cpu")[0].load() is not None:
        pytest.skip("no kernels for this processor")
    random, count = torch.Generator().manual_seed(seed), len(rows)
    logits = torch.randn(count, VOCAB, generator=random) * 3
    uniforms, t = torch.rand(count, generator=random, dtype=torch.float64), torch.full((count,), 0.8)
    filters = torch.full((count,), top_k), torch.rand(count, generator=random), torch.rand(count, generator=random) / 4
    with use_backend(backend, ["sample_adjusted"]):
        tokens, logprobs = sample_adjusted(logits, t, uniforms, *operands(rows), *filters)
    kept = filter_logits(adjust_logits(logits, *operands(rows)) / 0.8, *filters)
    torch.testing.assert_close(logprobs, token_logprobs(logits, t, tokens), rtol=1e-4, atol=1e-5)
    cumulative = kept.double().softmax(-1).cumsum(-1)
    for i, token in enumerate(tokens.tolist()):
        assert kept[i, token] > -math.inf
        assert cumulative[i, token] - uniforms[i] > -1e-5
        assert uniforms[i] - (cumulative[i, token - 1] if token else 0.0) > -1e-5


@pytest.mark.parametrize("backend", sample_adjusted.backend_names)
def test_a_likely_token_is_drawn_however_far_below_or_above_the_others_it_stands(backend):
    """Powers over the top of all logits would be 0 for all that a mask leaves, or infinite for a bias."""
    logits = torch.zeros(2, 5000)
    logits[0, 3], logits[0, 4000:4002] = 400.0, torch.tensor([-90.0, -90.5])
    masks = Masks(torch.tensor([0]), torch.from_numpy(pack_bits([4000, 4001], 5000))[None])
    bias = Bias(torch.tensor([5000 + 4999]), torch.tensor([900.0]))
    tokens = []
    with use_backend(backend, ["sample_adjusted"]):
        for uniform in (0.0, 0.5, 0.7, 1 - 2**-53):
            got, scores = sample_adjusted(
                logits, torch.ones(2), torch.full((2,), uniform, dtype=torch.float64), bias, None, masks
            )
            assert got[1] == 4999 and scores[1] == pytest.approx(-math.log(5000), rel=1e-5)
            assert scores[0] == pytest.approx(float(logits[0, got[0]]) - 400, rel=1e-5)
            tokens.append(int(got[0]))
    assert tokens == [4000, 4000, 4001, 4001]


def test_half_precision_logits_are_adjusted_in_float32():
    logits = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
    got = adjust_logits(logits, Bias(torch.tensor([3]), torch.tensor([0.001])))
    assert got.dtype == torch.float32
    assert got[0, 3] == torch.tensor(0.001)


def test_bans_that_leave_nothing_give_way_to_the_mask_in_their_row_alone():
    logits = torch.arange(2 * VOCAB, dtype=torch.float32).view(2, VOCAB)
    masks = Masks(torch.tensor([0, 1]), torch.from_numpy(pack_bits([4], VOCAB)).repeat(2, 1))
    got = adjust_logits(logits, masks=masks, bans=torch.tensor([4, VOCAB + 5]))
    assert got.argmax(-1).tolist() == [4, 4]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_log_probabilities_of_given_and_of_the_likeliest_tokens_are_those_of_a_softmax(temperature):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = torch.log_softmax(logits.double() / (temperature or 1.0), -1)
    t, tokens = torch.full((3,), temperature), torch.tensor([5, 0, VOCAB - 1])
    torch.testing.assert_close(token_logprobs(logits, t, tokens), expected[range(3), tokens].float())
    ids, values = most_likely(logits, t, 4)
    assert ids.tolist() == [sorted(range(VOCAB), key=lambda i, row=row: -row[i])[:4] for row in expected.tolist()]
    torch.testing.assert_close(values, expected.gather(1, ids).float())
