"""From samples to scores: pure functions of the rows of an EVAL.jsonl, so that every number can be recomputed."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kogia.eval.intervals import Estimate, PairedDifference, mean_interval, paired_difference
from kogia.eval.metrics import majority_at_k, pass_at_k
from kogia.tasks.task import UNJUDGED

GREEDY = -1
"""The `sample` of a greedy answer."""
TRUNCATION_LIMIT = 0.1
"""A larger share of cut-off samples makes a score doubtful, and is said aloud."""

Row = Mapping[str, Any]
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "problem_id": (str,),
    "prompt": (str,),
    "sample": (int,),
    "num_tokens": (int,),
    "think_tokens": (int,),
    "reward": (float, int),
    "correct": (bool,),
    "status": (str,),
    "extracted": (str, type(None)),
    "truncated": (bool,),
}
"""What a row is summarised and compared by."""


def summarise(rows: Sequence[Row], ks: Iterable[int]) -> dict[str, Any]:
    """Scores with intervals over questions, and rates over samples, of the rows of one task.

    A key is always there; its value is None where the samples do not reach (pass@8 of 4 samples, greedy without any).
    Samples whose check failed are not right; of rewards, they have none and are left out.
    """
    sampled = [row for row in rows if row["sample"] != GREEDY]
    greedy = [row for row in rows if row["sample"] == GREEDY]
    groups = by_question(sampled)
    num_samples = min((len(group) for group in groups.values()), default=0)
    scores: dict[str, Any] = {}
    for k in sorted({1, 8, *ks}):
        scores[f"pass@{k}"] = _estimate([_pass(group, k) for group in groups.values()] if k <= num_samples else [])
        if k > 1:
            scores[f"maj@{k}"] = _estimate(
                [_majority(group, k) for group in groups.values()] if k <= num_samples else []
            )
    scores["greedy"] = _estimate([float(row["correct"]) for row in greedy])
    return {**scores, **_rates(sampled or greedy), **_greedy_rates(greedy)}


def by_question(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by problem id, in the order of their first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    return groups


def compare(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """Paired differences (after minus before) of pass@1 and of greedy answers, on the questions both answered.

    Raises ValueError when they share none, or pose a shared one differently.
    """
    prompts = {row["problem_id"]: row["prompt"] for row in before}
    for row in after:
        if prompts.get(row["problem_id"], row["prompt"]) != row["prompt"]:
            raise ValueError(
                f"question {row['problem_id']!r} reads differently in the two evaluations: use the same task options"
            )
    result: dict[str, Any] = {}
    for name, is_greedy in (("pass@1", False), ("greedy", True)):
        pair = [question_scores(r for r in rows if (r["sample"] == GREEDY) == is_greedy) for rows in (before, after)]
        result[name] = _difference(paired_difference(*pair)) if all(pair) else None
    if result["pass@1"] is None and result["greedy"] is None:
        raise ValueError("one evaluation holds sampled answers only, the other greedy ones only: nothing to compare")
    return result


def question_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Share of right samples by problem id."""
    return {key: fmean(row["correct"] for row in group) for key, group in by_question(rows).items()}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Rows of an EVAL.jsonl. Raises ValueError that names a line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); evaluate again") from None
    return [read_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def read_row(line: str | bytes, where: str) -> dict[str, Any]:
    """A line of an EVAL.jsonl. Raises ValueError that begins with `where` if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON ({error}); evaluate again") from None
    missing = set(_FIELDS) - set(row if isinstance(row, dict) else ())
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(sorted(missing))}; name a file that eval wrote")
    wrong = next((name for name, kinds in _FIELDS.items() if type(row[name]) not in kinds), None)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong} = {row[wrong]!r:.60}, which eval never writes; evaluate again")
    return row


def read_summary(path: Path) -> dict[str, Any]:
    """The object of an EVAL.json. Raises ValueError for what is none."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); evaluate again") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: holds a {type(summary).__name__}, not an object; evaluate again")
    return summary


def _pass(group: list[Row], k: int) -> float:
    return pass_at_k(len(group), sum(row["correct"] for row in group), k)


def _majority(group: list[Row], k: int) -> float:
    # what a cut-off or given-up sample says is no vote
    votes = [row["extracted"] if row["status"] in ("ok", "wrong") else None for row in group]
    return majority_at_k(votes, [row["correct"] for row in group], k)


def _estimate(scores: list[float]) -> list[float] | None:
    return mean_interval(scores).to_list() if scores else None


def _difference(paired: PairedDifference) -> dict[str, Any]:
    estimate: Estimate = paired.difference
    return {
        "difference": estimate.to_list(),
        "correlation": paired.correlation,
        "num_questions": paired.num_questions,
        "p_value": paired.p_value,
        "significant": paired.is_significant,
    }


def _rates(rows: Sequence[Row]) -> dict[str, Any]:
    counts = Counter(row["status"] for row in rows)
    claims = counts["ok"] + counts["wrong"]
    rewards = [row["reward"] for row in rows if row["status"] not in UNJUDGED]
    failures = [row.get("detail", "") for row in rows if row["status"] in UNJUDGED]
    return {
        "think_tokens": fmean(row["think_tokens"] for row in rows),
        "completion_tokens": fmean(row["num_tokens"] for row in rows),
        "reward": fmean(rewards) if rewards else None,
        "truncated": fmean(row["truncated"] for row in rows),
        "parse_fail": counts["parse_fail"] / len(rows),
        "give_up": counts["give_up"] / len(rows),
        "false_claim": counts["wrong"] / len(rows),
        "claims_verified": counts["ok"] / claims if claims else None,
        "status_counts": dict(counts),
        "first_failure": failures[0] if failures else None,
    }


def _greedy_rates(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "greedy_truncated": fmean(row["truncated"] for row in rows) if rows else None,
        "greedy_parse_fail": fmean(row["status"] == "parse_fail" for row in rows) if rows else None,
    }
