"""How much a regular expression of a tokenizer.json can make its backtracking engine do, judged before it runs.

The engine (Oniguruma) tries one way to match after another. A pattern is refused where the number of ways can grow with
the power of the text's length, or with 2 to the length of text or pattern: a repeat of something that itself matches in
several ways, `(a+)+`, or two open repeats that a later part can send back, `a*a*b`. What tokenizers are made of passes:
alternatives of few classes, each with one open repeat, or two at the end.
"""

import re
from dataclasses import dataclass

MAX_CHARS = 20_000
MAX_DEPTH = 20
MAX_WAYS = 10_000
"""Combinations of alternatives and optional parts that one place of the text may cost."""
MAX_COUNT = 1000
"""Of counted repeats, which the engine writes out; nested ones multiply."""
WIDE = 16
"""A repeat of more than so many choices counts as open."""

_COUNTED = re.compile(r"\{(\d+)?(,)?(\d+)?\}")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[\w ]+\}|x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}"
    r"|[wWdDsShHRbBAzZGnrtfvae]|[^A-Za-z0-9])"
)
_GROUP = re.compile(r"\((?:\?(?:[:>=!]|<[=!]|<[A-Za-z_]\w*>|[im]*(?:-[im]+)?[:)]))?")
_ZERO_WIDTH = ("\\b", "\\B", "\\A", "\\z", "\\Z", "\\G", "^", "$")


@dataclass(frozen=True, slots=True)
class Shape:
    """What matters of a part of a pattern."""

    open: int = 0
    """Open repeats in a row, each of which multiplies the ways by the length of the text."""
    ways: int = 1
    """Ways in which the rest can match."""
    optional: bool = False
    """It matches at any place, so nothing before it is ever tried again for its sake."""
    count: int = 1
    """Characters that it stands for with counted repeats written out."""

    def repeated(self, least: int, most: int | None) -> "Shape":
        if (self.ways > 1 or self.open) and (most is None or most > 1):
            raise ValueError("repeats a part that itself matches in several ways")
        is_open = most is None or most - least >= WIDE
        ways = 1 if is_open else self.ways + (most or 0) - least
        count = self.count * max(least, most or 1)
        if count > MAX_COUNT:
            raise ValueError(f"counts {count} repeats, more than {MAX_COUNT}")
        return Shape(self.open + is_open, ways, self.optional or least == 0, count)


def pattern_shape(pattern: str) -> Shape:
    """The shape of a harmless pattern; ValueError with the reason for any other, and for syntax not known here."""
    if len(pattern) > MAX_CHARS:
        raise ValueError(f"has {len(pattern)} characters, more than {MAX_CHARS}")
    reader = _Reader(pattern)
    shape = reader.alternatives(0)
    if reader.at < len(pattern):
        raise ValueError("closes a group that it did not open")
    return shape


class _Reader:
    """Reads Oniguruma's syntax from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def alternatives(self, depth: int) -> Shape:
        """Up to the end of the group or pattern."""
        if depth > MAX_DEPTH:
            raise ValueError(f"nests more than {MAX_DEPTH} groups")
        branches = [self._sequence(depth)]
        while self._takes("|"):
            branches.append(self._sequence(depth))
        return Shape(
            max(branch.open for branch in branches),
            sum(branch.ways for branch in branches),
            any(branch.optional for branch in branches),
            max(branch.count for branch in branches),
        )

    def _sequence(self, depth: int) -> Shape:
        whole = Shape(optional=True, count=0)
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            part = self._repeats(self._atom(depth))
            if whole.open > 1 and (part.open or not part.optional):
                raise ValueError("has two open repeats before a part that can send both of them back")
            ways, count = whole.ways * part.ways, whole.count + part.count
            if ways > MAX_WAYS or whole.open + part.open > 2:
                raise ValueError(f"can match one place in more than {MAX_WAYS} ways")
            whole = Shape(whole.open + part.open, ways, whole.optional and part.optional, count)
        return whole

    def _repeats(self, atom: Shape) -> Shape:
        while bounds := self._quantifier():
            atom = atom.repeated(*bounds)
        return atom

    def _quantifier(self) -> tuple[int, int | None] | None:
        """Least and most repeats. What follows only says in which order they are tried."""
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(mark):
                if not self._takes("?"):
                    self._takes("+")
                return bounds
        counted = _COUNTED.match(self.pattern, self.at)
        least, comma, most = counted.groups() if counted else (None, None, None)
        if counted is None or (least is None and most is None):
            return None  # a brace that stands for itself
        self.at = counted.end()
        self._takes("?")
        return int(least or 0), int(most) if most else None if comma else int(least or 0)

    def _atom(self, depth: int) -> Shape:
        char = self.pattern[self.at]
        if char == "(":
            return self._group(depth)
        if char == "[":
            self._class(depth)
            return Shape()
        found = _ESCAPE.match(self.pattern, self.at) if char == "\\" else None
        if char == "\\" and found is None:
            raise ValueError(f"uses {self.pattern[self.at : self.at + 3]!r}, which is not known here")
        text = found.group() if found else char
        self.at += len(text)
        return Shape(count=0 if text in _ZERO_WIDTH else 1)

    def _group(self, depth: int) -> Shape:
        opening = _GROUP.match(self.pattern, self.at)
        if opening is None or (opening.group() == "(" and self.pattern.startswith(("(*", "(?"), self.at)):
            raise ValueError(f"uses {self.pattern[self.at : self.at + 4]!r}, which is not known here")
        self.at = opening.end()
        inner = self.alternatives(depth + 1)
        if opening.group().endswith(")"):  # (?i) holds to the end of the group around it
            return inner
        if not self._takes(")"):
            raise ValueError("leaves a group open")
        looks = opening.group() in ("(?=", "(?!", "(?<=", "(?<!")
        return Shape(inner.open, inner.ways, False, inner.count) if looks else inner

    def _class(self, depth: int) -> None:
        """Over a class of characters, with classes inside it."""
        if depth > MAX_DEPTH:
            raise ValueError(f"nests more than {MAX_DEPTH} classes")
        self.at += 1
        self._takes("^")
        self._takes("]")  # first of all it stands for itself
        while not self._takes("]"):
            if self.at >= len(self.pattern):
                raise ValueError("leaves a class open")
            if self.pattern[self.at] == "[":
                self._class(depth + 1)
            else:
                self.at += 2 if self.pattern[self.at] == "\\" else 1

    def _takes(self, mark: str) -> bool:
        found = self.pattern.startswith(mark, self.at)
        self.at += len(mark) if found else 0
        return found
