"""The safetensors file, read and written piece by piece: nothing is mapped, held whole or executed. Torch-free.

    8 bytes   length of the header, little endian
    header    JSON: name -> {"dtype", "shape", "data_offsets"}, padded with spaces
    data      the tensors in row-major order, back to back

Reading goes straight into the memory it is meant for. A mapping would count every touched page of the file as resident.
"""

import ctypes
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kogia.files import check_fetched, writing

FP8 = "F8_E4M3"
MAX_HEADER = 100_000_000
"""Bytes; the bound of the format's own library."""
PIECE = 1 << 19
"""Elements that are read, converted and written at a time: about a MiB, so that each step finds them in the processor's
cache and the memory of the piece before is used again."""
BLOCK_ROWS = 128
"""Pieces are cut at whole FP8 blocks."""
NUM_THREADS = 4
_MAX_NAME = 500

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
# As signed integers, the bit patterns of NaN and infinity are the largest ones; likewise the negative ones unsigned.
_NOT_FINITE = {
    "F8_E4M3": ("i1", 0x7F),
    "F16": ("i2", 0x7C00),
    "BF16": ("i2", 0x7F80),
    "F32": ("i4", 0x7F80_0000),
    "F64": ("i8", 0x7FF0_0000_0000_0000),
}

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

Spec = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor to be written."""
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies on disk."""

    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte in the file."""

    @property
    def num_rows(self) -> int:
        """Length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape[1:])

    @property
    def nbytes(self) -> int:
        return num_bytes(self.dtype, self.shape)

    @property
    def stored_type(self) -> str:
        """What the file calls its type, where that is another one than it is read in."""
        return self.dtype

    @property
    def stored_bytes(self) -> int:
        return self.nbytes

    def read_into(self, row: int, into: memoryview) -> None:
        """Fill `into` with the numbers from `row` on. Other threads run meanwhile."""
        self.read_bytes(row * self.row_bytes, into)

    def read_bytes(self, place: int, into: memoryview) -> None:
        """Fill `into` with what the file has from byte `place` of the tensor on."""
        with open(self.file, "rb", buffering=0) as handle:
            handle.seek(self.offset + place)
            while into:
                count = handle.readinto(into)
                if not count:
                    raise _damaged(self.file, f"it ends within {self.name}")
                into = into[count:]


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _ITEM_BYTES[dtype]


def row_ranges(tensor: StoredTensor, num_pieces: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of rows of about `num_pieces` * PIECE elements each; none for an empty tensor."""
    if tensor.nbytes:
        step = max(1, num_pieces * PIECE // (math.prod(tensor.shape[1:]) * BLOCK_ROWS)) * BLOCK_ROWS
        for start in range(0, tensor.num_rows, step):
            yield start, min(start + step, tensor.num_rows)


def read_header(file: Path, max_bytes: int = MAX_HEADER) -> list[StoredTensor]:
    """The tensors of a file. Raises ValueError where it is damaged: every byte must belong to exactly one tensor.

    A header over `max_bytes`, which is what the model at hand can need, is refused unread: its entries take sixteen
    times as much memory as text.
    """
    check_fetched(file)
    try:
        with open(file, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its {size} bytes cannot hold a header of {length}")
            if length > max_bytes:
                raise ValueError(f"its header has {length:,} bytes, config.json's model needs {max_bytes:,} at most")
            entries = json.loads(handle.read(length))
        tensors = [_parse(name, e, file, 8 + length) for name, e in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, error) from None
    end = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise _damaged(file, f"{tensor.name} begins at byte {tensor.offset}, the tensor before it ends at {end}")
        end += tensor.nbytes
    if end != size:
        raise _damaged(file, f"it has {size} bytes, its header describes {end}")
    return tensors


def is_name(text: str) -> bool:
    """Whether a tensor may be called so: messages show it, and signs that steer a terminal have no place in a name."""
    return text.isprintable() and 0 < len(text) <= _MAX_NAME


def _parse(name: str, entry: Any, file: Path, data: int) -> StoredTensor:
    if not is_name(name):
        raise ValueError(f"{name[:_MAX_NAME]!r} is no name of a tensor")
    if entry["dtype"] not in _ITEM_BYTES:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']!r}")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name} has the shape {entry['shape']} and offsets {entry['data_offsets']}")
    tensor = StoredTensor(name, entry["dtype"], shape, file, data + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name} {list(shape)} of {tensor.dtype} takes {tensor.nbytes} bytes, not {end - begin}")
    return tensor


def _damaged(file: Path, reason: object) -> ValueError:
    return ValueError(f"{file}: damaged or truncated ({reason}); copy or download it again")


def populate(memory: memoryview) -> None:
    """Have fresh memory brought in at once, which takes a third off the time of reading into it page by page.

    A hint: where the kernel does not know it (before Linux 5.14), the pages come as they are written.
    """
    if _libc is not None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        begin, end = -(-address // mmap.PAGESIZE), (address + len(memory)) // mmap.PAGESIZE  # whole pages
        if begin < end:
            place, size = ctypes.c_void_p(begin * mmap.PAGESIZE), ctypes.c_size_t((end - begin) * mmap.PAGESIZE)
            _libc.madvise(place, size, _MADV_POPULATE_WRITE)


def create(file: Path, tensors: Iterable[Spec]) -> list[StoredTensor]:
    """Write the header of a new file; the data of the returned tensors is then written in any order."""
    # widest elements first, so that each tensor is aligned to its element: some readers map the file
    ordered = sorted(tensors, key=lambda spec: -_ITEM_BYTES[spec[1]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    planned, end = [], 0
    for name, dtype, shape in ordered:
        planned.append(StoredTensor(name, dtype, shape, file, end))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + planned[-1].nbytes]}
        end += planned[-1].nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(file), open(file, "xb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
    return [StoredTensor(t.name, t.dtype, t.shape, file, 8 + len(text) + t.offset) for t in planned]


def write(tensor: StoredTensor, row: int, data: memoryview) -> None:
    """Write the bytes `data` at `row` of a tensor that `create` has laid out."""
    with writing(tensor.file), open(tensor.file, "r+b", buffering=0) as handle:
        handle.seek(tensor.offset + row * tensor.row_bytes)
        while data:
            data = data[handle.write(data) :]


def has_nonfinite(dtype: str, data: memoryview) -> bool:
    """Whether data, not empty, holds NaN or infinity, which integers cannot. Exact, and as fast as memory is read."""
    if dtype not in _NOT_FINITE:
        return False
    kind, least = _NOT_FINITE[dtype]
    signed = np.frombuffer(data, kind)
    unsigned = signed.view(kind.replace("i", "u"))
    return bool(signed.max() >= least) or bool(unsigned.max() >= least + (1 << 8 * signed.itemsize - 1))


def in_parallel(run: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Results of `run` on a few threads, in order. The first error is raised and what has not begun is given up."""
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        yield from pool.map(run, jobs)
    finally:
        pool.shutdown(cancel_futures=True)
