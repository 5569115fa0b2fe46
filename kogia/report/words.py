"""What the figures say, in plain sentences that claim no more than each of them shows.

pass@1 is the share of sampled answers that are right, greedy the share of problems whose likeliest answer is, maj@k of
those whose most frequent answer among k is, pass@k of those with any right answer among k. How much of a change in one
of them is a cause of another does not follow from them, so nothing is said of it.
"""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from kogia.report.load import Interval, Measurement, Stage, number

NOTHING = "0.0 points"


def headline_group(stages: Sequence[Stage]) -> list[Measurement]:
    """The group that compares most stages."""
    return max(grouped(stages), key=lambda g: (len({m.stage for m in g}), g[0].split == "test"), default=[])


def grouped(stages: Sequence[Stage]) -> list[list[Measurement]]:
    """All measurements by their conditions, in the order of the stages; a group's members can be compared."""
    groups: dict[tuple[object, ...], list[Measurement]] = {}
    for stage in stages:
        for measurement in stage.measurements:
            groups.setdefault(measurement.conditions, []).append(measurement)
    return list(groups.values())


def label(measurement: Measurement, group: Sequence[Measurement]) -> str:
    """The stage's name, with the evaluation's where the stage has several in the group."""
    alone = sum(m.stage == measurement.stage for m in group) == 1
    return plain(measurement.stage) if alone else f"{plain(measurement.stage)}, {plain(measurement.name)}"


def plain(name: str) -> str:
    return {"grpo": "GRPO", "rejection_sft": "rejection SFT"}.get(name, name.replace("_", " "))


def before_and_after(stages: Sequence[Stage], group: Sequence[Measurement]) -> tuple[Measurement, Measurement] | None:
    """The measurements around reinforcement learning; else the first and the last; None without two checkpoints."""
    rewarded = {s.name for s in stages if s.name == "grpo" or any("reward" in m for m in s.metrics)}
    places = [i for i, m in enumerate(group) if m.stage in rewarded]
    if places and places[0] > 0:
        before, after = places[0] - 1, max(i for i in places if group[i].stage == group[places[0]].stage)
        if group[before].identity != group[after].identity:
            return group[before], group[after]
    others = [m for m in group if m.identity != group[-1].identity]
    return (others[0], group[-1]) if others else None


def explain_change(before: Measurement, after: Measurement, group: Sequence[Measurement]) -> list[str]:
    """One sentence for each score that both measurements have."""
    names = label(before, group), label(after, group)
    temperature = after.sampling.get("temperature", 1)
    scores = [
        (f"pass@1, the share of right answers at temperature {temperature}", before.pass_1, after.pass_1),
        ("Greedy accuracy, of the answer that takes the likeliest token each time", before.greedy, after.greedy),
    ]
    if before.k == after.k:
        scores.append((f"maj@{after.k}, of the most frequent among {after.k} answers", before.maj_k, after.maj_k))
        scores.append((f"pass@{after.k}, of any among {after.k} answers", before.pass_k, after.pass_k))
    return [_change(what, first, second, names) for what, first, second in scores if first and second]


def _change(what: str, before: Interval, after: Interval, names: tuple[str, str]) -> str:
    return (
        f"{what}, went from {percent(before.mean)} ({names[0]}) to {percent(after.mean)} ({names[1]}), "
        f"{points(after.mean - before.mean)}; {_separation(before, after)}."
    )


def _separation(before: Interval, after: Interval) -> str:
    if before.low is None or after.low is None:
        return "intervals are not known"
    apart = after.above(before) or before.above(after)
    return "the 95% intervals do not overlap" if apart else "the 95% intervals overlap"


def explain_student(group: Sequence[Measurement]) -> list[str]:
    """How the distilled student compares with the stage before it."""
    for teacher, student in pairwise(group):
        apart = teacher.stage != "student" and teacher.identity != student.identity
        if student.stage == "student" and apart and teacher.pass_1 and student.pass_1:
            gap = student.pass_1.mean - teacher.pass_1.mean
            size = points(abs(gap)).removeprefix("+")
            place = "on a par with" if size == NOTHING else f"{size} {'below' if gap < 0 else 'above'}"
            return [
                f"The distilled student is {place} its teacher ({plain(teacher.stage)}) in pass@1; "
                f"{_separation(teacher.pass_1, student.pass_1)}."
            ]
    return []


def explain_speed(stages: Sequence[Stage]) -> list[str]:
    """A sentence for each stage that says how fast it was, by the medians of its steps."""
    sentences = []
    for stage in stages:
        found = {key: [n for m in stage.metrics if (n := number(m.get(key))) is not None] for key in _SPEEDS}
        middle = {key: median(values) for key, values in found.items() if values}
        if "tokens_per_second" not in middle:
            continue
        words = [f"{plain(stage.name)}: {middle['tokens_per_second']:,.0f} tokens/s in the median step"]
        if len(middle) == len(_SPEEDS):
            shares = (
                f"{percent(middle['mfu_causal'])} with causal attention, {percent(middle['mfu_full'])} with all of it"
            )
            words += [f"MFU {shares}, of {middle['peak_tflops']:,.3g} TFLOP/s that a large product was measured at"]
            words += [f"{max(found['memory_gib']):.2f} GiB at the peak"]
        sentences.append("; ".join(words) + ".")
    return sentences


_SPEEDS = ("tokens_per_second", "mfu_causal", "mfu_full", "peak_tflops", "memory_gib")


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def points(difference: float) -> str:
    shown = f"{100 * difference:+.1f} points".replace("-", "−")
    return NOTHING if shown[1:] == NOTHING else shown  # no sign before a change too small to show
