"""Finding the final answer in a worked solution, in the order that `kogia.tasks.answers` documents.

Every scan is linear in the length of the text: a model is free to repeat any opening a thousand times.
"""

import re
from dataclasses import dataclass

from kogia.tasks.latex import FUNCTION, MINUS, clean
from kogia.tasks.numerals import CURRENCY, SCALES, read_quantity

_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?:(?P<box>\{)|(?P<token>\w))|\\[{}]|(?P<open>\{)|(?P<close>\})")
_DELIMITER = re.compile(r"\\\$|\$\$|\$|\\[()\[\]]|\n")
_CLOSING = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_SPACING = re.compile(r"\\(?:quad|qquad|[,; ()\[\]])|\\text\s?\{|[${}&]|\\$")
_JOINT = re.compile(r"\s*(?:[,;]?|[-+*_=]{3,})\s*(?:[\w() ]*\b(?:and|or)\b)?\s*(?:[A-Za-z]\w{0,9}\s*=)?\s*")
_MAX_JOINT = 80
_MAX_REST = 1000

_FINAL = re.compile(r"final answer(?:\*\*)?\s{0,9}(?:is\b:?|:|\n)\s{0,9}", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_LABEL = re.compile(r"(?:the\s)?(?:final\s)?answer(?:\sis\b:?|:)\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"'*)\]]|$)|\n")
_WORD = re.compile(r"(?:^|(?<=\s))[^\W\d_]{3,}(?=[\s.,:;?!]|$)")
_TEXT = re.compile(r"\\(?:text|math|mbox)\w{0,9}\s?\{[^{}]*\}")
_VALUE = re.compile(
    r"[\d=<>+*/^-]|\\(?:pi|infty|sqrt|[dtc]?frac|text|math|mbox|emptyset|varnothing|begin|le|ge|lt|gt|ne|in|pm)"
)
_COMMAND_OR_RELATION = re.compile(r"\\[A-Za-z]{2}|[A-Za-z]\s?\^|[A-Za-z][^=<>\n]{0,40}[=<>]")
_DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:,\d{3}){1,60}(?![\d,])|\d+)(?:\.\d+)?|\.\d+)"  # bounded, or a
# list of thousand numbers is walked through from each of them; what is longer no comparison reads
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w.)\]}}])-)?(?:[{CURRENCY}]\s?(?P<late>-)?)?(?<![\w.^{{])(?P<body>
      \\[dtc]?frac\s?\{{-?{_DECIMAL}\}}\s?\{{-?{_DECIMAL}\}}
      |\d+:\d+(?:\s?[AaPp]\.?[Mm]\b\.?)?
      |(?:\d+,\d\d|0,\d+)(?![\d,])
      |\d+\s\d+/[1-9]\d*
      |\d+\s?\^\s?(?:\{{-?\d+\}}|-?\d+)
      |{_DECIMAL}(?:[eE][-+]?\d+\b|\s?(?:\\times|\\cdot|[*x×])\s?10\s?\^\s?(?:\{{-?\d+\}}|-?\d+)|\s?/\s?[1-9]\d*(?:\.\d+)?)?
    )(?P<tail>\s?\\?%|\s(?:percent|{"|".join(SCALES)})\b)?""",
    re.VERBOSE | re.ASCII,
)

_GROUP = re.compile(
    rf"(?<![\w\\])[(\[{{]\s?-?{_DECIMAL}(?:/\d+)?(?:\s?[,;]\s?-?{_DECIMAL}(?:/\d+)?)+\s?[)\]}}]", re.ASCII
)
"""A point, an interval or a set that is written without dollars."""
_LEAD = re.compile(r"(?:so|thus|hence|then|therefore)\b[\s,:]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a solution: its content, and where it stands with its delimiters."""

    content: str
    start: int
    end: int


def extract_answer(text: str) -> str | None:
    """The final answer as it is written; None when there is none."""
    text = text.translate(MINUS)
    found = _boxes(text)
    declared = _declared(text, after=found[-1].end if found else 0)
    if declared is not None:
        return declared
    if found:
        return _joined(text, found)
    for find in (_open_box, _after_hashes, _whole, _after_final, _last_value):
        answer = find(text)
        if answer is not None:
            return answer
    return None


def states_formula(text: str) -> bool:
    """Whether `text` has a box or a formula between delimiters, so that the answer is a part of it."""
    return bool(_boxes(text) or _open_box(text) or _formulas(text))


def _boxes(text: str) -> list[Span]:
    """Every \\boxed{...} and \\fbox{...} that closes and is in no other one; as in TeX, "\\boxed 2" is one too."""
    opened: list[tuple[int, int, bool]] = []
    closed: list[Span] = []
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace["open"]:
            opened.append((brace.start(), brace.end(), brace["box"] is not None))
        elif brace["token"]:
            closed.append(Span(brace["token"], brace.start(), brace.end()))
        elif brace["close"] and opened:
            start, inner, is_box = opened.pop()
            while is_box and closed and closed[-1].start > start:
                closed.pop()
            if is_box:
                closed.append(Span(text[inner : brace.start()].strip(), start, brace.end()))
    return closed


def _joined(text: str, spans: list[Span]) -> str:
    """The last of `spans`, with those before it that commas, "and" or "or" join to it."""
    contents = [spans[-1].content]
    for earlier, later in zip(reversed(spans[:-1]), reversed(spans)):
        between = text[earlier.end : later.start] if later.start - earlier.end <= _MAX_JOINT else "."
        if not _JOINT.fullmatch(_SPACING.sub(" ", between)):
            break
        if earlier.content != contents[-1]:
            contents.append(earlier.content)
    return ", ".join(reversed(contents))


def _open_box(text: str) -> str | None:
    """What follows a box that never closes, to the end of its line."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    content = text[start:].partition("{")[2].partition("\n")[0].strip(" $") if start >= 0 else ""
    return content or None


def _declared(text: str, after: int) -> str | None:
    """The formula or number right behind the last "final answer is", if that stands behind `after`."""
    start = max((match.end() for match in _FINAL.finditer(text, after)), default=-1)
    if start < 0:
        return None
    rest = text[start : start + _MAX_REST]
    formulas = _formulas(rest)
    if formulas and formulas[0].start == 0:
        return formulas[0].content
    number = _NUMBER.match(rest)
    return _written(number) if number is not None else None


def _after_hashes(text: str) -> str | None:
    """What the last "####" marks. Prose behind it is a heading, unless the text ends there."""
    end = len(text.rstrip())
    for line in reversed(list(_HASHES.finditer(text))):
        marked = _LABEL.sub("", line[1].strip().strip("*_`").strip())
        if not _words(marked) or _is_number(marked):
            return marked
        if line.end() >= end:
            return _last_value(marked) or marked
    return None


def _whole(text: str) -> str | None:
    """All of a short text that is nothing but one number or one undelimited formula."""
    text = text.strip()
    if len(text) > _MAX_REST or _is_number(text):
        return text if len(text) <= _MAX_REST else None
    text = text[lead.end() :] if (lead := _LEAD.match(text)) else text
    undelimited = _COMMAND_OR_RELATION.search(text) and not _is_prose(text) and "\n" not in text
    return text if undelimited and not _formulas(text) else None


def _after_final(text: str) -> str | None:
    """The value of the first sentence behind the last "Final answer:" that has one."""
    start = max((match.end() for match in _FINAL.finditer(text)), default=-1)
    rest = text[start : start + _MAX_REST] if start >= 0 else ""
    ends = [end.end() for end in _SENTENCE_END.finditer(_without(rest, _formulas(rest)))]
    for begin, end in zip([0, *ends], [*ends, len(rest)]):
        answer = _last_value(rest[begin:end])
        if answer is not None:
            return answer
    return None


def _last_value(text: str) -> str | None:
    """In the last sentence that has any: the last formula with a value, else the last number; else the last formula."""
    formulas = _formulas(text)
    plain = _without(text, formulas)
    valued = [formula for formula in formulas if _VALUE.search(formula.content)]
    numbers = list(_NUMBER.finditer(plain))
    place = max([span.start for span in valued[-1:]] + [number.start() for number in numbers[-1:]], default=None)
    if place is None:
        return formulas[-1].content if formulas else None
    sentence = max((end.end() for end in _SENTENCE_END.finditer(plain, 0, place)), default=0)
    if valued and valued[-1].start >= sentence:
        return _joined(text, [formula for formula in valued if formula.start >= sentence])
    return _grouped(plain, numbers[-1]) or _written(numbers[-1])


def _grouped(text: str, number: re.Match[str]) -> str | None:
    """The brackets around a number, if they hold nothing but several numbers."""
    last = next((group for group in _GROUP.finditer(text) if group.end() >= number.end()), None)
    if last is None or last.start() > number.start() or _is_number(last[0][1:-1]):
        return None
    return last[0]


def _written(number: re.Match[str]) -> str:
    return ("-" if number["sign"] or number["late"] else "") + number["body"] + (number["tail"] or "")


def _formulas(text: str) -> list[Span]:
    """What stands between $...$, $$...$$, \\(...\\) or \\[...\\]. A dollar before an amount opens nothing."""
    found, opened = [], None
    for delimiter in _DELIMITER.finditer(text):
        sign = delimiter[0]
        if opened is None or (opened[0] == "$" and sign in ("$$", "\\(", "\\[")):
            opened = delimiter if _opens(text, delimiter) else None
        elif sign == _CLOSING[opened[0]]:
            content = text[opened.end() : delimiter.start()]
            if sign == "$" and _is_money(content, text[delimiter.end() : delimiter.end() + 1]):
                opened = delimiter if _opens(text, delimiter) else None
                continue
            if content.strip():
                found.append(Span(content.strip(), opened.start(), delimiter.end()))
            opened = None
        elif sign == "\n" and opened[0] in ("$", "\\("):
            opened = None
    return found


def _opens(text: str, delimiter: re.Match[str]) -> bool:
    after_amount = delimiter[0] == "$" and text[delimiter.start() - 1 : delimiter.start()].isdigit()
    return delimiter[0] in _CLOSING and not after_amount


def _is_money(content: str, following: str) -> bool:
    """Whether two dollars stand before amounts: "$18 and $20", "$5 each, or $"."""
    joint = content.strip(" ,") in ("", "and", "or")
    return joint or _is_prose(content) or (content[:1].isdigit() and following.isdigit())


def _is_prose(text: str) -> bool:
    return " " in text.strip() and bool(_words(text))


def _words(text: str) -> list[str]:
    words = _WORD.findall(_TEXT.sub("", text))
    return [word for word in words if word not in ("and", "or") and not FUNCTION.fullmatch(word)]


def _is_number(text: str) -> bool:
    return len(text) <= _MAX_JOINT and read_quantity(clean(text)) is not None


def _without(text: str, spans: list[Span]) -> str:
    """`text` with blanks in place of `spans`, and the full stop that one ends in."""
    pieces, end = [], 0
    for span in spans:
        last = "." if span.content.endswith(".") else " "
        pieces += [text[end : span.start], " " * (span.end - span.start - 1), last]
        end = span.end
    return "".join([*pieces, text[end:]])
