"""Files and directories that stand under their name complete or not at all, also after a power cut. Torch-free.

What is written goes to a draft beside its target, `.NAME.<16 hex digits>.tmp`, is fsynced and renamed. The digits are
drawn anew for every draft: in containers all processes may have one id. A writer holds a lock on its draft, which the
kernel drops with the process, so a draft that nobody holds was left by a killed one, and the next writer of the same
target removes it. Nothing else beside the target is touched.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_DESCRIPTORS = ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")
_MOST_LINKS = 40  # as Linux follows in one path
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
DRAFT, ASIDE = ".tmp", ".old"
"""Ends of the names of a draft and of the directory that it replaces, until the draft stands in its place."""


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as `as_json` has it, as `write_text` does."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """Indented JSON. Half of a surrogate pair, which UTF-8 cannot hold, stays the escape that it was read from."""
    return _whole(json.dumps(value, indent=2, ensure_ascii=False)) + "\n"


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """The same on one line. `default` is for what JSON has no form for."""
    return _whole(json.dumps(value, ensure_ascii=False, default=default)) + "\n"


def _whole(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_text(path: str | Path, text: str) -> None:
    """Write `text`; the file has the old or the new content at any time. Parents are made.

    Links are followed: the file they lead to is replaced. What is no file, as a terminal, pipe or device, is written
    to, and so is what is already open, as /dev/stdout, wherever the shell sends it: behind what was written there
    before. ValueError as `check_target` says.
    """
    path = Path(path)
    check_target(path)
    if not is_replaceable(path):
        with open_through(path) as file, writing(path):
            file.write(text)
        return
    path = path.resolve()
    with _draft(path, Path.touch) as draft, writing(path):
        draft.write_text(text, encoding="utf-8")
        put_in_place(draft, path)


def check_fetched(path: str | Path) -> None:
    """Raise ValueError for what Git LFS leaves in the place of a file that it has not fetched: three lines of text."""
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path}: stands for a file that Git LFS has not fetched; `git lfs pull` brings it")


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_target(path: str | Path) -> None:
    """Raise ValueError for a place that no text can be written to, which is best known before it is made."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name a file, in it or elsewhere")
    if path.is_block_device():
        raise ValueError(f"{path}: is a disk, whose content would be lost; name a file")
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path}: is a link that leads back to itself; name a file") from None


def is_replaceable(path: Path) -> bool:
    """Whether a path names a file, or what may become one: no device or pipe, and nothing that is open already."""
    return _descriptor(path) is None and (path.is_file() or not path.exists())


def check_directory(path: str | Path) -> None:
    """Raise ValueError unless `path` is a directory that may be written to, or one could be made there."""
    path = Path(path)
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"{path}: {there} is a file, where a directory is needed; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: {there} may not be written to; name another place, or change its permissions")


def put_in_place(draft: Path, path: Path) -> None:
    """Let a finished file take the place of `path`."""
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)  # the rename itself must survive a power cut


