"""Equality of two formulas: read by latex2sympy, bounded before anything is evaluated, decided by values.

Two expressions are equal if they have the same value to many digits at a few fixed points, numbers if they are finite
and have the same value. What has no value (sums with symbolic limits, ...) goes to math-verify.
"""

import logging
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended.latex2sympy2 import latex2sympy
from sympy import MatrixBase, MatrixExpr
from sympy.core.function import AppliedUndef

from kogia.tasks.latex import FUNCTION, closing
from kogia.tasks.numerals import Quantity, same_number

MAX_LENGTH = 400
"""Characters of one formula. The parser's time grows faster than the length."""
MAX_BARS = 8
"""Bars |x| in one formula: they open as they close, and the parser tries every way to pair them."""
MAX_MAGNITUDE = 10_000
"""Decimal digits that the value of any part of an expression may have, before or behind the point."""
_DIGITS = 50
_MIN_PRECISION = 10
"""Bits below which a computed value is what cancellation left of zero."""
_CLOSE = sympy.Rational(1, 10**30)
_POINTS = ((379, 1009), (-1861, 1013), (3803, 1019), (13177, 1021), (-7529, 1031), (5279, 1033))
"""Fractions that no formula has a reason to be special at; each further symbol is a step apart."""
_MIN_POINTS = 2
_UNSAMPLED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit)
_SIGNS = {"=": sympy.Eq, "\\neq": sympy.Ne, ">": sympy.StrictGreaterThan, "\\geq": sympy.GreaterThan}
_TURNED = {"<": ">", "\\leq": "\\geq"}
_DIRECTED = (">", "\\geq")

_WORD = re.compile(
    r"\\(?:begin|end|over\w+|mathbb|mathcal|vec|hat|bar)\s*\{\w+\}|\\[a-zA-Z]+|_\{[^{}]*\}|([^\W\d_]{3,})"
)
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in [
        (r"\*\*", "^"),
        (r"°", ""),
        (r"%", r"\\%"),
        (r"\\infinity(?![a-zA-Z])", r"\\infty"),
        (r"\\frac\s*(\d)", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\sqrt\s*([\da-zA-Z])", r"\\sqrt{\1}"),
        # latex2sympy reads 2(3) and (2)(3) as mixed numbers
        (r"((?<![\d.^_])\d[\d.]*|(?<![\^_])\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?=\()", r"\1\\cdot "),
        (r"(\)|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?=\d)|(?<=\))(?=\()", r"\1\\cdot "),
        (r"(?<![\d.])\.(?=\d)", "0."),
    ]
]
_UNREADABLE = re.compile(
    r"(?<![_^\d])\d+\s+[\d.]|\d_|\)_|'|[eE][-+]?\d{5}|\\binom\s*\{[^{}]*(?:\d{4}|\^)|\\binom\s*\{[^{}]*\}\s*\{[^{}]*(?:\d{4}|\^)"
)

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports that its own time limits are off


class Unbounded(ValueError):
    """A part of an expression is infinite or too large to be evaluated."""


def read(text: str) -> Any:
    """The sympy object of one formula, evaluated as little as possible; None if it cannot be read whole and bounded."""
    if len(text) > MAX_LENGTH or text.count("|") > MAX_BARS:
        return None
    latex = _spell(text)
    if _UNREADABLE.search(latex):
        return None
    try:
        parsed = latex2sympy(latex, is_real=True, convert_degrees=False, normalization_config=None)
        _bound(parsed)
    except Exception:  # the parser raises plain Exception
        return None
    return parsed


def same_formula(gold: str | Quantity, answer: str | Quantity) -> bool:
    """Whether `answer` is equal to `gold`; False if either cannot be read."""
    sides = (gold, answer)
    values = [_rational(side) if isinstance(side, Quantity) else read(side) for side in sides]
    if values[0] is None or values[1] is None:
        return False
    if _same(values[0], values[1]):
        return True
    if not any(isinstance(side, Quantity) for side in sides):
        return False
    written = [side if isinstance(side, Quantity) else _approximation(value) for side, value in zip(sides, values)]
    return written[0] is not None and written[1] is not None and same_number(written[0], written[1])


