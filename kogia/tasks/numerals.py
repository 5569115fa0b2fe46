"""Plain numbers as people write them, read exactly: "1,234.5", "-$5", "2 1/2", "3.1 \\times 10^{-4}", "50%", "101_2".

The number is read first, and behind it only words of a closed list may stand (kogia.tasks.units): read whole or not at
all.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from kogia.tasks.latex import clean
from kogia.tasks.units import MEASURES, UNITS

MAX_DIGITS = 40
"""Characters of a number that is read here; the value of a power has at most ten times as many digits."""
NOISE = Fraction(1, 10**10)
"""Decimals of at least ten significant digits are equal within this, relative to the larger."""
MIN_ROUNDED = 6
"""A decimal is equal to what rounds to it if it has so many significant digits, and so many behind the point."""

CURRENCY = "$€£¥₹₩₽฿"
DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:[, ]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
_POWER = r"\s?\^\s?(?:\{\s?(?P<power>-?\d+)\s?\}|(?P<digit>\d))"
_TIMES = r"\s?(?:\\times|\\cdot|\*|x)\s?"
_FORMS = [
    re.compile(form, re.ASCII)
    for form in (
        r"(?P<whole>\d+)?\s?\\frac\s?(?P<top>\{[^{}]*\}|\d)\s?(?P<bottom>\{[^{}]*\}|\d)",
        r"(?P<whole>\d+)\s(?P<top>\d+)\s?/\s?(?P<bottom>\d+)",
        rf"(?P<top>{DECIMAL})\s?/\s?(?P<bottom>{DECIMAL})",
        rf"(?P<factor>{DECIMAL}){_TIMES}(?P<base>10){_POWER}",
        rf"(?P<base>\d+){_POWER}",
        rf"(?P<factor>{DECIMAL})[eE](?P<power>[-+]?\d+)",
        rf"(?P<factor>{DECIMAL})",
    )
]
_SIGN = re.compile(rf"(?P<minus>-?)\+?\s*[{CURRENCY}]?\s*(?P<late>-?)")
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s+({'|'.join(SCALES)})s?(?![a-zA-Z])")
_UNIT = re.compile(
    r"(?:\s*(?:/\s*|\\cdot\s*)?(°[CF]?|[A-Za-z]{2,})|(?:\s*/\s*|\s+)([mgshlL])(?![A-Za-z]))(?:\s?\^\s?(?:\{-?\d\}|-?\d))?"
)
_BASED = re.compile(r"(-?)\(?((?=\w*\d)[0-9A-Za-z]+)\)?\s?_\s?\{?\s?(\d{1,2})\s?\}?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Quantity:
    """An exact value and what its writing says about it."""

    value: Fraction
    decimals: int | None = None
    """Digits behind the point, None where there is no point."""
    digits: int = 0
    """Significant digits of a decimal."""
    percent: bool = False
    scaled: bool = False
    """Has a word such as "million"."""
    base: int = 10
    measure: str = ""
    """The unit of measurement, if a single one is given."""


def parse_number(text: str) -> Fraction | None:
    """The exact value of "1,234.5", "3/4", "$18", "\\frac{1}{2}", "18 dollars" or "50%" (read as 50), else None."""
    quantity = read_quantity(clean(text[:1000]))
    return quantity.value if quantity is not None and quantity.base == 10 and not quantity.scaled else None


def read_quantity(text: str) -> Quantity | None:
    """The number that all of `text` is, after `kogia.tasks.latex.clean`; None if it is none."""
    sign = _SIGN.match(text)
    assert sign is not None
    for form in _FORMS:
        number = form.match(text, sign.end())
        if number is not None:
            negative = (sign["minus"] or sign["late"]) == "-"
            return _quantity(number, negative, text[number.end() :]) or _read_based(text)
    return _read_based(text)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether the two are equal. A percentage is equal to its number and to its hundredth."""
    if gold.base != answer.base or (gold.measure and answer.measure and gold.measure != answer.measure):
        return False
    if same_number(gold, answer):
        return True
    if gold.percent == answer.percent:
        return False
    return gold.value / (100 if gold.percent else 1) == answer.value / (100 if answer.percent else 1)


