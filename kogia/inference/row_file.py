"""Rows for a list of prompts on their way into a file, and what a resumed run keeps of them. Torch-free.

OUT grows in the order of the prompts. Rows of a prompt that is done before an earlier one wait in OUT.unfinished, which
also holds the settings that the rows were made with, and goes when OUT is whole.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from kogia import files, log
from kogia.files import check_target, is_replaceable, open_through, sync, writing
from kogia.train.lock import sole_writer

Rows = Sequence[Mapping[str, Any]]


@contextmanager
def open_rows(
    out: str, settings: Mapping[str, Any], *, num_prompts: int, per_prompt: int, resume: bool
) -> Iterator["RowFile"]:
    """The file to give `per_prompt` rows of every prompt to; with `resume`, with the rows of an interrupted run.

    Links are followed; what is no file of its own, as a pipe or /dev/stdout, is written to. Raises ValueError for rows
    of an interrupted run that would be lost, for none to go on with, where those were made with other settings, and
    where another run is writing.
    """
    check_target(out)
    path = Path(out)
    if not is_replaceable(path):
        if resume:
            raise ValueError(f"resume: {out} is no file that keeps anything; leave --resume out")
        with open_through(path) as file:
            yield RowFile(path, file, num_prompts, per_prompt)
        return
    path = path.resolve()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_of(path)
        unfinished.touch()
    with sole_writer(unfinished):
        try:
            notes = _begin(path, json.loads(json_line(settings)), per_prompt, resume=resume)
        finally:
            if not unfinished.stat().st_size:
                unfinished.unlink()
        with path.open("a", encoding="utf-8") as file:
            rows = RowFile(path, file, num_prompts, per_prompt, unfinished)
            rows.take_up(notes)
            yield rows


class RowFile:
    """Takes rows of the prompts in any order. Made by `open_rows`."""

    def __init__(
        self, path: Path, file: TextIO, num_prompts: int, per_prompt: int, unfinished: Path | None = None
    ) -> None:
        self.path, self.num_prompts, self.per_prompt = path, num_prompts, per_prompt
        self._file, self._unfinished = file, unfinished
        self._num_written = 0
        self._waiting: dict[int, Rows] = {}
        """By place, of prompts behind the first that has none yet."""
        self._opened = {} if unfinished is None else {each: each.stat() for each in (path, unfinished)}

    @property
    def is_kept(self) -> bool:
        """Whether a resumed run finds the rows again."""
        return self._unfinished is not None

    @property
    def left(self) -> list[int]:
        """Places of the prompts that have no rows yet."""
        return [place for place in range(self._num_written, self.num_prompts) if place not in self._waiting]

    def add(self, place: int, rows: Rows) -> None:
        """Take all rows of a prompt; they are in one of the files when this returns."""
        for path, opened in self._opened.items():
            log.check_in_place(path, opened)
        self._waiting[place] = rows
        if place == self._num_written:
            self._write_those_in_turn()
        elif self._unfinished is not None:
            _append(self._unfinished, {"place": place, "rows": rows})

    def finish(self) -> None:
        """Say that the file is whole."""
        assert not self.left, self.left
        if self._unfinished is not None:
            sync(self.path)
            self._unfinished.unlink()

    def take_up(self, notes: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind the rows that the file holds, with those that wait."""
        self._num_written = len(log.json_lines(self.path)) // self.per_prompt
        self._waiting = {note["place"]: note["rows"] for note in notes if note["place"] >= self._num_written}
        self._write_those_in_turn()

    def _write_those_in_turn(self) -> None:
        with writing(self.path):
            while self._num_written in self._waiting:
                self._file.writelines(map(json_line, self._waiting.pop(self._num_written)))
                self._num_written += 1
            self._file.flush()


def unfinished_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def json_line(row: Mapping[str, Any]) -> str:
    """What JSON has no form for, as dates of a parquet file, as text; half a surrogate pair as its escape."""
    return files.json_line(row, default=str)


def _begin(path: Path, settings: Mapping[str, Any], per_prompt: int, *, resume: bool) -> list[dict[str, Any]]:
    """Make both files ready to be appended to; returns the notes on rows that wait."""
    unfinished = unfinished_of(path)
    notes = _notes(unfinished, per_prompt)
    if not resume:
        if len(notes) > 1 or (notes and path.exists() and path.stat().st_size):
            raise ValueError(
                f"{path}: an interrupted run left rows there; --resume goes on with them; remove {unfinished} to begin "
                "anew"
            )
        for each in (unfinished, path):
            with writing(each):
                each.write_bytes(b"")
        _append(unfinished, {"settings": settings})  # last: a kill before it leaves nothing begun
        return []
    if not notes:
        raise ValueError(f"resume: nothing was begun in {path}; leave --resume out")
    _check_settings(path, notes[0][1]["settings"], settings)
    path.touch()
    rows = _whole_lines(path)
    _leave_only(path, rows[: len(rows) // per_prompt * per_prompt])
    _leave_only(unfinished, notes)
    return [note for _, note in notes[1:]]


def _notes(path: Path, per_prompt: int) -> list[tuple[bytes, dict[str, Any]]]:
    """The settings, then rows that wait, up to a line that a kill tore. ValueError where no settings begin it."""
    lines = _whole_lines(path)
    if lines and not isinstance(lines[0][1].get("settings"), dict):
        raise ValueError(f"{path}: is no record of an interrupted run; remove it to begin anew")
    return lines[:1] + list(itertools.takewhile(lambda line: _is_note(line[1], per_prompt), lines[1:]))


def _is_note(note: Mapping[str, Any], per_prompt: int) -> bool:
    match note:
        case {"place": int() as place, "rows": list() as rows}:
            return place >= 0 and len(rows) == per_prompt and all(isinstance(row, dict) for row in rows)
    return False


def _check_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"resume: {path} was begun with {name} = {before.get(name)!r}, and now it is {now.get(name)!r}; go on "
                f"with the same settings, or remove {unfinished_of(path)} to begin anew"
            )


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines up to the first that a kill tore."""
    pairs = itertools.takewhile(lambda pair: pair[1] is not None, log.json_lines(path))
    return [(line, value) for line, value in pairs if value is not None]


def _leave_only(path: Path, lines: Sequence[tuple[bytes, Any]]) -> None:
    """Cut a file back to its first lines, in place: it stays the file that is locked."""
    with writing(path), path.open("r+b") as file:
        file.write(b"".join(line + b"\n" for line, _ in lines))
        file.truncate()


def _append(path: Path, note: Mapping[str, Any]) -> None:
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json_line(note))
