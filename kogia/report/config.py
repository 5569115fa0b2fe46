"""What `kogia report` is told."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about a run, or about all runs of a directory."""

    path: Positional[Path]
    """A run directory, or a directory of several, as `kogia demo` leaves it."""
    out: Path | None = None
    """Where the page goes; report.html in the run directory unless given."""
