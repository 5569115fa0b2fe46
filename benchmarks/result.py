"""The form of every benchmark result: JSON with hardware, versions, commit and rows."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kogia.files import write_json

PACKAGES = ("torch", "tokenizers", "safetensors", "numpy", "transformers")


def row(
    id: str, value: float, unit: str, *, low: float | None = None, high: float | None = None, **extra: Any
) -> dict[str, Any]:
    """One figure. `low` and `high` are its 95% interval or spread; `peer` and `limit` may follow as keywords."""
    rounded = {"value": value, "low": low, "high": high}
    return {"id": id, "unit": unit, **{k: None if v is None else round(v, 4) for k, v in rounded.items()}, **extra}


def write_result(path: Path, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Write benchmarks/results-style JSON."""
    write_json(
        path,
        {
            "benchmark": benchmark,
            "hardware": hardware(),
            "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "rows": rows,
        },
    )


def hardware() -> dict[str, Any]:
    """What the figures were measured on: processor, cores this process may use, memory, GPUs."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    total = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(total / 2**20, 1),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def commit() -> str:
    """The commit measured, with "+changes" when the working tree differs from it; where the files are a copy without
    their history, as on a machine they were carried to, what BENCH_COMMIT says."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "../kogia") else "")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
