"""One writer per output. The lock is advisory, and the kernel drops it with the process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sole_writer(path: Path, *, make: bool = False) -> Iterator[None]:
    """Hold the lock of a directory, or of a file, that exists or is a file to `make`. ValueError if another run has it.

    The lock is on the place itself: no file is left there, other names of it (links) do not get around it, and what a
    directory holds may be deleted meanwhile, a file renamed. Where the file system has no locks nothing is held.
    """
    descriptor = _locked(path, make)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, make: bool) -> int:
    """The descriptor that holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT if make else os.O_RDONLY, 0o666)
        try:
            _lock(descriptor, path)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another run was done with it, and put it elsewhere, before it was locked


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{str(path)!r}: another run is writing there; wait until it ends, stop it, or name another out"
        ) from None
    except OSError:
        return  # a file system without locks
