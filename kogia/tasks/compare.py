"""Whether two written answers are equal: words, numbers, clock times, lists, relations, tuples, matrices, formulas.

Structure is taken apart here and its parts are compared alone, so what holds of a number holds of one in a tuple. All
texts have been through `kogia.tasks.latex.clean`. A comparison of one kind answers None where it does not apply.
"""

import re
from collections.abc import Sequence

from kogia.tasks import symbolic
from kogia.tasks.latex import COMMA, FUNCTION, MATRIX, RELATION, ROW, SEMICOLON, UNION, divide, enclosed, split
from kogia.tasks.numerals import CURRENCY, Quantity, read_quantity, same_quantity

_LETTERS = re.compile(r"[^\W\d_]+(?:[^\w\\{}$=<>^+*/|()]+[^\W\d_]+)*")
_WORD = re.compile(r"[^\W\d_]{3,}")
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:([ap])\s?\.?\s?m\.?)?", re.IGNORECASE | re.ASCII)
_DECIMAL_COMMA = re.compile(rf"(-?\d+),(\d+)\s*[{CURRENCY}]?", re.ASCII)
_INDEX = re.compile(r"_\s?(?:\{[^{}]*\}|\w)|\^\s?\{\s?-1\s?\}|(?<=[A-Za-z}])\s?\([^()]*\)")
_OPERATION = re.compile(r"[\d+*^-]|\\(?:sqrt|times|cdot|div|sin|cos|tan|log|ln|exp|int|sum|prod|lim|pm)(?![a-zA-Z])")


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` says what `gold` says."""
    gold, answer = _bare(gold), _bare(answer)
    if gold == answer:
        return True
    for comparison in (_words, _numbers, _lists, _clocks, _relations, _unions, _tuples, _matrices):
        verdict = comparison(gold, answer)
        if verdict is not None:
            return verdict
    return symbolic.same_formula(_decimal(gold) or gold, _decimal(answer) or answer)


def _bare(text: str) -> str:
    """Without a plus in front and without round brackets around a single thing."""
    text = text.removeprefix("+").strip()
    inner = enclosed(text, "(")
    while inner and len(split(inner, SEMICOLON)) == len(split(inner, COMMA)) == 1:
        text, inner = inner, enclosed(inner, "(")
    return text


def _decimal(text: str) -> Quantity | None:
    quantity = read_quantity(text)
    return quantity if quantity is not None and quantity.base == 10 else None


def _words(gold: str, answer: str) -> bool | None:
    words, others = _letters(gold), _letters(answer)
    if words and others:
        return words == others
    long = (words and _WORD.search(gold)) or (others and _WORD.search(answer))
    return False if long else None


def _letters(text: str) -> str:
    """The letters of a text that is nothing but words, or one letter; else nothing."""
    if not _LETTERS.fullmatch(text) or FUNCTION.search(text) or not re.search(r"\w\w|^\w$", text):
        return ""
    return re.sub(r"[\W_]|\band\b", "", text.casefold())


def _numbers(gold: str, answer: str) -> bool | None:
    number, other = read_quantity(gold), read_quantity(answer)
    if number is None and other is None:
        return None
    if number is not None and other is not None:
        return same_quantity(number, other)
    number, other = number or _with_decimal_comma(gold), other or _with_decimal_comma(answer)
    return same_quantity(number, other) if number is not None and other is not None else None


def _with_decimal_comma(text: str) -> Quantity | None:
    match = _DECIMAL_COMMA.fullmatch(text)
    return read_quantity(f"{match[1]}.{match[2]}") if match is not None else None


def _clocks(gold: str, answer: str) -> bool | None:
    time, other = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
    if time is not None and other is not None:
        return _seconds(time) == _seconds(other) or (time[4] is None and time.groups()[:3] == other.groups()[:3])
    return False if any(match is not None and match[4] for match in (time, other)) else None  # else a ratio


def _seconds(clock: re.Match[str]) -> int:
    hours = int(clock[1]) if clock[4] is None else int(clock[1]) % 12 + 12 * (clock[4].lower() == "p")
    return (hours * 60 + int(clock[2])) * 60 + int(clock[3] or 0)


def _lists(gold: str, answer: str) -> bool | None:
    """Lists and sets are equal whatever their order. A list without brackets may also be the members of a tuple."""
    items, others = _members(gold), _members(answer)
    if items is None and others is None:
        return None
    if items is None and enclosed(answer, "\\{") is None and (bracketed := _bracketed(gold)) is not None:
        return _pairwise(bracketed[1], others or [])
    if others is None and enclosed(gold, "\\{") is None and (bracketed := _bracketed(answer)) is not None:
        return _pairwise(items or [], bracketed[1])
    return _cover([gold] if items is None else items, [answer] if others is None else others)


def _members(text: str) -> list[str] | None:
    """What is listed with commas, semicolons, "and" or "or", stands in set braces, or is written with plus-minus."""
    inner = enclosed(text, "\\{")
    body = text if inner is None else inner
    items = split(body, SEMICOLON)
    items = items if len(items) > 1 else split(body, COMMA)
    items = [version for item in items for version in _both_signs(item)]
    return items if len(items) > 1 or (inner is not None and "|" not in inner) else None


def _both_signs(text: str) -> list[str]:
    if "\\pm" not in text:
        return [text]
    return [text.replace("\\pm", upper).replace("\\mp", lower) for upper, lower in (("+", "-"), ("-", "+"))]


def _cover(items: Sequence[str], others: Sequence[str]) -> bool:
    """Whether each of one has an equal in the other, both ways."""
    return all(any(equal(item, other) for other in others) for item in items) and all(
        any(equal(item, other) for item in items) for other in others
    )


def _pairwise(items: Sequence[str], others: Sequence[str]) -> bool:
    return len(items) == len(others) and all(map(equal, items, others))


def _relations(gold: str, answer: str) -> bool | None:
    """Of an equation with a mere name on the left, "x = 5", the right side is the answer."""
    relation, other = _relation(gold), _relation(answer)
    if relation is None and other is None:
        return None
    if relation is None or other is None:
        return _relation_with_value(gold, relation, answer, other)
    if _is_named(relation) and _is_named(other) and _name(relation) == _name(other):
        return equal(relation[-1], other[-1])
    if "=" not in relation and _is_named(other):  # x in [0, 1)
        return symbolic.relation_is_set(relation, other[-1])
    return symbolic.same_relation(relation, other)


def _relation_with_value(gold: str, relation: list[str] | None, answer: str, other: list[str] | None) -> bool:
    if other is not None and set(other[1::2]) == {"="}:
        return _has_value(other) and equal(gold, other[-1])
    if other is not None:
        return symbolic.relation_is_set(other, gold)
    assert relation is not None
    if set(relation[1::2]) == {"="}:
        return (_is_named(relation) or len(relation) > 3) and equal(relation[-1], answer)
    return symbolic.relation_is_set(relation, answer)


def _relation(text: str) -> list[str] | None:
    """[side, sign, side, ...] of a chain, without what it is about equal to; None if `text` is no relation."""
    inner = enclosed(text, "\\{")
    if inner is not None and "|" in inner:  # {x | 0 < x < 1}
        text = inner.partition("|")[2]
    sides, signs = divide(text, RELATION)
    if not signs or not all(sides):
        return None
    if signs[0] == "\\approx" and _OPERATION.search(_INDEX.sub("", sides[0])):
        return None
    if "\\approx" in signs[1:]:
        signs = signs[: signs.index("\\approx", 1)]
    same = {"\\approx": "=", "\\in": "=", "\\equiv": "="}
    return [part for side, sign in zip(sides, [*signs, ""]) for part in (side, same.get(sign, sign))][:-1]


def _is_named(relation: list[str]) -> bool:
    return set(relation[1::2]) == {"="} and not _OPERATION.search(_INDEX.sub("", relation[0]))


def _name(relation: list[str]) -> str:
    return re.sub(r"\s?\([^()]*\)$|[\s{}]", "", relation[0])


def _has_value(equation: list[str]) -> bool:
    """Whether it tells what something is worth: "x + y = 5", "2 + 3 = 5", but not "2x = 5"."""
    doubtful = re.search(r"\d\s*[A-Za-z\\(]|\^", _INDEX.sub("", equation[0]))
    return _is_named(equation) or len(equation) > 3 or not doubtful


def _unions(gold: str, answer: str) -> bool | None:
    parts, others = split(gold, UNION), split(answer, UNION)
    return True if len(parts) > 1 and len(others) > 1 and _cover(parts, others) else None


def _tuples(gold: str, answer: str) -> bool | None:
    """Tuples, points and intervals; with two members the kind of bracket counts."""
    first, second = _bracketed(gold), _bracketed(answer)
    if first is None or second is None:
        return None
    return (first[0] == second[0] or len(first[1]) > 2) and _pairwise(first[1], second[1])


def _bracketed(text: str) -> tuple[str, list[str]] | None:
    for opening in ("(", "[", "\\langle"):
        inner = enclosed(text, opening)
        if inner is not None:
            items = split(inner, SEMICOLON)
            items = items if len(items) > 1 else split(inner, COMMA)
            return (opening + text[-1], items) if len(items) > 1 else None
    return None


def _matrices(gold: str, answer: str) -> bool | None:
    rows, others = _rows(gold), _rows(answer)
    if rows is None or others is None:
        return None
    return len(rows) == len(others) and all(map(_pairwise, rows, others))


def _rows(text: str) -> list[list[str]] | None:
    inner = enclosed(text, MATRIX)
    return [split(row, "&") for row in split(inner, ROW)] if inner is not None else None
