"""What `kogia context` measured, as one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: what context gains and the loss by position, where they were measured, and the grid of pass keys."""
    num_panels = 3 if result["loss_by_context"] else 1
    figure = Figure(figsize=(4.5 * num_panels, 3.6), layout="constrained")
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    if result["loss_by_context"]:
        _draw_gains(axes[0], result["loss_by_context"])
        _draw_positions(axes[1], result["loss_by_position"])
    _draw_grid(axes[-1], result["pass_keys"])
    figure.savefig(path, format="png", dpi=150)


def _draw_gains(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]["length"]
    _draw_curve(axis, [row["length"] for row in rows], [row["gain"] or (0.0, 0.0, 0.0) for row in rows])
    axis.set(title="What context gains", xlabel="tokens of context", ylabel=f"nats per token, over {first:,} tokens")


def _draw_positions(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    middles = [(row["from"] * row["to"]) ** 0.5 for row in rows]  # of each bucket, on a scale that doubles
    _draw_curve(axis, middles, [row["nats"] for row in rows])
    axis.set(title="Loss by position", xlabel="tokens before", ylabel="nats per token")


def _draw_curve(axis: Axes, places: Sequence[float], estimates: Sequence[Sequence[float]]) -> None:
    means, lows, highs = np.asarray(estimates).T
    axis.plot(places, means, marker="o")
    axis.fill_between(places, lows, highs, alpha=0.2)
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)


def _draw_grid(axis: Axes, cells: Sequence[dict[str, Any]]) -> None:
    """Depths downwards, lengths to the right; the share found as colour and as a number."""
    lengths, depths = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("length", "depth"))
    shares = np.asarray([cell["found"][0] for cell in cells]).reshape(len(lengths), len(depths)).T
    axis.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(title="Pass keys found", xlabel="tokens", ylabel="depth")
    for (row, column), share in np.ndenumerate(shares):
        axis.text(column, row, f"{share:.0%}", ha="center", va="center", color="black" if share > 0.6 else "white")
