"""`kogia doctor`: what this machine has, how fast it is, and which implementation each op takes, or why not."""

import json
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kogia.checkpoint.open import pick_device
from kogia.inference.config import DoctorConfig
from kogia.ops.dispatch import which
from kogia.ops.machine import copy_rate, describe, free_memory, product_rate

DTYPES = (torch.bfloat16, torch.float32)


def main(config: DoctorConfig) -> None:
    found = examine(pick_device(config.device))
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        print_examination(found)


def examine(device: torch.device) -> dict[str, Any]:
    """All that is printed. Which backend runs depends on a call's arguments too; here is what can be loaded at all."""
    return {
        "machine": describe(device),
        "free_gib": free_memory(device) / 2**30,
        "copy_gb_per_second": copy_rate(device) / 1e9,
        "tflops": {str(dtype).removeprefix("torch."): product_rate(device, dtype) / 1e12 for dtype in DTYPES},
        "ops": which(device),
    }


def print_examination(found: dict[str, Any]) -> None:
    machine = found["machine"]
    versions = f"Python {machine['python']}, torch {machine['torch']}, triton {machine['triton'] or 'not installed'}"
    print(f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads; {versions}")
    if machine["instructions"] is not None:
        print(f"kernels for a CPU: {machine['instructions']}")
    rates = ", ".join(f"{dtype} {rate:,.3g} TFLOP/s" for dtype, rate in found["tflops"].items())
    print(f"{found['free_gib']:,.1f} GiB free; copies {found['copy_gb_per_second']:,.1f} GB/s (read + write); {rates}")
    table = Table(title="implementations of each op, best first")
    for name in ("op", "backends", "not here, because"):
        table.add_column(name)
    for op, backends in found["ops"].items():
        usable = " ".join(name for name, reason in backends.items() if reason is None)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in backends.items() if reason is not None)
        table.add_row(op, usable, escape(reasons))
    Console().print(table)
