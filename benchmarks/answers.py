"""Our answers beside math-verify's, on the gold and answer pairs of math-verify's own tests.

    python benchmarks/answers.py MATH_VERIFY/tests [--show] [--out benchmarks/results/answers.json]

MATH_VERIFY is a checkout of https://github.com/huggingface/Math-Verify: its files are read, nothing of them is kept. A
pair is a row (gold, answer, expected) of a parametrised test. Ours: what `extract_answer` finds, by `answers_match`;
theirs: `verify(parse(gold), parse(answer))` with all defaults.
"""

import argparse
import ast
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from math_verify import parse, verify
from result import row, write_result

from kogia.tasks.answers import answers_match, extract_answer

Pair = tuple[str, str, bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--show", action="store_true", help="print the pairs that ours has wrong")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    found = list(dict.fromkeys(pair for file in sorted(args.tests.glob("test_*.py")) for pair in pairs(file)))
    rows = [row("answers-pairs", len(found), "pairs")]
    for name, judge in (("ours", ours), ("math-verify", theirs)):
        wrong = [pair for pair in found if judge(pair[0], pair[1]) != pair[2]]
        accepted = sum(not expected for _, _, expected in wrong)
        rows.append(row(f"answers-agree-{name}", len(found) - len(wrong), "pairs",
                        wrongly_accepted=accepted, wrongly_refused=len(wrong) - accepted))  # fmt: skip
        if args.show and judge is ours:
            print(*wrong, sep="\n")
    print(*rows, sep="\n")
    if args.out is not None:
        write_result(args.out, "answers beside math-verify", rows)


def pairs(file: Path) -> Iterator[Pair]:
    """The rows of a test file whose parameters begin with a gold, an answer and what is expected."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.parametrize"):
            continue
        names, rows = (ast.literal_eval(node.args[0]), node.args[1])
        names = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
        if names[:3] not in (["gold", "pred", "expected"], ["gold", "pred", "result"]):
            continue
        assert isinstance(rows, ast.List | ast.Tuple), file
        for each in rows.elts:
            try:
                gold, answer, expected = (ast.literal_eval(value) for value in each.elts[:3])  # pyright: ignore
            except ValueError:  # one that the tests compute
                continue
            yield gold, answer, bool(expected)


def ours(gold: str, answer: str) -> bool:
    return answers_match(gold, extract_answer(answer) or "")


def theirs(gold: str, answer: str) -> bool:
    return quietly(lambda: verify(parse(gold), parse(answer)))


def quietly(judge: Callable[[], bool]) -> bool:
    try:
        return judge()
    except Exception:  # noqa: BLE001  (what the peer raises counts as a refusal)
        return False


if __name__ == "__main__":
    main()
