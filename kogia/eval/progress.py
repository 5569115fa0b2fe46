"""A live line while an engine samples: problems done, tokens per second, time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kogia import log

PLAIN_INTERVAL = 10.0
"""Seconds between progress lines where stderr is no terminal."""


class SamplingProgress:
    """A context manager whose `update` has the shape of `kogia.eval.sample.Progress`."""

    def __init__(self, description: str, *, quiet: bool = False) -> None:
        self.description, self.quiet = description, quiet
        self.note = ""
        """Shown at the end of the line."""
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn())
        self._live = Progress(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console)
        self._is_live = console.is_terminal and not quiet
        self._task = self._live.add_task(description, total=None, text="")
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "SamplingProgress":
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def update(self, done: int, total: int, num_tokens: int) -> None:
        """Show the state; cheap enough for every engine step."""
        if self.quiet:
            return
        now = time.monotonic()
        text = f"{num_tokens / max(now - self._start, 1e-9):,.0f} tokens/s  {self.note}"
        if self._is_live:
            self._live.update(self._task, completed=done, total=total, text=text)
        elif now - self._last >= PLAIN_INTERVAL:
            self._last = now
            log.info(f"{self.description}  {done}/{total}  {text}")
