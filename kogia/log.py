"""What a run tells: one JSON line per step on disk, one live line on the terminal, plain messages on stderr."""

import json
import math
import os
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from kogia.files import write_text

METRICS_FILE = "metrics.jsonl"
SHOWN = ("loss", "val_loss", "reward", "accuracy", "completion_tokens", "truncated", "max_vio", "tokens_per_second")
"""The metrics of the live line, in this order, as far as a step has them."""
PLAIN_INTERVAL = 10.0
"""Seconds between progress lines where stderr is no terminal."""

_console = Console(stderr=True, highlight=False)


def info(message: str) -> None:
    """Print a line to stderr, above the live line where there is one."""
    _console.print(printable(message), markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print a line that asks for attention to stderr."""
    _console.print(f"warning: {printable(message)}", style="yellow", markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """`text` with signs that could steer a terminal escaped, as names and values out of files may hold them."""
    kept = ("\n", "\t")
    return "".join(
        sign.encode("unicode_escape").decode() if unicodedata.category(sign)[0] == "C" and sign not in kept else sign
        for sign in text
    )


def writable(text: str) -> str:
    """The text with what no UTF-8 file can hold, halves of surrogate pairs, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The metric lines of a run, in order; none where there is no file. A line cut short by a crash is left out.

    Values that were not finite come back as NaN.
    """
    rows = [row for _, row in json_lines(Path(run_dir) / METRICS_FILE) if row is not None]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def json_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file and the object that each holds: None where a crash or a fault of the disk left none.

    Empty without a file.
    """
    if not path.exists():
        return []
    return [(line, _object(line)) for line in path.read_bytes().split(b"\n") if line.strip()]


def cut_back(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Leave only the lines up to `last_step` in a log of a run that goes on from there; returns what they hold.

    Lines that are no objects with a step are dropped too, which is said.
    """
    lines = json_lines(path)
    rows = [(line, row) for line, row in lines if row is not None and isinstance(row.get("step"), int)]
    if len(rows) < len(lines):
        warn(f"{path}: torn or damaged lines dropped: {len(lines) - len(rows)}")
    kept = [(line, row) for line, row in rows if row["step"] <= last_step]
    if lines:
        write_text(path, "".join(line.decode() + "\n" for line, _ in kept))
    return [row for _, row in kept]


def check_in_place(path: Path, opened: os.stat_result | None = None) -> None:
    """Raise FileNotFoundError unless `path` is there, and still what was `opened`: writing on would be for nobody."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found is None or not (opened is None or os.path.samestat(found, opened)):
        raise FileNotFoundError(
            f"{path} is gone, deleted, moved or replaced while the run was at work; what was not saved before is lost: "
            "leave the place as it is and start again, or go on from what was saved"
        )


class MetricLog:
    """Appends metrics to `run_dir/metrics.jsonl` and shows progress. A context manager.

    With `resume_step`, the lines after that step are dropped and time goes on from the last line kept; without it an
    existing file is started over. Raises FileNotFoundError once the file is no longer in its place.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        description: str,
        quiet: bool = False,
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        check_in_place(self.path.parent)
        kept = cut_back(self.path, -1 if resume_step is None else resume_step)
        self.total_steps, self.description, self.quiet = total_steps, description, quiet
        self._first_step = resume_step or 0
        self._seconds_before = _last_seconds(kept)
        self._start = self._last_print = time.monotonic()
        self._last_line = ""
        self._file = self.path.open("a", encoding="utf-8")
        self._opened = os.fstat(self._file.fileno())
        self._live: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "MetricLog":
        if _console.is_terminal and not self.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[text]}"))
            self._live = Progress(*columns, console=_console, refresh_per_second=4)
            self._task = self._live.add_task(
                self.description, total=self.total_steps, completed=self._first_step, text=""
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._last_line and not self.quiet:
            info(self._last_line)
        self._file.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (1-based: the number of steps done). One line on disk, flushed."""
        check_in_place(self.path, self._opened)
        seconds = self._seconds_before + time.monotonic() - self._start
        self._file.write(_json_line({"step": step, "seconds": round(seconds, 3), **metrics}))
        self._file.flush()
        if self.quiet:
            return
        text = f"{step}/{self.total_steps}  {_shown(metrics)}  {self._eta(step)}"
        if self._live is not None:
            self._live.update(self._task, completed=step, text=text)
            return
        self._last_line = f"{self.description}  {text}"
        if time.monotonic() - self._last_print >= PLAIN_INTERVAL or step == self._first_step + 1:
            info(self._last_line)
            self._last_line, self._last_print = "", time.monotonic()

    def _eta(self, step: int) -> str:
        done = max(step - self._first_step, 1)
        return f"eta {_duration((time.monotonic() - self._start) / done * max(self.total_steps - step, 0))}"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # no text, no JSON, or brackets in brackets without end
        return None
    return value if isinstance(value, dict) else None


def _last_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return next((row["seconds"] for row in reversed(rows) if isinstance(row.get("seconds"), int | float)), 0.0)


def _json_line(metrics: Mapping[str, Any]) -> str:
    """JSON has no NaN or infinity: they are written null."""
    return json.dumps({key: _number(value) for key, value in metrics.items()}) + "\n"


def _number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {float(metrics[name]):.4g}" for name in SHOWN if name in metrics)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
