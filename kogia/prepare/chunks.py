"""Sources cut into chunks, the units of work that a kill loses at most: the same chunks whenever they are cut.

Files are read here, by one process, and their documents sent on. A generator that takes `num` and `seed` is called
once per chunk, in the worker, each time with a seed of its own, so that it runs on all cores.
"""

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kogia.config import resolve, to_dict
from kogia.data.config import is_of_files
from kogia.data.rows import Document
from kogia.data.shards import digest
from kogia.data.sources import read_source, source_files
from kogia.prepare.config import PreparedSource
from kogia.prepare.part import to_json

CHUNK_BYTES = 4 << 20
CHUNK_DOCUMENTS = 4096
GENERATED_BYTES = 500
"""Taken for the size of a generated document, to reckon with before there is one."""


@dataclass(frozen=True)
class Chunk:
    """A unit of work."""

    number: int
    """Within its source."""
    load: dict[str, Any]
    """What a worker is asked, beside the level of deduplication."""


def chunks(source: PreparedSource) -> Iterator[Chunk]:
    """Raises ValueError as `read_source` does."""
    if is_divisible(source):
        yield from _calls(source)
        return
    documents: list[Document] = []
    size, number = 0, 0
    for document in read_source(source):
        documents.append(document)
        size += len(document.text)
        if size >= CHUNK_BYTES or len(documents) >= CHUNK_DOCUMENTS:
            yield _of_documents(number, documents)
            documents, size, number = [], 0, number + 1
    if documents:
        yield _of_documents(number, documents)


def is_divisible(source: PreparedSource) -> bool:
    """Whether it is a generator that may be called for any number of documents with any seed."""
    if source.num is None or is_of_files(source.spec) or ":" not in source.spec:
        return False
    return {"num", "seed"} <= inspect.signature(resolve(source.spec)).parameters.keys()


def _calls(source: PreparedSource) -> Iterator[Chunk]:
    assert source.num is not None
    for number, first in enumerate(range(0, source.num, CHUNK_DOCUMENTS)):
        seed = int(digest(f"{source.seed} {number}"), 16) % 2**32
        call = replace(source, num=min(CHUNK_DOCUMENTS, source.num - first), seed=seed)
        yield Chunk(number, {"source": to_dict(call)})


def _of_documents(number: int, documents: list[Document]) -> Chunk:
    return Chunk(number, {"documents": [to_json(document) for document in documents]})


def source_bytes(source: PreparedSource) -> int:
    """Bytes of its files as they are on disk; of a generator, about those of its texts."""
    if not is_of_files(source.spec):
        return GENERATED_BYTES * (source.num or 1000)
    return sum(os.path.getsize(Path(file).expanduser()) for file in source_files(source))


TEXT_PER_BYTE: dict[str, float] = {".gz": 3.0, ".parquet": 3.0}


def text_bytes(source: PreparedSource) -> int:
    """About how many bytes of text come out of it."""
    if not is_of_files(source.spec):
        return source_bytes(source)
    files = [Path(file).expanduser() for file in source_files(source)]
    return int(sum(os.path.getsize(file) * TEXT_PER_BYTE.get(file.suffix, 1.0) for file in files))
