"""The form of a written answer: one spelling for what LaTeX and Unicode write in many, and where it divides."""

import re

MINUS = str.maketrans(dict.fromkeys("−－﹣–‐‑", "-"))
"""Signs that people write for a minus, the hyphens and the dash of a range among them."""
_SYMBOLS = MINUS | str.maketrans(
    {
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "×": "\\times ",
        "·": "\\cdot ",
        "⋅": "\\cdot ",
        "÷": "/",
        "π": "\\pi ",
        "≤": "\\leq ",
        "≥": "\\geq ",
        "≠": "\\neq ",
        "≈": "\\approx ",
        "∞": "\\infty ",
        "∪": "\\cup ",
        "∈": "\\in ",
        "±": "\\pm ",
        "√": "\\sqrt ",
        "²": "^2",
        "³": "^3",
        "½": " 1/2",
        "¼": " 1/4",
        "¾": " 3/4",
        "’": "'",
    }
)
_ROOT = re.compile(r"√(\d+)")
_EMPHASIS = re.compile(r"^([*_`]{1,3})(?=\S)(.*\S)\1$", re.DOTALL)
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname\*?)\s*\{([^{}]*)\}"
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in [
        (r"\\(?:boxed|fbox)\s*(?=\{)", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right)(?![a-zA-Z])\.?|\\(?:[bB]igg?[lrm]?|(?:display|text)style)(?![a-zA-Z])", ""),
        (r"\s*\{\s*,\s*\}\s*|,\s*\\!\s*", ","),  # 14{,}916 and 14,\!916
        (r"\\!", ""),
        (r"(?<!\\)\\(?:qquad|quad|[,;:> ])|~", " "),
        (_TEXT, r" \1 "),
        (_TEXT, r" \1 "),  # nested once
        (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\neq "),
        (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\?\$|(?<!\\)\\[()\[\]]", ""),
        (r"\\%|\s*\b(?:percent(?:age)?|pct)\b", "%"),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", "°"),
        (r"\^\s?(-\d+|\d{2,})", r"^{\1}"),  # 10^-5 and 2^10, of which TeX would raise one sign only
        (r"\s+", " "),
    ]
]
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{(?:[pbBvV]?matrix|array)\}(?:\{[lcr| ]*\})?(.*?)(?:\\\\ ?)?\\end\{\w+\}\s*[)\]]?"
)
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt pi infty infinity"
FUNCTION = re.compile(rf"(?<![\\a-zA-Z])({'|'.join(_FUNCTIONS.split())})(?![a-zA-Z])")
_BRACKET = re.compile(
    r"(?P<open>\\begin\{\w+\}|\\langle(?![a-zA-Z])|\\?\{|[(\[])|(?:\\end\{\w+\}|\\rangle(?![a-zA-Z])|\\?\}|[)\]])"
)
_AND = r"(?<![a-zA-Z\\])(?:and|or)(?![a-z])"
MATRIX = "\\begin{pmatrix}"
SEMICOLON = r";"
COMMA = rf"\s*,\s*{_AND}|\s*,|\s*{_AND}"
ROW = r"\\\\"
UNION = r"\\cup(?![a-zA-Z])"
RELATION = r"\\(?:leq|geq|neq|approx|in|equiv)(?![a-zA-Z])|[=<>]"


def clean(text: str) -> str:
    """`text` without delimiters, spacing, fonts and a closing full stop, in one spelling of its signs."""
    text = _ROOT.sub(r"\\sqrt{\1}", _EMPHASIS.sub(r"\2", text.strip())).translate(_SYMBOLS)
    if "\\begin" not in text:  # there "\\" ends a row, elsewhere it is a backslash that was escaped twice
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = _MATRIX.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    text = re.sub(r"[\s.,;:]+$", "", text).strip()
    inner = enclosed(text, "{")
    return clean(inner) if inner is not None else text


def enclosed(text: str, opening: str) -> str | None:
    """What stands inside the bracket `opening` and its partner, if they enclose all of `text`; else None."""
    end = closing(text, 0) if text.startswith(opening) else None
    return text[len(opening) : end[0]].strip() if end is not None and end[1] == len(text) else None


def closing(text: str, start: int) -> tuple[int, int] | None:
    """Where the bracket stands that closes the one at `start`; None if none does."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += 1 if match["open"] else -1
        if depth == 0:
            return match.span()
    return None


def divide(text: str, separator: str) -> tuple[list[str], list[str]]:
    """The parts of `text` around what matches `separator` outside all brackets, and those matches; one fewer."""
    parts, found, depth, start = [], [], 0, 0
    for match in re.finditer(rf"{_BRACKET.pattern}|(?P<separator>{separator})", text):
        if match["separator"] is None:
            depth += 1 if match["open"] else -1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            found.append(match[0].strip())
            start = match.end()
    return [*parts, text[start:].strip()], found


def split(text: str, separator: str) -> list[str]:
    """The parts that `divide` finds, without blank ones."""
    return [part for part in divide(text, separator)[0] if part]
