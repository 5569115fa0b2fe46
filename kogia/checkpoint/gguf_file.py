"""The header of a GGUF file, llama.cpp's format: its metadata and where its tensors lie. Torch-free.

    magic "GGUF", version, number of tensors, number of metadata entries     (little endian)
    metadata    name, type, value; a text is its length and UTF-8, an array its type, length and items
    tensors     name, shape (the fastest axis first), type, offset from the begin of the data
    data        at the next multiple of `general.alignment`

The `gguf` library's reader maps the file and believes it: a length in it may ask for all the memory there is, or be
read beyond the end of the map. So the header is read here, each number held against what the file can hold, and the
library has the types of numbers (`kogia.checkpoint.gguf_tensors`).
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kogia.checkpoint.tensorfile import MAX_HEADER, is_name
from kogia.files import check_fetched

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 100_000
"""Metadata entries, and tensors; published files have about 50 and 1,100."""
MAX_ITEMS = 4_000_000
"""Items of all arrays together; the largest vocabularies have 262,144 tokens, with scores, types and merges."""
MAX_DIMS = 4
_FLOAT, _TEXT, _ARRAY = 6, 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_LEAST = {"tensors": 8 + 4 + 4 + 8, "metadata entries": 8 + 4 + 1}
"""Bytes of each: an empty name, a shape without axes, type and place; an empty name, a type, a value."""


@dataclass(frozen=True, slots=True)
class GGUFEntry:
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    """The slowest axis first, as numpy and torch write it: the file has it the other way round."""
    type: int
    """ggml's number of the type."""
    offset: int
    """Of its first byte in the file."""


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """What a header says. Numbers of metadata are Python's; an array is a list."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, GGUFEntry]
    size: int
    """Bytes of the file."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that calls itself GGUF, by its name or by its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as handle:
        return handle.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """The header of a file. Raises ValueError where it is cut, says what cannot be, or is of another version."""
    check_fetched(path)
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)  # opening a model asks for configuration, tokenizer and tensors one after the other
def _read(path: Path, size: int, changed: int) -> GGUFFile:
    with open(path, "rb", buffering=1 << 20) as handle:
        try:
            return _Reader(handle, size).file(path)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: no sound GGUF file ({error}); copy or download it again") from None


class _Reader:
    def __init__(self, handle: BinaryIO, size: int) -> None:
        self._handle, self._size, self._limit = handle, size, min(size, MAX_HEADER)
        self._at, self._num_items = 0, 0

    def file(self, path: Path) -> GGUFFile:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._whole("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read, little endian")
        num_tensors, num_entries = self._count("tensors"), self._count("metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            name = self._name(metadata)
            metadata[name] = self._value(name, self._whole("<I"))
        entries: dict[str, GGUFEntry] = {}
        for _ in range(num_tensors):
            name = self._name(entries)
            entries[name] = self._tensor(name)
        return self._placed(path, metadata, entries)

    def _placed(self, path: Path, metadata: dict[str, Any], entries: dict[str, GGUFEntry]) -> GGUFFile:
        """The file with offsets counted from its begin."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"general.alignment = {alignment!r:.50}; it must be 1 to {1 << 20:,} bytes")
        data = -(-self._at // alignment) * alignment
        placed = {e.name: GGUFEntry(e.name, e.shape, e.type, data + e.offset) for e in entries.values()}
        for entry in placed.values():
            if entry.offset > self._size:
                raise ValueError(f"{entry.name} begins at byte {entry.offset:,}, and the file has {self._size:,}")
        return GGUFFile(path, metadata, placed, self._size)

    def _take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self._limit - self._at:
            least = self._at + count
            if least <= self._size:
                raise ValueError(f"its header is longer than {MAX_HEADER:,} bytes")
            raise ValueError(f"it has {self._size:,} bytes, its header needs {least:,} at least")
        data = self._handle.read(count)
        if len(data) != count:
            raise ValueError("it became shorter while it was read")
        self._at += count
        return data

    def _whole(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self, what: str) -> int:
        count = self._whole("<Q")
        if count > MAX_ENTRIES:
            raise ValueError(f"it says it has {count:,} {what}; more than {MAX_ENTRIES:,} are not read")
        if count * _LEAST[what] > self._size:
            raise ValueError(f"it has {self._size:,} bytes, too few for the {count:,} {what} that it says it has")
        return count

    def _text(self) -> str:
        data = self._take(self._whole("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"a text that is no UTF-8, at byte {self._at - len(data):,}") from None

    def _name(self, taken: dict[str, Any]) -> str:
        name = self._text()
        if not is_name(name):
            raise ValueError(f"{name[:100]!r} is no name")
        if name in taken:
            raise ValueError(f"{name} is there twice")
        return name

    def _value(self, name: str, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            return self._array(name, self._whole("<I"), self._whole("<Q"))
        return self._numbers(name, kind, 1)[0]

    def _array(self, name: str, kind: int, count: int) -> list[Any]:
        self._num_items += count
        if self._num_items > MAX_ITEMS:
            raise ValueError(f"{name} has {count:,} items; more than {MAX_ITEMS:,} in all are not read")
        return [self._text() for _ in range(count)] if kind == _TEXT else self._numbers(name, kind, count)

    def _numbers(self, name: str, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError(
                f"{name} is of the unknown type {kind}; known are 0 to {max(_NUMBERS)}, and no arrays in arrays"
            )
        dtype = np.dtype(_NUMBERS[kind])
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if kind == _FLOAT and count == 1:  # the shortest number that rounds to it: 1e-05, not 9.999999747378752e-06
            return [float(str(values[0]))]
        return values.tolist()

    def _tensor(self, name: str) -> GGUFEntry:
        num_dims = self._whole("<I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"{name} has {num_dims} axes; a tensor has {MAX_DIMS} at most")
        shape = tuple(self._whole("<Q") for _ in range(num_dims))
        if any(not 1 <= length < 2**31 for length in shape):
            raise ValueError(f"{name} has the shape {list(shape)}; an axis has 1 to {2**31 - 1:,} numbers")
        return GGUFEntry(name, shape[::-1], self._whole("<I"), self._whole("<Q"))
