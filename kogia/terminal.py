"""What a command says while it works: messages, and one live line of progress. All of it on stderr.

At 80 columns as at 200 the line keeps name, bar, count, rate and time left; of what else there is to tell it shows as
much as fits, the first things first. Where stderr is no terminal it is printed whole, now and then.
"""

import shlex
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL = 10.0
"""Seconds between progress lines where stderr is no terminal."""
GAP = 2
WIDE, WIDE_BAR, NARROW_BAR = 100, 12, 8
"""From this width of the terminal on the bar is wide; columns of either."""

_console = Console(stderr=True, highlight=False, emoji=False)


def info(message: str) -> None:
    """Print a message to stderr, above the live line where there is one: a line, which a terminal breaks at blanks."""
    _print(printable(message))


def warn(message: str) -> None:
    """The same for what asks for attention."""
    _print(f"warning: {printable(message)}", "yellow")


def fail(message: str) -> None:
    """The same for what ends a command."""
    _print(f"kogia: error: {printable(message)}")


def _print(text: str, style: str | None = None) -> None:
    _console.print(text, style=style, markup=False, soft_wrap=not _console.is_terminal)


def conclude(result: str, path: str | Path, *command: str | Path) -> None:
    """Print the last line of a command: what came out, where it is, and what to type next."""
    line = printable(f"{result}; in {path}; next: {shlex.join(map(str, command))}")
    _console.print(line, markup=False, soft_wrap=True)  # whole, or a terminal would not give back the command as it is


def printable(text: str) -> str:
    """`text` with signs that could steer a terminal escaped, as names and values out of files may hold them."""
    kept = ("\n", "\t")
    return "".join(
        sign.encode("unicode_escape").decode() if unicodedata.category(sign)[0] == "C" and sign not in kept else sign
        for sign in text
    )


def one_line(text: str) -> str:
    """The same, line ends escaped as well: for what somebody else has written and a log is to hold in its own line."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class LiveLine:
    """How far a piece of work is. A context manager; within it `info` and `warn` print above the line.

    With `transient` the line is gone when the work has ended; with `quiet` there is none.
    """

    def __init__(self, name: str, *, quiet: bool = False, transient: bool = False) -> None:
        self.name, self.quiet, self._transient = printable(name).replace("\n", " "), quiet, transient
        self._live = Live(self, console=_console, refresh_per_second=4, transient=transient)
        self._rate, self._fields = "", ()
        self._unsaid = ""
        self._has_said = transient  # a line that is to vanish is said only of long work
        self._has_ended = False
        self.begin(0, 0)
        self._said_at = self._start

    def __enter__(self) -> "LiveLine":
        if _console.is_terminal and not self.quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended = True
        self._live.stop()
        if self._unsaid and not self._transient:
            info(self._unsaid)

    def begin(self, done: int, total: int) -> None:
        """So much is done before the work begins, now: the time left is reckoned from what comes."""
        self._done, self._total, self._first = done, total, done
        self._start = self._updated = time.monotonic()

    def update(self, done: int, total: int, *, rate: str = "", fields: Sequence[str] = ()) -> None:
        """Show the state; cheap enough for every step of an engine."""
        self._done, self._total, self._rate, self._fields = done, total, rate, tuple(fields)
        self._updated = time.monotonic()
        if not (self.quiet or self._live.is_started):
            self._say()

    def _say(self) -> None:
        """The line as a message, where none was said for long."""
        self._unsaid = "  ".join(
            part for part in (self.name, self._count, *self._fields, self._rate, self._left) if part
        )
        is_first = self._done > self._first and not self._has_said
        if is_first or self._updated - self._said_at >= PLAIN_INTERVAL:
            info(self._unsaid)
            self._unsaid, self._has_said, self._said_at = "", True, self._updated

    @property
    def _count(self) -> str:
        return f"{self._done}/{self._total}" if self._total else ""

    @property
    def _left(self) -> str:
        """The time left as of the last update, counted down since; the time that it took when the work has ended."""
        if self._has_ended:
            return f"took {_duration(time.monotonic() - self._start)}"
        if self._done <= self._first:
            return "eta –"
        pace = (self._updated - self._start) / (self._done - self._first)
        left = pace * (self._total - self._done) - (time.monotonic() - self._updated)
        return f"eta {_duration(max(left, 0))}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        width = options.max_width
        bar = WIDE_BAR if width >= WIDE else NARROW_BAR
        name = Text(self.name)
        name.truncate(max(12, width // 4), overflow="ellipsis")
        ends = [part for part in (self._count, self._rate, self._left) if part]
        room = width - name.cell_len - GAP - bar - sum(GAP + cell_len(part) for part in ends)
        shown = _fitting(self._fields, room)
        parts = [part for part in (self._count, *shown, self._rate, self._left) if part]
        grid = Table.grid(padding=(0, GAP, 0, 0))
        for _ in range(3):
            grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(name, ProgressBar(max(self._total, 1), self._done, width=bar), Text((" " * GAP).join(parts)))
        yield grid


class SamplingProgress:
    """The live line of an engine that samples. Its `update` has the shape of `kogia.eval.sample.Progress`."""

    def __init__(self, name: str, *, quiet: bool = False, transient: bool = False) -> None:
        self.note = ""
        """Shown beside the rate."""
        self._line = LiveLine(name, quiet=quiet, transient=transient)
        self._start: float | None = None

    def __enter__(self) -> "SamplingProgress":
        self._line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__(kind, error, trace)

    def update(self, done: int, total: int, num_tokens: int) -> None:
        """`done` of `total` problems or completions; tokens since the start. Cheap enough for every engine step."""
        now = time.monotonic()
        if self._start is None:
            self._start = now
            self._line.begin(done, total)
        rate = num_tokens / max(now - self._start, 1e-9)
        self._line.update(done, total, rate=f"{rate:,.0f} tokens/s", fields=[self.note] if self.note else [])


def _fitting(fields: Sequence[str], room: int) -> list[str]:
    """The first fields that fit into so many columns."""
    shown = []
    for field in fields:
        room -= GAP + cell_len(field)
        if room < 0:
            break
        shown.append(field)
    return shown


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
