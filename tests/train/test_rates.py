"""Learning rates where none is given."""

from dataclasses import replace

import pytest

from kogia.model.costs import num_params
from kogia.model.presets import preset
from kogia.train.config import OptimConfig
from kogia.train.rates import FINE_TUNING, FROM_SCRATCH, INDEXING, REINFORCING, default_rate, rate_line, settle_rate

PUBLISHED = [
    # (kind, preset, the rate that was published, or that the demonstration was made with)
    (FROM_SCRATCH, "deepseek-v3", 2.2e-4),  # DeepSeek-V3 section 4.2
    (FROM_SCRATCH, "deepseek-v2", 2.4e-4),  # DeepSeek-V2 section 3.1.2
    (FROM_SCRATCH, "llama-2-7b", 3e-4),  # Llama 2 section 2.2
    (FROM_SCRATCH, "kogia-demo", 2e-3),
    (FINE_TUNING, "deepseek-v3", 5e-6),  # DeepSeek-V3 section 5.1
    (FINE_TUNING, "llama-2-7b", 2e-5),  # Llama 2 section 3.1
    (FINE_TUNING, "kogia-demo", 1e-3),
    (REINFORCING, "deepseek-v3", 1e-6),
    (REINFORCING, "llama-2-7b", 1e-6),  # DeepSeekMath section 4.2, for 7 billion
    (REINFORCING, "kogia-demo", 1.5e-4),
]


@pytest.mark.parametrize(("kind", "name", "published"), PUBLISHED)
def test_the_default_is_within_a_factor_of_two_of_what_was_published_and_measured(kind, name, published):
    assert published / 2 <= default_rate(kind, preset(name)) <= 2 * published


@pytest.mark.parametrize("kind", [FROM_SCRATCH, FINE_TUNING, REINFORCING])
def test_a_larger_model_never_gets_a_larger_rate(kind):
    rates = [kind.at(10**power) for power in range(3, 13)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == kind.highest
    assert rates[-1] >= kind.lowest


def test_a_mixture_trained_from_scratch_counts_what_is_active():
    dense, mixture = preset("llama-2-7b"), preset("deepseek-moe-16b")
    assert num_params(mixture) > num_params(dense)
    assert default_rate(FROM_SCRATCH, mixture) > default_rate(FROM_SCRATCH, dense)
    assert default_rate(FINE_TUNING, mixture) < default_rate(FINE_TUNING, dense)


def test_indexers_learn_at_the_published_rate_in_a_model_of_any_size():
    assert default_rate(INDEXING, preset("deepseek-v3.2")) == default_rate(INDEXING, preset("kogia-demo")) == 1e-3


def test_a_given_rate_stays_and_the_line_says_where_the_rate_is_from():
    model, none = preset("kogia-demo"), OptimConfig(clip=0.5)
    settled = settle_rate(none, REINFORCING, model)
    assert settled == replace(none, lr=1.5e-4)
    given = OptimConfig(lr=3e-4)
    assert settle_rate(given, REINFORCING, model) is given
    label, text = rate_line(none, settled, REINFORCING, model)
    assert label == "rate"
    assert (
        text == f"peak 0.00015, the default of reinforcement learning for {num_params(model):,} parameters (optim.lr)"
    )
    assert rate_line(given, given, REINFORCING, model)[1] == "peak 0.0003, as given; the default would be 0.00015"
