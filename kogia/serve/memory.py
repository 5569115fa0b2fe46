"""Memory that a large request has used goes back to the system when it has ended.

glibc's malloc keeps what is freed, for each thread its own: six threads that each have had a prompt of some megabytes
would hold a gigabyte between them for good.
"""

import ctypes

LARGE_BYTES = 256 << 10
"""Of a body: its values and tokens take a hundred times as much."""


def give_back() -> None:
    """Takes milliseconds, and belongs in a thread. Does nothing where malloc is not glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
