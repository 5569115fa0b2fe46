"""One writer per output. The lock is advisory, and the kernel drops it with the process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the lock of a directory, or of a file, that exists. Raises ValueError if another run holds it.

    The lock is on the place itself: no file is left there, other names of it (links) do not get around it, and what a
    directory holds may be deleted meanwhile. Where the file system has no locks nothing is held.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{str(path)!r}: another run is writing there; wait until it ends, stop it, or name another out"
        ) from None
    except OSError:
        return  # a file system without locks