@contextmanager
def replacing_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into that takes the place of `directory` when the block ends well, and else vanishes.

    At every moment, also after a kill, it is the old or the new one; where the system cannot exchange two directories
    at once, a kill between two renames leaves it away until the next call puts it back.
    Links are followed: what they lead to is replaced. Parents are made. Files need not be synced by the caller.
    """
    directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file where a directory is to be written; name another place, or remove it")
    _put_back(directory)
    with _draft(directory, Path.mkdir) as draft:
        yield draft
        with writing(directory):
            _sync_tree(draft)
        _swap(draft, directory)
        _remove_replaced(directory)


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """An empty file to write that takes the place of `file` when the block ends well, and else vanishes."""
    file = file.resolve()
    check_target(file)
    with _draft(file, Path.touch) as draft:
        yield draft
        with writing(file):
            put_in_place(draft, file)


def remove_stale_drafts(directory: Path, name: str | None = None) -> None:
    """Remove the drafts of killed writers from `directory`: of the target `name`, or with None of every target.

    Where the file system has no locks nobody can tell whether a writer lives, and they stay.
    """
    for draft in _siblings(directory, name, DRAFT):
        with suppress(OSError):  # gone by now, or another user's
            descriptor = os.open(draft, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(draft)
            finally:
                os.close(descriptor)


def is_draft(path: Path, name: str) -> bool:
    """Whether `path` is called as a draft of the target `name` is."""
    return _called(name, DRAFT).fullmatch(path.name) is not None


def empty_directory(directory: Path, last: str) -> None:
    """Delete all that a directory holds; the directory stays, for its lock.

    `last`, by which its kind is known, goes at the end: if this is killed, what is left may be emptied again.
    """
    for path in sorted(directory.iterdir(), key=lambda path: path.name == last):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Have a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Words an OSError for the user: what could not be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some disk space" if full else "check the place and its permissions"
        reason = error.strerror or error
        raise OSError(error.errno, f"{path}: could not be written ({reason}); {fix}") from None


@contextmanager
def open_through(path: Path) -> Iterator[TextIO]:
    """What is no file of its own, to be written to. The position in an open one is shared: nothing is overwritten."""
    number = _descriptor(path)
    if sys.stdout is not None:
        sys.stdout.flush()  # what was printed before comes first
    with writing(path):
        file = open(path if number is None else os.dup(number), "w", encoding="utf-8")  # noqa: SIM115 - closed below
    with file:
        yield file


def _descriptor(path: Path) -> int | None:
    """The number of the open file of this process that a path names, through any links; None where it names none."""
    places = {Path(place).resolve() for place in _DESCRIPTORS}
    for _ in range(_MOST_LINKS):
        parent = path.parent.resolve()
        if parent in places and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = parent / path.readlink()
    return None


@contextmanager
def _draft(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new draft of `target`, locked; gone when the block ends unless it was renamed."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_drafts(target.parent, target.name)
        draft, lock = _make_locked(target, make)
    try:
        yield draft
    finally:
        _remove(draft)
        os.close(lock)


def _make_locked(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """(a new draft, the descriptor that holds its lock)."""
    while True:
        draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}{DRAFT}")
        make(draft)
        with suppress(FileNotFoundError):  # another writer took it for a stale one before it was locked
            lock = os.open(draft, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if draft.exists():
                return draft, lock
            os.close(lock)


def exchange(a: Path, b: Path) -> bool:
    """Let two paths of one file system swap their names in one step; False where the system cannot do that."""
    if _libc is None or not hasattr(_libc, "renameat2"):
        return False
    return _libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _swap(draft: Path, directory: Path) -> None:
    """Give `draft` the name of `directory`, and what stood there the draft's name, or one aside."""
    aside = draft.with_suffix(ASIDE)
    if directory.exists():
        if exchange(draft, directory):
            return sync(directory.parent)
        os.replace(directory, aside)
    try:
        os.replace(draft, directory)
    except OSError:
        if aside.exists():
            os.replace(aside, directory)
        raise
    sync(directory.parent)


def _put_back(directory: Path) -> None:
    """Undo a swap in two steps that was killed between them: what was replaced takes its name again."""
    if not directory.parent.is_dir() or os.path.lexists(directory):
        return
    for aside in _siblings(directory.parent, directory.name, ASIDE):
        os.replace(aside, directory)
        return


def _remove_replaced(directory: Path) -> None:
    """Remove what stands aside, also of a writer that was killed while swapping: the name is taken again."""
    for aside in _siblings(directory.parent, directory.name, ASIDE):
        if not aside.with_suffix(DRAFT).exists():  # else another writer is just swapping, and may need it
            _remove(aside)


def _siblings(directory: Path, name: str | None, end: str) -> list[Path]:
    return [path for path in directory.iterdir() if _called(name, end).fullmatch(path.name)]


def _called(name: str | None, end: str) -> re.Pattern[str]:
    return re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{16}}{re.escape(end)}", re.DOTALL)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
