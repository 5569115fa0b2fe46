"""Documents from files and generators, one at a time, before any tokenisation."""

import glob
import gzip
import importlib
import inspect
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from kogia.config import resolve
from kogia.data.config import HUB, SourceConfig, file_kind, is_of_files
from kogia.data.hub import find_dataset
from kogia.data.rows import Document, document_from_row
from kogia.files import check_fetched

Row = tuple[str, Any]
"""Where it stands, and what it holds."""


def read_source(source: SourceConfig) -> Iterator[Document]:
    """The documents of one source in a fixed order, at most `source.num`.

    Raises ValueError naming file, line and rule for a row that is no document.
    """
    rows = read_rows(source) if is_of_files(source.spec) else _read_generator(source)
    for index, (where, row) in enumerate(rows):
        if source.num is not None and index >= source.num:
            return
        if source.template is not None:
            row = _filled(source.template, row, where)
        document = document_from_row(row, where, source.text_key)
        yield document if source.replies == "all" else replace(document, learned=())


def _filled(template: str, row: Any, where: str) -> str:
    """The template with the values of a row's columns in the place of their names in braces; other braces stay."""

    def value(name: re.Match[str]) -> str:
        found = row.get(name[1]) if isinstance(row, dict) else None
        if found is None:
            told = f"only {sorted(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(f"{where}: template {template!r} needs the column {name[1]!r}; there is {told}")
        return str(found)

    return re.sub(r"\{(\w+)\}", value, template)


def has_document(source: SourceConfig) -> bool:
    """Whether there is anything in it. Raises ValueError as reading its first row does."""
    return next(read_source(source), None) is not None


def source_files(source: SourceConfig) -> list[str]:
    """The files of a source that is one of files, in the order in which they are read: that of their names.

    ValueError where there is none.
    """
    if source.spec.startswith(HUB):
        return find_dataset(source.spec)
    path = Path(source.spec).expanduser()
    if path.is_file():
        return [source.spec]
    places = glob.glob(str(path), recursive=True)
    found = sorted(place for place in places if file_kind(place) and Path(place).is_file())
    if not found:
        what = "no file of this pattern" if glob.has_magic(source.spec) else "no such file"
        raise ValueError(f"data source {source.spec!r}: {what} (looked in {_nearest(path)})")
    return found


def _nearest(path: Path) -> Path:
    """The folder in which a pattern begins."""
    parents = path.absolute().parents
    return next(place for place in parents if not glob.has_magic(str(place)))


def read_rows(source: SourceConfig) -> Iterator[Row]:
    """The rows of a source of files, before anything is made of them."""
    for file in source_files(source):
        yield from read_file_rows(source, file)


def read_file_rows(source: SourceConfig, file: str) -> Iterator[Row]:
    """The rows of one of its files."""
    readers = {".txt": _read_text, ".jsonl": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet}
    path = Path(file).expanduser()
    check_fetched(path)
    yield from readers[file_kind(file)](replace(source, spec=file), path)


def read_text(spec: str) -> str:
    """All of a text file, .gz or not. Raises ValueError that names the line of what is no UTF-8, or OSError."""
    return "".join(line for _, line in _lines(spec, Path(spec).expanduser()))


def _read_text(source: SourceConfig, path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(source.spec, path))
    pieces = text.split(source.separator) if source.separator else [text]
    yield from ((f"{source.spec}, document {i}", piece) for i, piece in enumerate(pieces, start=1) if piece.strip())


def _read_json_lines(source: SourceConfig, path: Path) -> Iterator[Row]:
    for where, line in _lines(source.spec, path):
        if line.strip():
            yield where, _parse_json(line, where, "a .jsonl file holds one JSON object per line")


def _read_json(source: SourceConfig, path: Path) -> Iterator[Row]:
    rule = "a .json file holds one list of rows"
    rows = _parse_json("".join(line for _, line in _lines(source.spec, path)), source.spec, rule)
    if not isinstance(rows, list):
        raise ValueError(f"{source.spec}: holds a {type(rows).__name__}; {rule}")
    yield from ((f"{source.spec}, row {i}", row) for i, row in enumerate(rows, start=1))


def _read_parquet(source: SourceConfig, path: Path) -> Iterator[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"data source {source.spec!r}: reading parquet takes pyarrow; pip install 'kogia[parquet]'"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{source.spec}, row {number}", row
    except (ValueError, OSError) as error:  # pyarrow's own errors are one or the other
        raise ValueError(f"{source.spec}, after row {number}: not readable as parquet ({error})") from error


def _lines(spec: str, path: Path) -> Iterator[tuple[str, str]]:
    """Lines with their ends as they are, each with its place, without a byte order mark before the first."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                text = _decode(line, f"{spec}, line {number}")
                yield f"{spec}, line {number}", text.removeprefix("\ufeff") if number == 1 else text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{spec}, after line {number}: damaged or cut off ({error}); copy the file again") from error


def _open(path: Path) -> BufferedIOBase:
    return gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start} is 0x{line[error.start]:02x}, which is no UTF-8; save the file as UTF-8"
        ) from None


def _parse_json(text: str, where: str, rule: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long and nesting too deep for Python
        raise ValueError(f"{where}: not JSON ({error}); {rule}") from error


def _read_generator(source: SourceConfig) -> Iterator[Row]:
    if ":" not in source.spec:
        raise ValueError(
            f"data source {source.spec!r}: neither a file (.txt, .jsonl, .json, each also .gz, or .parquet) nor a "
            "generator `module:function`, nor a directory that `kogia prepare` has written"
        )
    function = resolve(source.spec)
    arguments = _generator_arguments(function, source)
    for index, item in enumerate(function(**arguments)):
        yield f"{source.spec}, item {index}", item


def _generator_arguments(function: Callable[..., Any], source: SourceConfig) -> dict[str, Any]:
    """The options, and `num` and `seed` where the function takes them. ValueError with its signature if they misfit."""
    signature = inspect.signature(function)
    own = {"seed": source.seed} | ({} if source.num is None else {"num": source.num})
    arguments = {name: value for name, value in own.items() if name in signature.parameters} | source.options
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"data source {source.spec!r}: cannot call it with {sorted(arguments)} ({error}); it is "
            f"{source.spec.rpartition(':')[2]}{signature}"
        ) from error
    return arguments