def same_relation(gold: list[str], answer: list[str]) -> bool:
    """Whether two relations, given as [side, sign, side, sign, ..., side], say the same of the same symbols."""
    gold_parts, parts = _comparisons(gold), _comparisons(answer)
    if not gold_parts or len(gold_parts) != len(parts):
        return False
    return all(any(_same_comparison(one, other) for other in parts) for one in gold_parts)


def relation_is_set(relation: list[str], members: str) -> bool:
    """Whether the relation holds for exactly the members of the set `members`, of one real symbol."""
    parts, answer_set = _comparisons(relation), read(members)
    if not parts or not isinstance(answer_set, sympy.Set):
        return False
    try:
        gold_set = sympy.And(*(_SIGNS[sign](difference, 0) for difference, sign in parts)).as_set()
    except Exception:  # several symbols, or what sympy cannot solve
        return False
    return gold_set == answer_set.doit()


def _spell(text: str) -> str:
    """`text` as latex2sympy wants it. A word is one symbol: as a product of letters, "listen" would equal "silent"."""
    text = FUNCTION.sub(r"\\\1", text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = _in_braces(_in_braces(text, r"\\sqrt"), r"\^")
    return _WORD.sub(lambda word: rf"\text{{{word[1]}}}" if word[1] else word[0], text)


def _in_braces(text: str, command: str) -> str:
    """Gives the round brackets behind `command` the form of an argument: "\\sqrt(2)" becomes "\\sqrt{2}"."""
    for match in reversed(list(re.finditer(rf"{command}\s*\(", text))):
        start = match.end() - 1
        end = closing(text, start)
        if end is not None:
            text = f"{text[:start]}{{{text[start + 1 : end[0]]}}}{text[end[1] :]}"
    return text


def _bound(parsed: Any) -> None:
    """Raises Unbounded if a part of `parsed` that will be evaluated is infinite or too large."""
    for part in parsed.flat() if isinstance(parsed, MatrixBase) else (parsed,):
        _magnitude(part)


def _magnitude(expr: Any) -> float:
    """An upper bound of |log10| of the value and of every part of it."""
    if expr in (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan):
        raise Unbounded(f"{expr} is not finite; an answer must be")
    if expr.is_Number:
        number: Any = sympy.Rational(str(expr))
        return 0.0 if number == 0 else abs(math.log10(abs(number.p)) - math.log10(number.q))
    ends = isinstance(expr, (sympy.Interval, sympy.Tuple))  # of a set, or the limits of a sum: may be infinite
    parts = [_magnitude(part) for part in expr.args if not (ends and part in (sympy.oo, -sympy.oo))]
    magnitude = _combined(expr, parts)
    if magnitude > MAX_MAGNITUDE:
        raise Unbounded(f"{expr.func.__name__} has about {magnitude:.0e} digits; at most {MAX_MAGNITUDE} are evaluated")
    return magnitude


def _combined(expr: Any, parts: list[float]) -> float:
    if isinstance(expr, sympy.Pow):
        return 10 ** min(parts[1], 9) * max(parts[0], 1)
    if isinstance(expr, (sympy.exp, sympy.factorial, sympy.gamma, sympy.binomial)):
        return 10 ** min(max(parts), 9)
    if isinstance(expr, (sympy.Sum, sympy.Product)):
        return 10 ** min(max(parts[1:]), 9)  # terms
    if isinstance(expr, sympy.Mul):
        return sum(parts)
    return max(parts, default=1.0) + math.log10(max(len(parts), 1))


def _same(gold: Any, answer: Any) -> bool:
    if isinstance(gold, (MatrixBase, MatrixExpr)) and isinstance(answer, (MatrixBase, MatrixExpr)):
        gold, answer = gold.doit(), answer.doit()
        return gold.shape == answer.shape and all(map(_same, gold.flat(), answer.flat()))
    if isinstance(gold, sympy.Set) and isinstance(answer, sympy.Set):
        return gold.doit() == answer.doit()
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return False
    if gold.free_symbols or answer.free_symbols:
        return _same_function(_exact(gold), _exact(answer))
    gold_value, value = _evaluate(_exact(gold)), _evaluate(_exact(answer))
    return gold_value is not None and value is not None and _close(gold_value, value)


def _same_function(gold: Any, answer: Any) -> bool:
    if gold.has(*_UNSAMPLED) or answer.has(*_UNSAMPLED):
        return bool(gold.free_symbols) and bool(math_verify.verify([gold], [answer], timeout_seconds=None))
    verdicts = [_agree(*values) for values in _samples(gold, answer)]
    known = [verdict for verdict in verdicts if verdict is not None]
    return len(known) >= _MIN_POINTS and all(known)


def _samples(*exprs: Any) -> Iterator[list[Any]]:
    """The values of `exprs` at each of the points, None where one has none."""
    symbols = sorted(set().union(*(expr.free_symbols for expr in exprs)), key=str)
    for numerator, denominator in _POINTS:
        point = {
            symbol: sympy.Rational(numerator, denominator) + sympy.Rational(101 * place, 97)
            for place, symbol in enumerate(symbols)
        }
        yield [_evaluate(expr.xreplace(point)) for expr in exprs]


def _agree(gold: Any, answer: Any) -> bool | None:
    """Whether two values are equal; None where one is not defined, or the two take branches beside the real line."""
    if gold is None or answer is None:
        return None
    return True if _close(gold, answer) else (False if gold.is_real and answer.is_real else None)


def _exact(expr: Any) -> Any:
    """`expr` with its decimals as fractions and each f(x) as a symbol of that name."""
    exact = {number: sympy.Rational(str(number)) for number in expr.atoms(sympy.Float)}
    return expr.xreplace(exact | {call: sympy.Symbol(str(call), real=True) for call in expr.atoms(AppliedUndef)})


def _evaluate(expr: Any) -> Any:
    """The finite number `expr` is, exact if rational, else to `_DIGITS` digits; None if it is none."""
    try:
        value = expr.doit()
        value = value if value.is_Rational else value.evalf(_DIGITS)
        parts = value.as_real_imag()
    except Exception:  # sympy's evaluation raises many kinds
        return None
    if not all(part.is_Number and part.is_finite for part in parts):
        return None
    real, imaginary = (sympy.Integer(0) if part.is_Float and part._prec < _MIN_PRECISION else part for part in parts)
    return real + sympy.I * imaginary


def _close(gold: Any, answer: Any) -> bool:
    if gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    return bool(abs(gold - answer) <= _CLOSE * max(abs(gold), abs(answer)))


def _rational(quantity: Quantity) -> Any:
    return sympy.Rational(quantity.value.numerator, quantity.value.denominator)


def _approximation(value: Any) -> Quantity | None:
    """The real number that a formula is, as good as exact; None if it is none."""
    number = _evaluate(_exact(value)) if isinstance(value, sympy.Expr) and not value.free_symbols else None
    if number is None or not number.is_real:
        return None
    return Quantity(Fraction(str(sympy.Float(number, _DIGITS))))


def _comparisons(relation: list[str]) -> list[tuple[Any, str]]:
    """Each neighbouring pair of sides as (difference, sign), read as "difference > 0"; empty if one is unreadable."""
    sides = [read(side) for side in relation[::2]]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return []
    sides = [_exact(side) for side in sides]
    return [
        (right - left, _TURNED[sign]) if sign in _TURNED else (left - right, sign)
        for left, sign, right in zip(sides, relation[1::2], sides[1:])
    ]


def _same_comparison(gold: tuple[Any, str], answer: tuple[Any, str]) -> bool:
    """Whether the differences are in one fixed ratio, which must be positive where the sign has a direction."""
    if gold[1] != answer[1] or gold[0].free_symbols != answer[0].free_symbols:
        return False
    ratios = []
    for one, other in _samples(gold[0], answer[0]):
        if one is not None and other is not None and one != 0 and other != 0:
            ratios.append(one / other)
    if len(ratios) < _MIN_POINTS or not all(_close(ratios[0], ratio) for ratio in ratios):
        return False
    return gold[1] not in _DIRECTED or bool(ratios[0] > 0)
