"""Chat templates that came with a model, rendered in a process of their own with bounded time and memory.

A template is a program. jinja2's sandbox keeps it from Python's internals, but not from multiplying strings or looping
for ever; only a process can be stopped inside one long operation. It starts with the first rendering and ends with its
owner; a prompt then costs about 0.1 ms.
"""

import threading
from collections.abc import Mapping
from typing import Any

from kogia.process import LineWorker, WorkerLost

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
        self._worker: LineWorker | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for JSON-able `variables`; ValueError for a template that is wrong, refuses or takes too much."""
        with self._lock:
            try:
                worker = self._worker = self._worker or LineWorker(
                    "kogia.text.template_worker", self.source, cpu_seconds=CPU_SECONDS, wall_seconds=WALL_SECONDS
                )
                reply = _checked(worker.ask(variables))
            except BaseException as error:  # Ctrl-C too: an answer still on its way must not meet the next question
                self._drop()
                if isinstance(error, WorkerLost):
                    raise ValueError(f"{self.name}: the chat template {error}; do not use this template") from None
                raise
        if "error" in reply:
            raise ValueError(f"{self.name}: the chat template {reply['error']}")
        return reply["text"]

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def _checked(reply: dict[str, Any]) -> dict[str, str]:
    match reply:
        case {"text": str()} | {"error": str()}:
            return reply
    raise WorkerLost("did not answer with a text")
