"""Threads for generation: the user's number, else what the model is worth, within what PyTorch was given."""

import pytest
import torch

from kogia.engine.threads import generation_threads


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("allowed", "wanted", "num_params", "used"),
    [
        (8, None, 1_200_000, 1),
        (8, None, 35_000_000, 3),
        (8, None, 7_000_000_000, 8),
        (1, None, 7_000_000_000, 1),
        (8, None, 0, 1),
        (8, 3, 1_200_000, 3),
        (1, 2, 1_200_000, 2),
    ],
)
def test_a_small_model_gets_few_threads_unless_told_otherwise(allowed, wanted, num_params, used):
    torch.set_num_threads(allowed)
    with generation_threads(wanted, num_params):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == allowed


def test_an_error_gives_the_threads_back_too():
    torch.set_num_threads(3)
    with pytest.raises(KeyboardInterrupt):
        with generation_threads(None, 1):
            raise KeyboardInterrupt
    assert torch.get_num_threads() == 3
