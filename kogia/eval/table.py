"""The result as a table for people, with what makes a score doubtful beside it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kogia import log
from kogia.eval.summary import TRUNCATION_LIMIT


def print_results(summaries: Sequence[dict[str, Any]]) -> None:
    """One row per score on stdout; warnings on stderr for what the scores hide."""
    table = Table(title="95% intervals over questions")
    for name in ("evaluation", "score"):
        table.add_column(name)
    for name in ("mean", "interval", "questions", "truncated", "unparsed"):
        table.add_column(name, justify="right")
    for summary in summaries:
        for name, score in _scores(summary).items():
            prefix = "greedy_" if name == "greedy" else ""
            rates = [summary[f"{prefix}truncated"], summary[f"{prefix}parse_fail"]]
            table.add_row(
                summary["name"],
                name,
                f"{100 * score[0]:.1f}%",
                f"{100 * score[1]:.1f} to {100 * score[2]:.1f}",
                str(summary["num_questions"]),
                *(f"[bold red]{_percent(r)}[/]" if r > TRUNCATION_LIMIT else _percent(r) for r in rates),
            )
        table.add_section()
    Console().print(table)
    for summary in summaries:
        _print_rest(summary)


def _scores(summary: dict[str, Any]) -> dict[str, list[float]]:
    is_score = ("pass@", "maj@", "greedy")
    return {k: v for k, v in summary.items() if k.startswith(is_score) and isinstance(v, list)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _print_rest(summary: dict[str, Any]) -> None:
    name, counts = summary["name"], summary["status_counts"]
    statuses = ", ".join(f"{status} {count}" for status, count in sorted(counts.items(), key=lambda x: -x[1]))
    log.info(f"{name}: {statuses}; thought {summary['think_tokens']:.0f} tokens on average")
    if summary["truncated"] > TRUNCATION_LIMIT:
        limit = summary["sampling"]["max_tokens"]
        log.warn(
            f"{name}: {100 * summary['truncated']:.0f}% of the samples were cut off at max_tokens = {limit} and count "
            "as wrong: the scores measure the limit as much as the model; raise --max-tokens"
        )
    if broken := counts.get("timeout", 0) + counts.get("error", 0):
        log.warn(f"{name}: the verifier failed or timed out on {broken} samples, which count as wrong; see 'detail'")
    if "compare" in summary:
        _print_comparison(summary)


def _print_comparison(summary: dict[str, Any]) -> None:
    other = summary["compare"]
    for name in ("pass@1", "greedy"):
        if other[name] is not None:
            mean, low, high = (100 * x for x in other[name]["difference"])
            verdict = "differs" if other[name]["significant"] else "no significant difference"
            log.info(
                f"{summary['name']}: {name} {mean:+.1f} points [{low:+.1f}, {high:+.1f}] against {other['checkpoint']} "
                f"on {other[name]['num_questions']} shared questions: {verdict}"
            )
