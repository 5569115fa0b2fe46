"""Generators of documents, in a module that a worker imports at once."""

import random
from collections.abc import Iterator


def tales(num: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    yield from (" ".join(f"w{draw.randrange(10**6)}" for _ in range(20)) for _ in range(num))


def broken(num: int, seed: int) -> Iterator[str]:
    yield from tales(3, seed)
    raise RuntimeError("the dragon ate it")
