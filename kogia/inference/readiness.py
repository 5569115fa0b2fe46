"""How long a model took to be ready, stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Readiness:
    """Seconds by stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"ready after {sum(self.seconds.values()):.1f} s: {parts}"
