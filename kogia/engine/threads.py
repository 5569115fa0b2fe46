"""How many CPU threads generation is worth.

A decode step of a small model is a thousand short operations, and each that is shared out waits for its slowest thread.
On two cores one thread decoded faster than two for models of 0.2 to 7 million parameters, with 1 to 400 sequences at a
time (1.2 million parameters and 16 sequences: 3.0 ms a step against 4.6), and two were faster for 35 million.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARAMETERS_PER_THREAD = 10_000_000


@contextmanager
def generation_threads(threads: int | None, num_params: int) -> Iterator[None]:
    """PyTorch's threads while a model generates: None is one per 10 million parameters, no more than there were.

    On which cores they run is the process's matter (`kogia.cores`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or min(before, max(1, num_params // PARAMETERS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
