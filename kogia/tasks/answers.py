"""Finding the final answer in a worked solution, and comparing two answers.

Plain numbers are compared exactly here. Everything else goes to math-verify, whose own time limits are switched off:
they need signals of the main thread and turn into silent zeros elsewhere. Callers run in processes that can be killed
(kogia.tasks.pool). An answer that math-verify cannot parse equals nothing.
"""

import logging
import re
from fractions import Fraction
from typing import Any

import math_verify

_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/[1-9]\d*)?|-?\.\d+", re.ASCII
)  # "5-3" ends in 3
_DECORATION = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[!,; ]|[$\s]|\\\$|\\%|%|\\left|\\right|\.$")
_UNIT = re.compile(r"(?:\s+(?!(?:dozen|hundred|thousand|million|billion|trillion)\b)[a-z]{2,})+\.?$", re.IGNORECASE)
_BOXED = "\\boxed"
_NESTING = {"{": 1, "}": -1}
_MAX_LENGTH = 1000

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports each answer it cannot parse, and no timeouts


def extract_answer(text: str) -> str | None:
    """The last \\boxed{...}, else what follows the last "####", else the last number; None when there is none."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    hashes = _HASHES.findall(text)
    if hashes:
        return hashes[-1].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces close, which may contain braces; None when there is none."""
    start = text.rfind(_BOXED)
    while start >= 0:
        content = _braced(text, start + len(_BOXED))
        if content is not None:
            return content.strip()
        start = text.rfind(_BOXED, 0, start)
    return None


def parse_number(text: str) -> Fraction | None:
    """The exact value of "1,234.5", "3/4", "$18", "\\frac{1}{2}", "18 dollars" or "50%" (read as 50), else None."""
    plain = _DECORATION.sub("", _UNIT.sub("", text.strip()[:_MAX_LENGTH]))
    plain = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", plain)
    if len(plain) > 40 or not _NUMBER.fullmatch(plain):
        return None
    try:
        return Fraction(plain.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def answers_match(gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`. The order matters to math-verify; an unparseable gold matches nothing."""
    if not gold.strip() or not answer.strip() or len(answer) > _MAX_LENGTH:
        return False
    gold_number, number = parse_number(gold), parse_number(answer)
    if gold_number is not None and number is not None:
        return gold_number == number
    parsed_gold, parsed = _parse(gold), _parse(answer)
    if not parsed_gold or not parsed:
        return False
    return bool(math_verify.verify(parsed_gold, parsed, timeout_seconds=None))


def _parse(text: str) -> list:
    # math-verify reads LaTeX only inside an environment. Without a fallback it returns no bare strings, which
    # would make two unparseable answers equal.
    bare = text.strip().strip("$")
    no_limit: Any = None  # the signature says int, None is what switches the signals off
    return math_verify.parse(f"${bare}$", fallback_mode="no_fallback", parsing_timeout=no_limit)


def _braced(text: str, start: int) -> str | None:
    while start < len(text) and text[start] == " ":
        start += 1
    if start >= len(text) or text[start] != "{":
        return None
    depth = 0
    for i in range(start, len(text)):
        depth += _NESTING.get(text[i], 0)
        if depth == 0:
            return text[start + 1 : i]
    return None
