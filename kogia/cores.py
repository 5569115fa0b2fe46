"""The processor's cores: which of them this process may use, and keeping it to some. Torch-free.

A mask for the whole process is what is kept. OpenMP can bind each thread to a core of its own (OMP_PROC_BIND=true),
which helps beside a busy program (`benchmarks/cores.py`); but it binds the main thread too, and with it every process
that this one starts, as those that verify answers.
"""

import os
import sys


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may run on; where the system has no such bound, of all."""
    if hasattr(os, "sched_getaffinity") and not _is_bound():
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _is_bound() -> bool:
    """Whether OpenMP, once it is there, has bound this thread, whose mask then tells nothing of the process."""
    asked = os.environ.get("OMP_PROC_BIND", "").lower() not in ("", "false") or "GOMP_CPU_AFFINITY" in os.environ
    return asked and "torch" in sys.modules


def keep_to_cores(text: str) -> None:
    """Keep this thread and all that it starts from now on, threads and processes, to cores as "0-3,8" names them.

    To be called before torch is loaded, which then starts no more threads than these cores. Raises ValueError for a
    text that is no such list and for cores that are not there.
    """
    usable = usable_cores()
    try:
        wanted = {core for part in text.split(",") for core in _span(part)}
    except ValueError:
        raise ValueError(f"--cores {text}: give numbers and spans of cores, as 0-3,8") from None
    if not wanted <= set(usable):
        raise ValueError(
            f"--cores {text}: this process may use {_listed(usable)}, not {_listed(sorted(wanted - set(usable)))}"
        )
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"--cores {text}: this system cannot keep a process to cores; leave it out")
    os.sched_setaffinity(0, wanted)


def check_threads(threads: int | None) -> None:
    """Raise ValueError for a number of threads that would share cores; None, which stands for a default, is not."""
    cores = usable_cores()
    if threads is not None and not 1 <= threads <= len(cores):
        raise ValueError(
            f"threads = {threads}: this process may use {len(cores)} core{'s' if len(cores) > 1 else ''} "
            f"({_listed(cores)}); give 1 to {len(cores)}, or leave it out"
        )


def _span(part: str) -> range:
    first, dash, last = part.partition("-")
    span = range(int(first), int(last if dash else first) + 1)
    if not (first.isdecimal() and (last.isdecimal() or not dash) and span) or span.stop > 1 << 20:
        raise ValueError(part)
    return span


def _listed(cores: list[int]) -> str:
    """Sorted numbers, as "0-3,8"."""
    spans: list[list[int]] = []
    for core in cores:
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
