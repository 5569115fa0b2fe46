"""Threads for generation: the user's number, else what the model is worth, within what PyTorch was given."""

import pytest
import torch

from kogia.engine.threads import set_threads


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("allowed", "wanted", "num_params", "used"),
    [
        (8, None, 1_200_000, 1),
        (8, None, 8_400_000, 2),
        (8, None, 7_000_000_000, 8),
        (1, None, 7_000_000_000, 1),
        (8, None, 0, 1),
        (8, 3, 1_200_000, 3),
        (1, 2, 1_200_000, 2),
    ],
)
def test_a_small_model_gets_few_threads_unless_told_otherwise(allowed, wanted, num_params, used):
    torch.set_num_threads(allowed)
    set_threads(wanted, num_params)
    assert torch.get_num_threads() == used
