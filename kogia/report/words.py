"""What the figures mean, in plain sentences: how much of a lift is new ability and how much is sharpening.

Reinforcement learning can raise pass@1 at temperature 1 in two ways. The model's favourite answer becomes right more
often, which greedy decoding shows; or probability moves onto a favourite that was right before, which greedy decoding
does not show. The second is sharpening. pass@k tells whether more problems are within reach at all.
"""

from collections.abc import Sequence
from itertools import pairwise

from kogia.report.load import Interval, Measurement, Stage


def headline_group(stages: Sequence[Stage]) -> list[Measurement]:
    """The measurements that compare most stages: those of one task and split, in the order of the stages."""
    groups = grouped(stages)
    return max(groups, key=lambda g: (len({m.stage for m in g}), g[0].split == "test"), default=[])


def grouped(stages: Sequence[Stage]) -> list[list[Measurement]]:
    """All measurements by task and split; a group's members can be compared."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for stage in stages:
        for measurement in stage.measurements:
            groups.setdefault((measurement.task, measurement.split), []).append(measurement)
    return list(groups.values())


def label(measurement: Measurement, group: Sequence[Measurement]) -> str:
    """The stage's name, with the evaluation's where the stage has several in the group."""
    alone = sum(m.stage == measurement.stage for m in group) == 1
    return plain(measurement.stage) if alone else f"{plain(measurement.stage)}, {plain(measurement.name)}"


def plain(name: str) -> str:
    return {"grpo": "GRPO", "rejection_sft": "rejection SFT"}.get(name, name.replace("_", " "))


def before_and_after(stages: Sequence[Stage], group: Sequence[Measurement]) -> tuple[Measurement, Measurement] | None:
    """The measurements around reinforcement learning; else the first and the last; None where there are not two."""
    rewarded = [s.name for s in stages if s.name == "grpo" or any("reward" in m for m in s.metrics)]
    for index, measurement in enumerate(group):
        if measurement.stage in rewarded and index > 0:
            last = max(i for i, m in enumerate(group) if m.stage == measurement.stage)
            return group[index - 1], group[last]
    return (group[0], group[-1]) if len(group) > 1 else None


def explain_lift(before: Measurement, after: Measurement) -> list[str]:
    """Sentences about the change of pass@1, how it splits, and what became of pass@k and the false claims."""
    if before.pass_1 is None or after.pass_1 is None:
        return []
    lift = after.pass_1.mean - before.pass_1.mean
    sentences = [
        f"pass@1 at temperature {after.sampling.get('temperature', 1):g} went from {percent(before.pass_1.mean)} "
        f"({plain(before.stage)}) to {percent(after.pass_1.mean)} ({plain(after.stage)}), {points(lift)}; "
        f"{_separation(before.pass_1, after.pass_1)}."
    ]
    sentences += _split_of(lift, before.greedy, after.greedy)
    if before.pass_k and after.pass_k and before.k == after.k:
        sentences.append(_reach(after.pass_k.mean - before.pass_k.mean, before, after))
    return sentences


def _separation(before: Interval, after: Interval) -> str:
    if before.low is None or after.low is None:
        return "intervals are not known"
    apart = after.above(before) or before.above(after)
    return "the 95% intervals do not overlap" if apart else "the 95% intervals overlap"


def _split_of(lift: float, before: Interval | None, after: Interval | None) -> list[str]:
    """How the lift of pass@1 divides into a better favourite answer and sharpening."""
    if lift <= 0:
        return ["There is no lift to explain."]
    if before is None or after is None:
        return ["Greedy accuracy was not measured, so how much of the lift is sharpening is not known."]
    gain = after.mean - before.mean
    ability = min(max(gain / lift, 0.0), 1.0)
    return [
        f"Greedy accuracy, the favourite answer alone, moved by {points(gain)}, from {percent(before.mean)} to "
        f"{percent(after.mean)}.",
        f"So about {percent(ability, 0)} of the lift is a favourite answer that is right more often, and about "
        f"{percent(1 - ability, 0)} is sharpening: probability moved onto answers that were the favourites before.",
    ]


def _reach(gain: float, before: Measurement, after: Measurement) -> str:
    assert before.pass_k is not None and after.pass_k is not None
    known = before.pass_k.low is not None and after.pass_k.low is not None
    if after.pass_k.above(before.pass_k):
        meaning = "more problems are within reach than before"
    elif before.pass_k.above(after.pass_k):
        meaning = "fewer problems are within reach than before: variety was lost"
    else:
        meaning = "no clear change in which problems are within reach" if known else "its interval is not known"
    return f"pass@{after.k}, a right answer among {after.k} samples, moved by {points(gain)}: {meaning}."


def explain_student(group: Sequence[Measurement]) -> list[str]:
    """How the distilled student compares with the stage before it."""
    for teacher, student in pairwise(group):
        if student.stage == "student" and teacher.stage != "student" and teacher.pass_1 and student.pass_1:
            gap = student.pass_1.mean - teacher.pass_1.mean
            side = "below" if gap < 0 else "above"
            return [
                f"The distilled student is {100 * abs(gap):.1f} points {side} its teacher ({plain(teacher.stage)}) in "
                f"pass@1; {_separation(teacher.pass_1, student.pass_1)}."
            ]
    return []


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f} points".replace("-", "−")
