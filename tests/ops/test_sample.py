"""The sampler against loops in float64, a scalar splitmix64, and the distributions it claims."""

import math

import numpy as np
import pytest
import torch

from kogia.ops.sample import counter_uniforms, filter_logits, sample


def splitmix64(seed: int, count: int) -> list[float]:
    """The generator as published (Steele, Lea and Flood 2014), on Python integers."""
    mask, state, out = 2**64 - 1, seed % 2**64, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(((z ^ (z >> 31)) >> 11) / 2**53)
    return out


def kept_by_loop(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Which tokens the three filters keep, one token at a time."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        weights = [math.exp(logits[i]) for i in order]
        kept, mass = [], 0.0
        for i, weight in zip(order, weights):
            if kept and mass / sum(weights) >= top_p:
                break
            kept.append(i)
            mass += weight
        order = kept
    best = math.exp(logits[order[0]])
    return {i for i in order if math.exp(logits[i]) >= min_p * best}


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
def test_uniforms_are_the_published_splitmix64_stream(seed):
    got = counter_uniforms(torch.full((50,), seed), torch.arange(50))
    assert got.tolist() == splitmix64(seed, 50)


def test_uniforms_of_neighbouring_seeds_and_positions_look_independent():
    seeds = torch.arange(400).repeat_interleave(100)
    u = counter_uniforms(seeds, torch.arange(100).repeat(400)).view(400, 100).numpy()
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 160  # chi-square, 99 degrees of freedom, p = 1e-4
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02  # four standard errors


def test_filters_keep_what_a_float64_loop_keeps():
    generator = torch.Generator().manual_seed(0)
    settings = [(0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1)]
    settings += [(7, 0.8, 0.0), (7, 0.8, 0.2), (0, 0.95, 0.05), (100, 0.999, 0.001), (0, 1e-6, 0.0), (0, 1.0, 1.0)]
    logits = torch.randn(len(settings), 40, generator=generator) * 2
    k, p, m = (torch.tensor(column) for column in zip(*settings))
    filtered = filter_logits(logits, k, p, m)
    for row, (top_k, top_p, min_p) in enumerate(settings):
        kept = set(torch.isfinite(filtered[row]).nonzero().flatten().tolist())
        assert kept == kept_by_loop(logits[row].double().tolist(), top_k, top_p, min_p)
        assert torch.equal(filtered[row, sorted(kept)], logits[row, sorted(kept)])


def test_a_filter_changes_only_the_rows_that_turn_it_on():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 30, generator=generator)
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.0, 2.0, 0.0])
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    top_k = torch.tensor([0, 0, 3, 0, 0, 2])
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.4, 1.0, 1.0])
    together, _ = sample(logits, temperature, uniforms, top_k, top_p)
    for i in range(6):
        alone, _ = sample(
            logits[i : i + 1],
            temperature[i : i + 1],
            uniforms[i : i + 1],
            top_k[i : i + 1] if top_k[i] else None,
            top_p[i : i + 1] if top_p[i] < 1 else None,
        )
        assert together[i] == alone[0]


def test_equal_logits_are_cut_at_exactly_k_tokens_lowest_ids_first():
    filtered = filter_logits(torch.zeros(1, 8), top_k=torch.tensor([3]))
    assert torch.isfinite(filtered[0]).tolist() == [True] * 3 + [False] * 5


def test_sampling_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    points = torch.tensor([0.0, 0.05, 0.0999, 0.1001, 0.29, 0.31, 0.59, 0.61, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = sample(logits.expand(9, 4), torch.ones(9), points)
    assert tokens.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]])
    points = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = sample(logits.expand(4, 5), torch.ones(4), points)
    assert tokens.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.5, 4, 1.0)])
def test_frequencies_follow_the_filtered_distribution(temperature, top_k, top_p):
    logits = torch.randn(10, generator=torch.Generator().manual_seed(2))
    draws = 20000
    scaled = (logits.double() / temperature).tolist()
    kept = kept_by_loop(scaled, top_k, top_p, 0.0)
    weights = np.array([math.exp(z) if i in kept else 0.0 for i, z in enumerate(scaled)])
    expected = draws * weights / weights.sum()
    uniforms = counter_uniforms(torch.full((draws,), 99), torch.arange(draws))
    tokens, _ = sample(
        logits.expand(draws, 10),
        torch.full((draws,), temperature),
        uniforms,
        torch.full((draws,), top_k),
        torch.full((draws,), top_p),
    )
    counts = np.bincount(tokens.numpy(), minlength=10)
    assert not counts[weights == 0].any()
    used = weights > 0
    chi_square = ((counts - expected)[used] ** 2 / expected[used]).sum()
    assert chi_square < 34  # at most 9 degrees of freedom, p = 1e-4


def test_logprobs_are_unfiltered_at_the_rows_temperature_and_at_one_for_greedy_rows():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    temperature = torch.tensor([0.5, 0.0, 2.0])
    uniforms = torch.tensor([0.3, 0.3, 0.9], dtype=torch.float64)
    tokens, logprobs = sample(logits, temperature, uniforms, top_k=torch.tensor([2, 2, 2]))
    assert tokens[1] == logits[1].argmax()
    for i, divisor in enumerate([0.5, 1.0, 2.0]):
        expected = torch.log_softmax(logits[i].double() / divisor, -1)[tokens[i]]
        assert logprobs[i].item() == pytest.approx(expected.item(), abs=1e-6)


def test_without_uniforms_every_row_is_greedy():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(4))
    tokens, _ = sample(logits, torch.zeros(5), None)
    assert torch.equal(tokens, logits.argmax(-1))
