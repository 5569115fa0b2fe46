"""Compiling kernels before they are needed, many at a time: one after the other they keep an engine waiting for most of
a minute, and most of that is one core's work."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton import AsyncCompileMode, knobs

from kogia.ops.triton.common import counters

MOST_THREADS = 16
"""Beyond that the parts of the compiler that are Python hold one another up."""


def compile_ahead(rehearse: Callable[[], object]) -> int:
    """Compile what `rehearse` would launch and is not compiled yet; returns how many kernels that were.

    Meanwhile those are not launched, so that what is computed is of no use: nothing may depend on it. As the work of a
    graph that is recorded and thrown away it runs nowhere. What kernels keep for good is made before.
    """
    counters(torch.device("cuda", torch.cuda.current_device()), 1)
    with _noted() as found:
        rehearse()
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), initializer=_use, initargs=_device()) as threads:
        with AsyncCompileMode(threads):
            kernels = [function.preload(variant) for function, variant in found]
        done = [getattr(kernel, "kernel", None) or kernel for kernel in kernels]
        list(threads.map(lambda kernel: kernel.run, done))  # what launches it is compiled too, and all of it is loaded
    return len(found)


@contextmanager
def _noted() -> Iterator[dict[tuple[Any, str], None]]:
    """Within the block, launches of kernels that are not compiled are noted instead: the function, and which variant as
    Triton writes it down."""
    found: dict[tuple[Any, str], None] = {}
    here = threading.get_ident()

    def note(*, fn: Any, compile: Any, is_manual_warmup: bool, **_: Any) -> bool:
        if is_manual_warmup or threading.get_ident() != here:  # not a launch, or somebody else's
            return False
        found[fn.jit_function, compile["specialization_data"]] = None
        return True  # which Triton takes for "somebody has done it", and launches nothing

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def _device() -> tuple[int]:
    return (torch.cuda.current_device(),)


def _use(device: int) -> None:
    torch.cuda.set_device(device)
