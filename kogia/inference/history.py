"""What was typed in a chat, for the arrow keys of the next one: one line each in a file that nobody else can read."""

import os
import stat
from pathlib import Path
from typing import Any

from kogia import log

MOST_LINES = 1000
"""The newest of which are brought back."""


def history_path() -> Path:
    """Where the lines are: in $XDG_STATE_HOME, which by its specification counts if it is absolute, or ~/.local/state.

    Raises RuntimeError where there is no home.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "kogia" / "chat_history"


class History:
    """The lines of earlier chats, brought back by `readline`, the module; what is added is on disk at once.

    Where the file cannot be used that is said once, and the chat goes on without it. Where its name leads to something
    else, as /dev/null, nothing is kept.
    """

    def __init__(self, readline: Any) -> None:
        self._path: Path | None = None
        self._last = ""
        try:
            path = history_path()
            lines = _take_up(path)
        except (OSError, RuntimeError) as error:
            return _warn(error)
        if lines is None:
            return
        self._path = path
        for self._last in lines:
            readline.add_history(self._last)

    def add(self, line: str) -> None:
        """Keep a line that was typed, unless it is blank or the one before it again."""
        if self._path is None or not line.strip() or line == self._last:
            return
        self._last = line
        try:
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace", opener=_open_private) as file:
                file.write(line + "\n")
        except OSError as error:
            self._path = None
            _warn(error)


def _take_up(path: Path) -> list[str] | None:
    """The newest lines of the file, which is made where it is missing and closed to others where it was open to them.

    None where it is no file.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        return None
    with open(path, "ab+", opener=_open_private) as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            os.fchmod(file.fileno(), 0o600)
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if len(lines) > 2 * MOST_LINES:
            lines = lines[-MOST_LINES:]
            file.truncate(0)
            file.writelines(lines)
        if lines and not lines[-1].endswith(b"\n"):
            file.write(b"\n")
    return [line.decode("utf-8", "replace").rstrip("\r\n").replace("\0", "") for line in lines[-MOST_LINES:]]


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _warn(error: OSError | RuntimeError) -> None:
    log.warn(f"nothing that is typed here is kept for later chats: {error}; --no-history asks for that")
