"""Charts as inline SVG: text stays text, and colours follow the page, so they read on light and dark alike."""

import html
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from kogia.report.load import Interval, Measurement, Stage, number

# Stand-ins that the SVG is written with and the page's own colours that replace them.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03")
_PAGE_COLOURS = {_INK: "currentColor", _GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kogia",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One small chart of a stage: metrics that share an axis."""

    title: str
    keys: tuple[str, ...]
    note: str = ""


LEARNING = (
    Curve("Loss", ("loss", "val_loss", "val_loss_average"), "per token, in nats"),
    Curve("Multi-token prediction loss", ("mtp_loss_1", "mtp_loss_2", "mtp_loss_3"), "per token, in nats"),
    Curve("Reward", ("reward",), "mean over the samples of a step"),
    Curve("Accuracy of rollouts", ("accuracy",), "share of samples that are right"),
    Curve("Completion length", ("completion_tokens",), "tokens, mean"),
    Curve("Truncated", ("truncated",), "share of samples that hit the length limit"),
    Curve("Groups without variance", ("zero_variance_groups",), "all samples rewarded alike, so nothing to learn from"),
    Curve("Entropy", ("entropy",), "per token, in nats"),
    Curve("KL to the reference", ("kl",), "per token, in nats"),
    Curve("Clipped", ("clip_fraction",), "share of tokens at the clipping bound"),
    Curve("Engine and trainer", ("mismatch",), "largest difference of log-probabilities"),
    Curve("Gradient norm", ("grad_norm",)),
)
ROUTING = (
    Curve(
        "Routing load, MaxVio",
        ("max_vio", "max_vio_worst", "val_max_vio"),
        "load of the fullest expert over the mean, minus 1; mean and worst of the layers, and over held-out data",
    ),
    Curve("Routing entropy", ("routing_entropy",), "of the load, over that of an even one; 1 is balance"),
    Curve("Experts without a token", ("dead_experts",), "in a step, of all layers"),
    Curve("Balance loss", ("balance", "device_balance", "communication_balance"), "1 is balance"),
)
SPEED = (
    Curve("Tokens per second", ("tokens_per_second",), "of a step, its data included"),
    Curve("Model FLOPs utilisation", ("mfu_causal", "mfu_full"), "share of a large product's rate on the same device"),
    Curve("Peak memory", ("memory_gib",), "GiB until then"),
)
SPECULATION = (Curve("MTP acceptance", ("mtp_acceptance",), "share of drafted tokens that were accepted"),)


@dataclass(frozen=True)
class Chart:
    """A drawn curve; its words are the page's, which wraps them."""

    title: str
    note: str
    svg: Markup


def draw_curves(stage: Stage, curves: Sequence[Curve]) -> list[Chart]:
    """The charts for which the stage has figures of at least two steps."""
    drawn = []
    for curve in curves:
        series = {key: _series(stage.metrics, key) for key in curve.keys}
        series = {key: xy for key, xy in series.items() if len(xy[0]) >= 2}
        if series:
            svg = _draw_curve(f"{stage.name}-{curve.keys[0]}", curve, series)
            drawn.append(Chart(curve.title, curve.note, svg))
    return drawn


MOMENTS = 4
"""Of a run, that the map of loads is drawn at."""
FULLEST = 2.0
"""Load over the mean load at which the colours end."""


def draw_loads(stage: Stage) -> list[Chart]:
    """Which experts of which layers were busy, at a few moments; and MaxVio of every layer over the whole run."""
    if len(stage.loads) < 2:
        return []
    relative = np.array([load.counts for load in stage.loads])
    relative = relative / np.maximum(relative.mean(-1, keepdims=True), 1e-30)
    steps = [load.step for load in stage.loads]
    where = "Layers are counted from the first with experts, prediction modules last"
    return [
        Chart("Load of experts", f"over the mean of their layer. {where}", _draw_moments(stage.name, steps, relative)),
        Chart("MaxVio by layer", where, _draw_violations(stage.name, steps, relative.max(-1) - 1)),
    ]


def _draw_moments(name: str, steps: Sequence[int], relative: NDArray[np.float64]) -> Markup:
    chosen = sorted({round(i * (len(steps) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)})
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        panels = figure.subplots(1, len(chosen), sharey=True)
        colours = ScalarMappable(Normalize(0.0, FULLEST), "RdBu_r")
        for axes, place in zip(panels, chosen, strict=True):
            axes.imshow(relative[place], aspect="auto", cmap=colours.cmap, norm=colours.norm)
            axes.set_title(f"step {steps[place]:,}", fontsize=8)
            axes.set_xlabel("expert")
            _whole_ticks(axes, 3)
        panels[0].set_ylabel("layer")
        figure.colorbar(colours, ax=panels, extend="max", ticks=[0, 1, 2])
        last = relative[-1]
        told = f"at the end the busiest expert has {last.max():.2f} times its layer's mean, the idlest {last.min():.2f}"
        return _to_svg(figure, f"{name}-loads", f"Load of experts at {len(chosen)} moments; {told}")


def _draw_violations(name: str, steps: Sequence[int], violations: NDArray[np.float64]) -> Markup:
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        extent = (0, steps[-1], len(violations[0]) - 0.5, -0.5)
        top = max(0.1, float(np.quantile(violations, 0.98)))
        image = axes.imshow(violations.T, aspect="auto", cmap="magma_r", vmin=0.0, vmax=top, extent=extent)
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
        _whole_ticks(axes, 5)
        figure.colorbar(image, ax=axes, extend="max")
        ends = f"{violations[0].mean():.3g} at step {steps[0]} to {violations[-1].mean():.3g} at step {steps[-1]}"
        return _to_svg(figure, f"{name}-violations", f"MaxVio by layer over the run: on average from {ends}")


def _whole_ticks(axes: Axes, most: int) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(most, integer=True))


def draw_accuracy(measurements: Sequence[Measurement], labels: Sequence[str]) -> Markup | None:
    """pass@1 with its interval, greedy and pass@k beside it, one row per measurement that has a pass@1."""
    shown = [(m, label) for m, label in zip(measurements, labels, strict=True) if m.pass_1]
    if not shown:
        return None
    measurements, labels = [m for m, _ in shown], [label for _, label in shown]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 0.9 + 0.5 * len(measurements)), layout="constrained")
        axes = figure.add_subplot()
        ks = sorted({m.k for m in measurements if m.pass_k})
        _points(axes, [m.pass_k for m in measurements], "pass@" + "/".join(map(str, ks)), "s", 2, -0.22)
        _points(axes, [m.greedy for m in measurements], "greedy", "D", 1, 0.22)
        _points(axes, [m.pass_1 for m in measurements], "pass@1, 95% interval", "o", 0, 0.0)
        axes.set_yticks(range(len(labels)), [textwrap.fill(label, 22) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("problems solved, %")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=3, handletextpad=0.3, columnspacing=1.2)
        parts = [
            f"{text}: {100 * m.pass_1.mean:.1f}%" for text, m in zip(labels, measurements, strict=True) if m.pass_1
        ]
        return _to_svg(figure, "accuracy", "pass@1 by stage. " + ", ".join(parts))


def _points(
    axes: Axes, intervals: Sequence[Interval | None], name: str, marker: str, colour: int, shift: float
) -> None:
    rows = [(row, i) for row, i in enumerate(intervals) if i is not None]
    if not rows:
        return
    means = [100 * i.mean for _, i in rows]
    below = [100 * (i.mean - (i.mean if i.low is None else i.low)) for _, i in rows]
    over = [100 * ((i.mean if i.high is None else i.high) - i.mean) for _, i in rows]
    lead = colour == 0
    axes.errorbar(
        means,
        [row + shift for row, _ in rows],
        xerr=[[max(x, 0) for x in below], [max(x, 0) for x in over]],
        fmt=marker,
        markersize=7 if lead else 4.5,
        elinewidth=2.2 if lead else 1,
        clip_on=False,  # whole also at 0 and at 100
        color=_SERIES[colour],
        label=name,
    )


def _series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values where the metric is a finite number."""
    pairs = [(number(m.get("step")), number(m.get(key))) for m in metrics]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _draw_curve(name: str, curve: Curve, series: dict[str, tuple[list[float], list[float]]]) -> Markup:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        for index, (key, (steps, values)) in enumerate(series.items()):
            colour, smooth = _SERIES[index], _moving_average(values)
            if smooth is not values:
                axes.plot(*_thin(steps, values), color=colour, linewidth=0.8, alpha=0.35)
            marker = "o" if len(values) <= 12 else None
            axes.plot(
                *_thin(steps, smooth),
                color=colour,
                linewidth=1.8,
                marker=marker,
                markersize=3,
                label=key.replace("_", " "),
            )
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        _tick(axes, [value for _, values in series.values() for value in values])
        if len(series) > 1:
            axes.legend(fontsize=8)
        ends = [f"{key.replace('_', ' ')} from {v[0]:.4g} to {v[-1]:.4g}" for key, (_, v) in series.items()]
        return _to_svg(
            figure, name, f"{curve.title}: {'; '.join(ends)}, over {len(next(iter(series.values()))[0])} points"
        )


def _tick(axes: Axes, values: Sequence[float]) -> None:
    """Few labels, each a whole number by itself, as steps are; a curve that stays where it is lies in the middle."""
    low, high = min(values), max(values)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # what is left is rounding
        room = 0.1 * abs(low) or 0.1
        axes.set_ylim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_label))


def _label(value: float, _: int | None) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "−")


def _moving_average(values: list[float]) -> list[float]:
    """Mean over a centred window of about a thirtieth of the curve; short curves are given back as they are."""
    half = len(values) // 60
    if half == 0:
        return values
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    edges = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(total[b] - total[a]) / (b - a) for a, b in edges]


def _thin(steps: list[float], values: list[float], most: int = 600) -> tuple[list[float], list[float]]:
    """Every n-th point and the last, so that a long run does not make a heavy page."""
    stride = -(-len(steps) // most)
    keep = sorted({*range(0, len(steps), stride), len(steps) - 1})
    return [steps[i] for i in keep], [values[i] for i in keep]


def _to_svg(figure: Figure, name: str, description: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, page_colour in _PAGE_COLOURS.items():
        svg = svg.replace(colour, page_colour)
    prefix = re.sub(r"[^\w-]", "_", name)  # ids must be unique in the page that holds many charts
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    text = html.escape(description)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    return Markup(re.sub(r"(<svg[^>]*>)", lambda m: f"{m[1]}<title>{text}</title>", svg, count=1))
