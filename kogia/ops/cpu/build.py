"""The kernels as a loaded library: compiled by the system's compiler when first needed, and kept in a cache directory.

A file of the cache is named after its sources and flags, written whole or not at all, and never changed: processes that
need it at the same time each compile it, and the last one to finish wins. Once there, it loads in a millisecond.

Where there can be none, the ops run in PyTorch, which is said once. `$KOGIA_CPU_KERNELS` names another instruction set
than the processor's best, or none.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from kogia import log

SOURCES = ("kernels.cpp", "simd.h")
LEVELS = {
    "AVX-512 with BF16": "avx2 fma avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16",
    "AVX-512": "avx2 fma avx512f avx512bw avx512vl avx512dq",
    "AVX2": "avx2 fma",
}
"""Instruction sets that there are kernels for, best first: what a processor needs, as Linux calls it."""
CHOICE, NONE = "KOGIA_CPU_KERNELS", "none"
_FLAGS = ("-O3", "-std=c++17", "-fno-strict-aliasing", "-fPIC", "-shared", "-fopenmp")
_COMPILERS = ("g++", "c++", "clang++")
_SECONDS = 300


def library() -> ctypes.CDLL:
    """The kernels for this processor. Raises ImportError where there can be none, with the reason."""
    found = _library()
    if isinstance(found, str):
        raise ImportError(found)
    return found


@cache
def _library() -> ctypes.CDLL | str:
    """The kernels, or why there are none: looked for once, whoever asks."""
    try:
        return load(level())
    except ImportError as error:
        if os.environ.get(CHOICE) != NONE:
            log.warn(f"no kernels for this CPU: {error}; PyTorch's own operations serve, which is slower")
        return str(error)


@cache
def level() -> str:
    """The one of `LEVELS` that $KOGIA_CPU_KERNELS names, by itself the best that this processor has. Raises ImportError
    where it has none, and ValueError for a name that is none of its own."""
    has, wanted = _processor_flags(), os.environ.get(CHOICE)
    usable = [name for name, needs in LEVELS.items() if has.issuperset(needs.split())]
    if wanted == NONE:
        raise ImportError(f"{CHOICE} = {NONE}")
    if wanted and wanted not in usable:
        raise ValueError(f"{CHOICE} = {wanted}: must be one of {', '.join((*usable, NONE))} on this processor")
    if not usable:
        raise ImportError("this processor has no AVX2, for which there are kernels")
    return wanted or usable[0]


def load(name: str) -> ctypes.CDLL:
    """The kernels for one of `LEVELS`, compiled unless the cache has them."""
    path = cache_directory() / f"cpu-{_key(name)}.so"
    if not path.exists():
        _compile(name, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the compiled kernels do not load: {error}; delete {path}") from error


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/kogia`, by default `~/.cache/kogia`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kogia"


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ImportError(f"the processor's instruction sets cannot be read: {error}") from error
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def _flags(name: str) -> list[str]:
    return [*_FLAGS, *("-m" + each.replace("_", "") for each in LEVELS[name].split())]


def _key(name: str) -> str:
    digest = hashlib.sha256(" ".join(_flags(name)).encode())
    for source in SOURCES:
        digest.update((Path(__file__).parent / source).read_bytes())
    return digest.hexdigest()[:16]


def _compile(name: str, path: Path) -> None:
    compiler = os.environ.get("CXX") or next((each for each in _COMPILERS if shutil.which(each)), None)
    if compiler is None:
        raise ImportError(f"there is no C++ compiler: install one of {', '.join(_COMPILERS)}, or name it in $CXX")
    log.info(f"compiling the kernels for this processor ({name}), once")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            command = [*compiler.split(), *_flags(name), str(Path(__file__).parent / SOURCES[0]), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise ImportError(f"{compiler} cannot compile the kernels: {lines[0] if lines else 'no message'}")
            os.replace(made, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImportError(f"the kernels cannot be compiled: {error}") from error
