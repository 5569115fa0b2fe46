"""What a run tells: one JSON line per step on disk, and on the terminal a live line and plain messages."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from kogia.files import write_text
from kogia.terminal import LiveLine, conclude, info, one_line, printable, warn

__all__ = ["conclude", "info", "one_line", "printable", "warn"]

METRICS_FILE = "metrics.jsonl"
ROUTING_FILE = "routing.jsonl"
"""The load of every expert over a run (kogia.train.routing_log)."""
ON_POLICY = {
    "reward": "reward",
    "accuracy": "accuracy",
    "entropy": "entropy",
    "completion_tokens": "length",
    "truncated": "truncated",
}
"""Metrics of the live line of reinforcement learning and their names there, the first ones first. Its loss is about 0
at every step, whatever is learned."""
SUPERVISED = {"loss": "loss", "val_loss": "val loss", "max_vio": "max vio", "grad_norm": "grad norm"}
"""The same of every other stage."""
EVAL = "eval_"
"""How the names of scores begin that were measured on the way."""


def writable(text: str) -> str:
    """The text with what no UTF-8 file can hold, halves of surrogate pairs, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The metric lines of a run, in order; none where there is no file. A line cut short by a crash is left out.

    Values that were not finite come back as NaN.
    """
    rows = [row for _, row in json_lines(Path(run_dir) / METRICS_FILE) if row is not None]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def last_figures(run_dir: str | Path) -> str:
    """The newest of the scores measured on the way, in words; of the live line's metrics where there is none."""
    latest: dict[str, float] = {}
    for row in read_metrics(run_dir):
        latest |= row
    measured = {name: value for name, value in latest.items() if name == "val_loss" or name.startswith(EVAL)}
    return ", ".join(_shown(measured or latest)[:2])


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


@runtime_checkable
class Sink(Protocol):
    """Another place that metrics go to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricLog:
    """Appends metrics to `run_dir/metrics.jsonl`, passes them to `sinks` and shows progress. A context manager.

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
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        check_in_place(self.path.parent)
        kept = cut_back(self.path, -1 if resume_step is None else resume_step)
        self.total_steps = total_steps
        self._seconds_before = _last_seconds(kept)
        self._start = time.monotonic()
        self._file = self.path.open("a", encoding="utf-8")
        self._opened = os.fstat(self._file.fileno())
        self._sinks = sinks
        self._latest: dict[str, float] = {}
        self._line = LiveLine(description, quiet=quiet)
        self._line.begin(resume_step or 0, total_steps)

    def __enter__(self) -> "MetricLog":
        self._line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__(kind, error, trace)
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (1-based: the number of steps done). One line on disk, flushed."""
        check_in_place(self.path, self._opened)
        seconds = self._seconds_before + time.monotonic() - self._start
        self._file.write(_json_line({"step": step, "seconds": round(seconds, 3), **metrics}))
        self._file.flush()
        for sink in self._sinks:
            sink.log(step, metrics)
        self._latest |= metrics  # a score that was measured some steps ago is still the latest
        speed = self._latest.get("tokens_per_second")
        rate = "" if speed is None else f"{speed:,.0f} tokens/s"
        self._line.update(step, self.total_steps, rate=rate, fields=_shown(self._latest))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # no text, no JSON, or brackets in brackets without end
        return None
    return value if isinstance(value, dict) else None


def _last_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    known = (row.get("seconds") for row in reversed(rows))
    return next((seconds for seconds in known if isinstance(seconds, int | float) and 0 <= seconds < 1e15), 0.0)


def _json_line(metrics: Mapping[str, Any]) -> str:
    """JSON has no NaN or infinity: they are written null."""
    return json.dumps({key: _number(value) for key, value in metrics.items()}) + "\n"


def _number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _shown(metrics: Mapping[str, float]) -> list[str]:
    names = ON_POLICY if "reward" in metrics else SUPERVISED
    scores = {name: f"eval {name.removeprefix(EVAL)}" for name in metrics if name.startswith(EVAL)}
    return [f"{label} {_figure(name, metrics[name])}" for name, label in {**names, **scores}.items() if name in metrics]


def _figure(name: str, value: float) -> str:
    """Losses move in the fourth digit, and nothing else that is told does."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if name.endswith("loss") else f"{value:.3g}"
