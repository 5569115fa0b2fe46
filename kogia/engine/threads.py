"""How many CPU threads generation is worth.

A decode step of a small model is a thousand short operations, and each that is shared out waits for the slowest thread:
with others at work on two cores, a model of 1.2 million parameters decoded 16 sequences in half the time on one thread,
one of 8 million was as fast or faster on two. More cores than that were not measured.
"""

import torch

PARAMETERS_PER_THREAD = 4_000_000


def set_threads(threads: int | None, num_params: int) -> None:
    """Sets PyTorch's threads; None is one per 4 million parameters, and never more than PyTorch had."""
    torch.set_num_threads(threads or min(torch.get_num_threads(), max(1, num_params // PARAMETERS_PER_THREAD)))