def same_number(gold: Quantity, answer: Quantity) -> bool:
    """Whether the values are equal: exactly, but for float noise and for decimals that are clearly rounded."""
    difference = abs(gold.value - answer.value)
    if difference == 0:
        return True
    if max(gold.digits, answer.digits) >= 10 and difference <= NOISE * max(abs(gold.value), abs(answer.value)):
        return True
    return _rounds_to(gold, answer, difference) or _rounds_to(answer, gold, difference)


def _rounds_to(exact: Quantity, rounded: Quantity, difference: Fraction) -> bool:
    if rounded.decimals is None or min(rounded.decimals, rounded.digits) < MIN_ROUNDED:
        return False
    return difference <= Fraction(1, 2 * 10**rounded.decimals) and _needs_more(exact, rounded.decimals)


def _needs_more(exact: Quantity, decimals: int) -> bool:
    """Whether the value has digits behind the place that was rounded to: 18 is not what 17.9999999 rounds."""
    return (exact.value * 10**decimals).denominator != 1


def _quantity(number: re.Match[str], negative: bool, rest: str) -> Quantity | None:
    value = _value(number)
    if value is None:
        return None
    percent = rest.lstrip().startswith("%")
    scale, rest = _read_scale(rest.lstrip().removeprefix("%") if percent else rest)
    units = _read_units(rest)
    if units is None:
        return None
    decimals, digits = _precision(number)
    measure = MEASURES.get(units[0], "") if len(units) == 1 else ""
    return Quantity(
        -scale * value if negative else scale * value, decimals, digits, percent, scale != 1, measure=measure
    )


def _value(number: re.Match[str]) -> Fraction | None:
    """The value of a match of one of `_FORMS`; None if it is too large to be worth reading, or divides by zero."""
    groups = number.groupdict()
    power = _power(number)
    if len(number[0]) > MAX_DIGITS or abs(power) > 10 * MAX_DIGITS:
        return None
    try:
        if "top" in groups:
            return Fraction(groups.get("whole") or 0) + _decimal(groups["top"]) / _decimal(groups["bottom"])
        return _decimal(groups.get("factor") or "1") * Fraction(groups.get("base") or 10) ** power
    except (ValueError, ZeroDivisionError):
        return None


def _power(number: re.Match[str]) -> int:
    groups = number.groupdict()
    return int((groups.get("power") or groups.get("digit") or "0")[:MAX_DIGITS])


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[{}, ]", "", text))


def _precision(number: re.Match[str]) -> tuple[int | None, int]:
    factor = number.groupdict().get("factor") or ""
    if "." not in factor:
        return None, 0
    return len(factor.partition(".")[2]) - _power(number), len(re.sub(r"\D", "", factor).lstrip("0"))


def _read_scale(text: str) -> tuple[int, str]:
    """The product of the words like "million" that `text` starts with, and what follows them."""
    scale = 1
    while (word := _SCALE.match(text)) is not None:
        scale, text = scale * SCALES[word[1]], text[word.end() :]
    return scale, text


def _read_units(text: str) -> list[str] | None:
    """The words of `text`, all of which are units; None where anything else is there."""
    units, position = [], 0
    while (unit := _UNIT.match(text, position)) is not None:
        units.append(unit[1] or unit[2])
        position = unit.end()
    known = all(unit in UNITS or unit.lower() in UNITS for unit in units)
    return units if known and not text[position:].strip(f" .{CURRENCY}") else None


def _read_based(text: str) -> Quantity | None:
    """A number with its base as an index: "101_2"."""
    match = _BASED.fullmatch(text)
    if match is None or len(match[2]) > MAX_DIGITS or not 2 <= int(match[3]) <= 36:
        return None
    try:
        return Quantity(Fraction(int(match[1] + match[2], int(match[3]))), base=int(match[3]))
    except ValueError:  # a digit that this base does not have
        return None
