"""`kogia report RUN`: one HTML page about a run, with everything inside it and no request to anywhere."""

import importlib.metadata
import importlib.resources
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kogia.files import write_text
from kogia.log import info
from kogia.report.config import ReportConfig
from kogia.report.figures import (
    LEARNING,
    ROUTING,
    SPECULATION,
    SPEED,
    Chart,
    Curve,
    draw_accuracy,
    draw_curves,
    draw_loads,
)
from kogia.report.load import Interval, Measurement, Run, Sample, Stage, load_run, number, read_samples
from kogia.report.words import (
    before_and_after,
    explain_change,
    explain_speed,
    explain_student,
    grouped,
    headline_group,
    label,
    percent,
    plain,
)

STATUSES = ("ok", "wrong", "give_up", "parse_fail", "truncated", "timeout", "error")


def main(config: ReportConfig) -> int:
    page = write_report(config.path, config.out)
    info(f"wrote {page}")
    return 0


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page about a run or a directory of runs; returns its path. Raises ValueError where there is no run."""
    run_dir = Path(run_dir)
    page = render(load_run(run_dir))
    target = Path(out) if out is not None else run_dir / "report.html"
    write_text(target, page)
    return target


def render(run: Run) -> str:
    """The page as text. Everything that a model or a user wrote is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "interval": _interval, "plain": plain, "number": _number}
    files = importlib.resources.files("kogia.report")
    template = environment.from_string((files / "page.html.jinja").read_text(encoding="utf-8"))
    style = Markup((files / "page.css").read_text(encoding="utf-8"))
    return template.render(style=style, **_content(run))


def _content(run: Run) -> dict[str, Any]:
    group = headline_group(run.stages)
    pair = before_and_after(run.stages, group)
    sentences = (explain_change(*pair, group) if pair else []) + explain_student(group)
    return {
        "title": plain(run.name),
        "facts": _facts(run),
        "tables": [Table(g, run.stages) for g in [group, *(g for g in grouped(run.stages) if g != group)] if g],
        "chart": draw_accuracy(group, [label(m, group) for m in group]),
        "sentences": sentences,
        "learning": _charts(run.stages, LEARNING),
        "routing": _charts(run.stages, ROUTING, draw_loads),
        "speed": _charts(run.stages, SPEED),
        "speeds": explain_speed(run.stages),
        "speculation": _charts(run.stages, SPECULATION),
        "statuses": STATUSES,
        "trajectories": trajectories(*pair, group) if pair else _alone(group),
        "recipes": [(stage.name, stage.recipe) for stage in run.stages if stage.recipe],
        "versions": _versions(run),
        "notes": run.notes,
    }


class Table:
    """The measurements of one task under the same conditions, as rows."""

    def __init__(self, group: Sequence[Measurement], stages: Sequence[Stage]) -> None:
        first = group[0]
        task = " · ".join(part for part in (first.task, first.split) if part) or "measurements"
        counted = [f"{first.values[key]:.0f} {what}" for key, what in _COUNTS if key in first.values]
        self.caption = ", ".join([task, *counted, *(f"{key} {value}" for key, value in first.sampling.items())])
        self.rows = [(label(m, group), m) for m in group]
        self.k = first.k
        self.speculative = any("mtp_acceptance" in m.values for m in group)
        self.counted = any(m.status_counts for m in group)


_COUNTS = (("num_questions", "problems"), ("num_samples", "samples each"))


@dataclass(frozen=True)
class Trajectory:
    """One problem with what the model wrote about it before and after; `before` is None if there is one model."""

    title: str
    prompt: str
    before: tuple[str, Sample] | None
    after: tuple[str, Sample]


def trajectories(before: Measurement, after: Measurement, group: Sequence[Measurement]) -> list[Trajectory]:
    """Three problems by their first sample: one gained, one right both times, one still or newly wrong.

    The first of each kind in file order is taken, so nothing is picked by hand; kinds that do not occur are filled up
    with the next problems.
    """
    later = {sample.problem_id: sample for sample in read_samples(after.samples)}
    both = [(s, later[s.problem_id]) for s in read_samples(before.samples, set(later))]
    kinds = {
        "Wrong before, right after": [p for p in both if not p[0].correct and p[1].correct],
        "Right before and after": [p for p in both if p[0].correct and p[1].correct],
        "Wrong after": [p for p in both if not p[1].correct],
    }
    chosen = [(title, *pairs[0]) for title, pairs in kinds.items() if pairs]
    taken = {first.problem_id for _, first, _ in chosen}
    spare = [(title, *p) for title, pairs in kinds.items() for p in pairs if p[0].problem_id not in taken]
    chosen += spare[: 3 - len(chosen)]
    return [
        Trajectory(title, first.prompt, (label(before, group), first), (label(after, group), second))
        for title, first, second in chosen
    ]


def _alone(group: Sequence[Measurement]) -> list[Trajectory]:
    """The first three problems of the only measurement."""
    if not group:
        return []
    samples = [sample for _, sample in zip(range(3), read_samples(group[-1].samples), strict=False)]
    return [Trajectory(f"Problem {s.problem_id}", s.prompt, None, (plain(group[-1].stage), s)) for s in samples]


def _charts(
    stages: Sequence[Stage], curves: Sequence[Curve], *others: Callable[[Stage], list[Chart]]
) -> list[tuple[str, list[Chart]]]:
    drawn = [(stage.name, draw_curves(stage, curves) + [c for draw in others for c in draw(stage)]) for stage in stages]
    return [(name, charts) for name, charts in drawn if charts]


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the summary says of the whole run, in words."""
    facts = []
    seconds, memory = (number(run.summary.get(key)) for key in ("seconds", "peak_memory_bytes"))
    if seconds is not None:
        facts.append(("took", f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"))
    if memory is not None:
        facts.append(("peak memory", f"{memory / 2**30:.2f} GiB"))
    if isinstance(seed := run.summary.get("seed"), int):
        facts.append(("seed", str(seed)))
    return facts


def _versions(run: Run) -> list[tuple[str, str]]:
    """The versions that the run recorded; else those of the machine that writes the page, and said so."""
    recorded = run.summary.get("versions")
    if isinstance(recorded, dict) and recorded:
        return [(str(name), str(version)) for name, version in recorded.items()]
    found = [("python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for name in ("kogia", "torch", "tokenizers", "safetensors", "numpy"):
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return [*found, ("recorded", "when this page was written")]


def _interval(interval: Interval | None) -> Markup:
    """`57.2%` and, smaller, `[54.0, 60.3]`."""
    if interval is None:
        return Markup("–")
    if interval.low is None or interval.high is None:
        return Markup("{}").format(percent(interval.mean))
    bounds = f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"
    return Markup("{} <small>{}</small>").format(percent(interval.mean), bounds)


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
