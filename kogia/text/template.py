"""Chat templates that came with a model, rendered in a process of their own with bounded time and memory.

A template is a program. jinja2's sandbox keeps it from Python's internals, but not from multiplying strings or looping
for ever; only a process can be stopped inside one long operation. It starts with the first rendering and ends with its
owner; a prompt then costs about 0.1 ms.
"""

import contextlib
import json
import signal
import subprocess
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from kogia.process import Child

CPU_SECONDS = 2.0
"""For one rendering, and for compiling the template before the first."""
MEMORY_BYTES = 192 << 20
"""What the process may allocate above its bare self."""
MAX_CHARS = 4_000_000
"""Longest prompt: a million tokens of ordinary text."""
WALL_SECONDS = 60.0  # CPU time is what counts: this only ends the wait for a process that does not run at all


class ChatTemplate:
    """One jinja2 template. `name` opens its error messages: the file it was read from."""

    def __init__(self, source: str, name: str = "chat template") -> None:
        self.source, self.name = source, name
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for JSON-able `variables`; ValueError for a template that is wrong, refuses or takes too much."""
        with self._lock:
            try:
                worker = self._worker = self._worker or _Worker(self.source)
                reply = worker.ask(variables)
            except BaseException as error:  # Ctrl-C too: an answer still on its way must not meet the next question
                self._drop()
                if isinstance(error, _WorkerLost):
                    raise ValueError(f"{self.name}: the chat template {error}; do not use this template") from None
                raise
        if "error" in reply:
            raise ValueError(f"{self.name}: the chat template {reply['error']}")
        return reply["text"]

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


class _WorkerLost(Exception):
    """The process did not answer; the text says why and follows "the chat template"."""


class _Worker:
    """The process of one template and this side of its socket."""

    def __init__(self, source: str) -> None:
        self._child = Child("kogia.text.template_worker", stdout=subprocess.DEVNULL)
        self.close = weakref.finalize(self, self._child.end)
        self._child.channel.settimeout(WALL_SECONDS)
        self._replies = self._child.channel.makefile("rb")
        self._unsent = json.dumps(source).encode() + b"\n"

    def ask(self, variables: Mapping[str, Any]) -> dict[str, str]:
        """{"text": ...} or {"error": ...}."""
        request, self._unsent = self._unsent + json.dumps(variables).encode() + b"\n", b""
        line = b""
        try:
            self._child.channel.sendall(request)
            line = self._replies.readline()
        except TimeoutError:
            raise _WorkerLost(f"gave no answer within {WALL_SECONDS:g} s") from None
        except OSError:  # its end: the exit code below says why
            pass
        if not line.endswith(b"\n"):
            raise _WorkerLost(self._ending())
        return _read_reply(line)

    def _ending(self) -> str:
        process = self._child.process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        if process.returncode == -signal.SIGPROF:
            return f"takes more than {CPU_SECONDS:g} s of CPU time"
        return f"ended its process (exit code {process.returncode})"


def _read_reply(line: bytes) -> dict[str, str]:
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(line):
            case {"text": str()} | {"error": str()} as reply:
                return reply
    raise _WorkerLost("did not answer with a text")
