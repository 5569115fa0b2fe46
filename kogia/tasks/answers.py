"""The final answer of a worked solution, and whether two answers are equal.

What counts as the answer, the first of these that is there:

1. boxes: the last \\boxed{...} or \\fbox{...} that closes, with those before it that commas, "and" or "or" join to it.
   A "final answer is x" behind the last box takes its place. A box that never closes goes to the end of its line.
2. what follows the last "####", unless it is a heading.
3. the whole text, if it is nothing but one number or one formula.
4. the sentence behind the last "Final answer:", else the last sentence with a formula or a number: in it the last
   formula between dollars, \\(...\\) or \\[...\\] and those joined to it, else the last number with its sign, fraction,
   exponent and thousands, or the point, interval or set that it is in. A formula that only names something, like $n$
   or $f(x)$, is passed over.

A gold answer with a box or a formula in it is read in the same order. Comparison is exact for numbers and formulas; two
tolerances for decimals are in `kogia.tasks.numerals`. An answer that cannot be read whole equals nothing.

There is one clock, that of the process: callers run in processes that can be killed (kogia.tasks.pool). The time limits
of math-verify are off: they need signals of the main thread and turn into silent zeros elsewhere.
"""

import re

from kogia.tasks.compare import equal
from kogia.tasks.extract import extract_answer, states_formula
from kogia.tasks.latex import clean
from kogia.tasks.numerals import parse_number

__all__ = ["answers_match", "extract_answer", "parse_number"]

_MAX_LENGTH = 1000
_MAX_DEPTH = 20


def answers_match(gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`. The order matters: "x = 5" answers 5, and 5 answers "x = 5" but not "2x = 5"."""
    gold, answer = _stated(gold), _stated(answer)
    return bool(re.search(r"\w", gold)) and bool(answer) and equal(gold, answer)


def _stated(text: str) -> str:
    """What a text gives as its answer, in one spelling; empty if it is too long or too deep to compare."""
    answer = extract_answer(text) if states_formula(text) else text
    if answer is None or len(answer) > _MAX_LENGTH or _depth(answer) > _MAX_DEPTH:
        return ""
    return clean(answer)


def _depth(text: str) -> int:
    deepest = depth = 0
    for char in re.findall(r"[(\[{)\]}]", text):
        depth += 1 if char in "([{" else -1
        deepest = max(deepest, depth)
    return deepest
