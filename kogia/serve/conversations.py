"""Conversations of the chat page on the server's disk, a file each, apart for every owner of a key.

What a file holds belongs to the page; the server reads no more than its first line, which says what a list shows. Every
writing names the revision that it changes, so that of two tabs with one conversation neither overwrites the other.
"""

import errno
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kogia import log
from kogia.files import check_directory, json_line, write_text
from kogia.serve.config import ServeConfig
from kogia.serve.errors import ApiError, shown

MOST_CONVERSATIONS = 5000
"""Of one owner."""
MOST_HEAD_BYTES = 4096
MOST_TITLE = 200
_ID = re.compile(r"[0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Head:
    """The first line of a file."""

    id: str
    revision: int
    """How often it was written."""
    title: str
    updated: float
    """As the page has it, in milliseconds since 1970."""


class ConversationStore:
    """A directory with a folder per owner."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        """Raises ValueError for a place that cannot be written to."""
        check_directory(root)
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root, self._most_bytes = root, most_bytes
        self._lock = threading.Lock()

    @classmethod
    def of(cls, config: ServeConfig) -> "ConversationStore | None":
        if config.store is None:
            return None
        return cls(Path(config.store).expanduser(), config.store_megabytes * 10**6)

    def heads(self, owner: str) -> list[dict[str, Any]]:
        """What there is, the latest first; files that are none are passed over, with a line in the log."""
        found = []
        for path in self._files(owner):
            with suppress(FileNotFoundError):  # deleted meanwhile
                head = _read_head(path)
                if head is not None:
                    found.append({**asdict(head), "bytes": path.stat().st_size})
        return sorted(found, key=lambda each: -each["updated"])

    def read(self, owner: str, id: str) -> dict[str, Any]:
        """{revision, conversation}. Raises 404 where there is none."""
        path = self._path(owner, id)
        with suppress(FileNotFoundError), _damage_told(path):
            head, _, rest = path.read_text(encoding="utf-8").partition("\n")
            return {"revision": Head(**json.loads(head)).revision, "conversation": json.loads(rest)}
        raise ApiError(f"{id}: no such conversation is kept here", 404, param="id")

    def write(self, owner: str, id: str, revision: int, conversation: dict[str, Any]) -> int:
        """Put a conversation in the place of its `revision`, 0 for a new one; returns the next. Raises 409 where
        another one stands there, 507 where there is no room."""
        path, (title, updated) = self._path(owner, id), _told(id, conversation)
        with self._lock:
            head = _read_head(path) if path.exists() else None
            stands = 0 if head is None else head.revision
            if stands != revision:
                raise ApiError(
                    f"revision = {revision}: {stands} stands here; read it, and write what both make",
                    409,
                    param="revision",
                    code="revision_conflict",
                )
            text = json_line(asdict(Head(id, revision + 1, title, updated))) + json_line(conversation)
            self._check_room(owner, path, len(text.encode()))
            with _room_on_disk():
                path.parent.mkdir(mode=0o700, exist_ok=True)
                write_text(path, text)
        return revision + 1

    def remove(self, owner: str, id: str) -> None:
        """Raises 404 where there is none."""
        try:
            self._path(owner, id).unlink()
        except FileNotFoundError:
            raise ApiError(f"{id}: no such conversation is kept here", 404, param="id") from None

    def export(self, owner: str) -> Iterator[str]:
        """All of them, in the format that the page exports and imports, piece by piece."""
        between = '{"format": "kogia-conversations", "version": 1, "conversations": ['
        for head in self.heads(owner):
            with suppress(ApiError):  # deleted meanwhile
                yield between + "\n" + json_line(self.read(owner, head["id"])["conversation"]).rstrip("\n")
                between = ","
        yield ("" if between == "," else between) + "\n]}\n"

    def _folder(self, owner: str) -> Path:
        """Whatever an owner is called, the name of the folder is made of digits."""
        return self._root / sha256(owner.encode()).hexdigest()[:32]

    def _path(self, owner: str, id: str) -> Path:
        if _ID.fullmatch(id) is None:
            raise ApiError(f"id = {shown(id)}: must be 32 hexadecimal digits", param="id")
        return self._folder(owner) / f"{id}.json"

    def _files(self, owner: str) -> list[Path]:
        with suppress(FileNotFoundError):
            return [
                path for path in self._folder(owner).iterdir() if _ID.fullmatch(path.stem) and path.suffix == ".json"
            ]
        return []

    def _check_room(self, owner: str, path: Path, size: int) -> None:
        """Raise 507 where a file of `size` bytes in this place would be too much."""
        others = [each for each in self._files(owner) if each != path]
        if len(others) >= MOST_CONVERSATIONS:
            raise ApiError(f"{MOST_CONVERSATIONS} conversations are kept here, the most: delete some", 507)
        if sum(each.stat().st_size for each in others) + size > self._most_bytes:
            raise ApiError(f"conversations may take {self._most_bytes // 10**6} MB here: delete some", 507)


def _told(id: str, conversation: dict[str, Any]) -> tuple[str, float]:
    """(title, time of the last change) of a conversation. Raises 400 where it is none."""
    title, updated = conversation.get("title"), conversation.get("updated")
    if conversation.get("id") != id:
        raise ApiError(f"conversation.id = {shown(conversation.get('id'))}: must be that of the address", param="id")
    if not isinstance(title, str) or isinstance(updated, bool) or not isinstance(updated, int | float):
        raise ApiError("conversation: must have a title, a text, and updated, a number", param="conversation")
    if not isinstance(conversation.get("nodes"), dict):
        raise ApiError("conversation.nodes: must be an object", param="conversation")
    return title[:MOST_TITLE], float(updated)


def _read_head(path: Path) -> Head | None:
    """None of a file that is no conversation."""
    with _damage_told(path), path.open("rb") as file:
        return Head(**json.loads(file.readline(MOST_HEAD_BYTES)))
    return None


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Passes over what the block finds to be no conversation, with a line in the log."""
    try:
        yield
    except (ValueError, TypeError, RecursionError):
        log.warn(f"{path}: is no conversation, and is passed over")


@contextmanager
def _room_on_disk() -> Iterator[None]:
    """A full disk is the server's state, and no fault of its code."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        log.warn(f"a conversation was not kept: {error}")
        raise ApiError("the server's disk is full: this conversation is not kept", 507) from None
