"""The result as a table for people, with what makes a score doubtful beside it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kogia import log
from kogia.eval.summary import TRUNCATION_LIMIT
from kogia.tasks.task import UNJUDGED


def print_results(summaries: Sequence[dict[str, Any]]) -> None:
    """A table of scores per evaluation on stdout; warnings on stderr for what the scores hide."""
    for summary in summaries:
        Console().print(_table(summary))
    for summary in summaries:
        _print_rest(summary)


def _table(summary: dict[str, Any]) -> Table:
    """Every name is in the title, where it wraps, so that the columns fit a terminal of 80."""
    table = Table(title=f"{escape(summary['name'])}: {summary['num_questions']} questions")
    table.add_column("score")
    for name in ("mean", "95% interval", "truncated", "unparsed"):
        table.add_column(name, justify="right")
    for name, (mean, low, high) in _scores(summary).items():
        prefix = "greedy_" if name == "greedy" else ""
        rates = [summary[f"{prefix}truncated"], summary[f"{prefix}parse_fail"]]
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(name, _percent(mean), interval, *map(_rate, rates))
    return table


def print_activation(summaries: Sequence[dict[str, Any]]) -> None:
    """Evaluations at several numbers of active experts side by side on stdout."""
    for task in dict.fromkeys(summary["task"] for summary in summaries):
        mine = [summary for summary in summaries if summary["task"] == task]
        score = "greedy" if mine[0]["pass@1"] is None else "pass@1"
        table = Table(title=f"{escape(task)}: {mine[0]['num_questions']} questions")
        for name in ("active experts", score, "95% interval", "tokens/s", "MB per token"):
            table.add_column(name, justify="right")
        for summary in mine:
            mean, low, high = summary[score]
            rate, read = summary["tokens_per_second"], summary["bytes_per_token"]
            table.add_row(
                str(summary["sampling"]["active_experts"]),
                _percent(mean),
                f"{100 * low:.1f} to {100 * high:.1f}",
                "-" if rate is None else f"{rate:,.0f}",
                "-" if read is None else f"{read / 1e6:,.2f}",
            )
        Console().print(table)
    log.info(
        "MB per token: the weights that one token by itself is multiplied with; tokens/s: of all sequences at once"
    )


def _rate(share: float) -> str:
    return f"[bold red]{_percent(share)}[/]" if share > TRUNCATION_LIMIT else _percent(share)


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
    if broken := sum(counts.get(status, 0) for status in UNJUDGED):
        log.warn(
            f"{name}: the verifier failed or timed out on {broken} samples, which count as not right; the first: "
            f"{summary['first_failure']!r}"
        )
    if "compare" in summary:
        _print_comparison(summary)


def _print_comparison(summary: dict[str, Any]) -> None:
    other = summary["compare"]
    for name in ("pass@1", "greedy"):
        if other[name] is not None:
            mean, low, high = (100 * x for x in other[name]["difference"])
            verdict = "differs" if other[name]["significant"] else "no significant difference"
            if (p_value := other[name].get("p_value")) is not None:
                verdict += f" (exact p = {p_value:.2g})"
            log.info(
                f"{summary['name']}: {name} {mean:+.1f} points [{low:+.1f}, {high:+.1f}] against {other['checkpoint']} "
                f"on {other[name]['num_questions']} shared questions: {verdict}"
            )
