"""What became of one request, and what that says of many."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (90, 99)
TIMES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
"""What is measured, by the names of vLLM's benchmark."""
WIDTH = 50


@dataclass(slots=True)
class Outcome:
    """Times are seconds since the load began."""

    began: float
    """When the request was due: what it waits in the client counts."""
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    """When its text came, piece by piece."""
    num_prompt: int = 0
    num_output: int = 0
    """Tokens as the server counts them; where it does not tell, pieces."""
    error: str | None = None

    @property
    def ttft(self) -> float:
        return (self.times[0] if self.times else self.ended) - self.began

    @property
    def e2el(self) -> float:
        return self.ended - self.began

    @property
    def tpot(self) -> float:
        """0 of an answer of one token, which meets any goal."""
        return (self.e2el - self.ttft) / (self.num_output - 1) if self.num_output > 1 else 0.0

    def meets(self, goals: dict[str, float]) -> bool:
        """Goals are milliseconds, by the names of `BenchConfig.goals`."""
        return all(1000 * getattr(self, name) <= most for name, most in goals.items())


def figures(outcomes: Sequence[Outcome], duration: float, goals: dict[str, float]) -> dict[str, Any]:
    """All that is told of a load, under the names of the JSON that vLLM's benchmark writes; times are milliseconds."""
    good = [each for each in outcomes if each.error is None]
    num_prompt, num_output = sum(each.num_prompt for each in good), sum(each.num_output for each in good)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": num_prompt,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(each.meets(goals) for each in good) / duration if goals else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_prompt + num_output) / duration,
        "max_output_tokens_per_s": _peak_tokens(good),
        "max_concurrent_requests": _peak_requests(outcomes),
    }
    for name, values in _times(good).items():
        found |= _statistics(name, values or [0.0])
    errors = Counter(each.error for each in outcomes if each.error is not None)
    return found | {"errors": dict(errors.most_common(20))}


def _times(good: Sequence[Outcome]) -> dict[str, list[float]]:
    return {
        "ttft": [each.ttft for each in good],
        "tpot": [each.tpot for each in good if each.num_output > 1],
        "itl": [float(gap) for each in good for gap in np.diff(each.times)],
        "e2el": [each.e2el for each in good],
    }


def _statistics(name: str, seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    values = 1000 * np.asarray(seconds)
    found = {"mean": np.mean(values), "median": np.median(values), "std": np.std(values)}
    found |= {f"p{p}": np.percentile(values, p) for p in PERCENTILES}
    return {f"{kind}_{name}_ms": float(value) for kind, value in found.items()}


def _peak_tokens(good: Sequence[Outcome]) -> float:
    """Of the seconds of a load, the one with most tokens; those of an answer are shared among its pieces."""
    pieces = [(int(time), each.num_output / len(each.times)) for each in good for time in each.times]
    if not pieces:
        return 0.0
    seconds, tokens = zip(*pieces)
    return float(np.bincount(seconds, weights=tokens).max())


def _peak_requests(outcomes: Sequence[Outcome]) -> int:
    """Most requests that ran at once."""
    changes = sorted([(each.began, 1) for each in outcomes] + [(each.ended, -1) for each in outcomes])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def lines_of(found: dict[str, Any], rate: float, clients: int | None) -> str:
    """The figures as vLLM's benchmark prints them, row by row."""
    rows: list[tuple[str, float | int | None]] = [
        ("Successful requests", found["completed"]),
        ("Failed requests", found["failed"]),
        ("Maximum request concurrency", clients),
        ("Request rate configured (RPS)", float(rate) if rate else None),
        ("Benchmark duration (s)", found["duration"]),
        ("Total input tokens", found["total_input_tokens"]),
        ("Total generated tokens", found["total_output_tokens"]),
        ("Request throughput (req/s)", found["request_throughput"]),
        ("Request goodput (req/s)", found["request_goodput"]),
        ("Output token throughput (tok/s)", found["output_throughput"]),
        ("Peak output token throughput (tok/s)", found["max_output_tokens_per_s"]),
        ("Peak concurrent requests", float(found["max_concurrent_requests"])),
        ("Total token throughput (tok/s)", found["total_token_throughput"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", *(_line(*row) for row in rows if row[1] is not None)]
    for name, (short, title) in TIMES.items():
        lines.append(f"{title:-^{WIDTH}}")
        kinds = ("mean", "median", *(f"p{p}" for p in PERCENTILES))
        lines += [_line(f"{kind.capitalize()} {short} (ms)", found[f"{kind}_{name}_ms"]) for kind in kinds]
    return "\n".join([*lines, "=" * WIDTH])


def _line(name: str, value: float | int | None) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else f"{value}"
    return f"{name + ':':<40} {shown:<10}".rstrip()
