"""Changes that make a sound file, value or text into what somebody's broken or hostile one may be. All are seeded."""

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 100_000, 2**31, 2**53 + 1, 2**63, 2**64, 2**70, 10**400, 0.0, -0.0, 0.5, -1.5,
    1e-320, 1e300, 1.7e308, float("nan"), float("inf"), -float("inf"), "", " ", "none", "nan", "false", "1", "1e999",
    "\x00", "\x1b[31m", "\ud800", "\u2028", "\ufeff", "𝔘" * 50, "x" * 3000, "a/b", "../..", "/", "~", "a\x00b", [],
    [[]], [None], ["a", 1], [1] * 200, {}, {"": None}, {"a": {"b": []}}, {"type": []}, {"kind": ["x"]},
)  # fmt: skip
BYTES = (
    b"", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xc3", b"\n", b"\r", b"\n\n", b"{", b"}", b"[", b"]",
    b'"', b"\\", b",", b":", b"null", b"NaN", b"-Infinity", b"9" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\\ud800",
    b"\\u0000", b"1e999", b" " * 300, b"\x1b[2J", b"#", b"=", b"''", b'"""', b"\x85", b"\xe2\x80\xa8", b"1_0",
)  # fmt: skip


def mutated(value: Any, draw: random.Random, most: int = 3) -> Any:
    """A copy of a JSON value with one to `most` odd values, missing, doubled, renamed or moved parts."""
    value = deepcopy(value)
    for _ in range(draw.randint(1, most)):
        places = list(_places(value))
        if not places:
            return deepcopy(draw.choice(ODD))
        holder, key = draw.choice(places)
        _change(holder, key, value, draw)
    return value


def _places(value: Any) -> Any:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner)[:400]:
        yield value, key
        yield from _places(item)


def _change(holder: Any, key: Any, whole: Any, draw: random.Random) -> None:
    match draw.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(("extra", "", "\x9b", "type", str(key) + "_"))] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.insert(key, deepcopy(holder[key]))
        case 3:
            other, place = draw.choice(list(_places(whole)))
            holder[key] = deepcopy(other[place])
        case 4 if isinstance(holder[key], str):
            holder[key] = _changed_text(holder[key], draw)
        case 5 if isinstance(holder[key], int | float):
            holder[key] = draw.choice((holder[key] + 1, -holder[key], holder[key] * 2, holder[key] > 0, str(key)))
        case _:
            holder[key] = deepcopy(draw.choice(ODD))


def _changed_text(text: str, draw: random.Random) -> str:
    at = draw.randint(0, len(text))
    odd = draw.choice([item for item in ODD if isinstance(item, str)])
    return draw.choice((text[:at], text[:at] + odd + text[at:], text * 2, text[::-1], text.upper(), odd))


def mutated_bytes(data: bytes, draw: random.Random, most: int = 3) -> bytes:
    """The bytes cut off, with bits flipped, pieces doubled or removed, or odd ones put in."""
    for _ in range(draw.randint(1, most)):
        at, end = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
        match draw.randrange(6):
            case 0:
                data = data[:at]
            case 1 if data:
                flipped = bytearray(data)
                flipped[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
                data = bytes(flipped)
            case 2:
                data = data[:at] + data[min(end, at + 40) :]
            case 3:
                data = data[:end] + data[at : min(end, at + 200)] + data[end:]
            case _:
                data = data[:at] + draw.choice(BYTES) + data[at:]
    return data


def as_file(value: Any, draw: random.Random) -> bytes:
    """A JSON value as a file would hold it; one in four files is damaged as bytes as well."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(data, draw) if draw.random() < 0.25 else data


FRAGMENTS = (
    "\\boxed{", "\\fbox{", "\\boxed 2", "{", "}", "\\{", "\\}", "$", "$$", "\\$", "\\(", "\\)", "\\[", "\\]", "(", ")",
    "[", "]", "|", "\\left|", "\\right|", "<answer>", "</answer>", "<think>", "</think>", "<think>\n", "####", "#### ",
    "####\t", "\n", "\n\n", " ", "  ", "\t", "\r\n", "\u2028", "\xa0", ".", ",", ";", ":", "!", "?", "-", "--", "−",
    "+", "*", "**", "/", "//", "^", "^{", "_", "_{", "=", "<", ">", "\\le", "\\neq", "%", "\\%", "°", "'", '"',
    "&", "\\\\",
    "0", "1", "12", "1,234", ",234", "1.5", ".5", "1e9", "1e99999", "10^{99999}", "9^{9^9}", "3:15 PM", "101_2", "1/2",
    "2 1/2", "½", "٣", "三", "\\frac{", "\\frac12", "\\frac{1}{2}", "\\dfrac", "\\sqrt{", "\\sqrt2", "\\sqrt[3]{",
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\begin{array}{", "\\text{", "\\text{ million}", "\\mathrm{", "\\cup",
    "\\infty", "\\pi", "\\pm", "\\sum_{i=1}^{n}", "\\int_0^1", "\\lim_{x\\to0}", "\\binom{9}{4}", "x", "y", "e", "i",
    "sin", "\\sin", "and", "or", "The answer is ", "Final answer: ", "final answer is", "give up", "million", "dollars",
    "€", "a", "ab", "listen", "你好", "мы", "\ud800", "\x00", "\x1b[31m", "𝔘", "e\u0301", "\\", "\\x", "\\unknown{",
    "7*", "(7-", "7+", ")*2",
)  # fmt: skip


def text_of_fragments(draw: random.Random, longest: int = 30) -> str:
    """What a model might write, and worse."""
    return "".join(draw.choices(FRAGMENTS, k=draw.randint(0, longest)))


def repeated(draw: random.Random, length: int, fragments: Sequence[str] = FRAGMENTS) -> str:
    """About `length` characters: an opening, one to three fragments over and over, and an end."""
    unit = "".join(draw.choices(fragments, k=draw.randint(1, 3)))
    opening, end = draw.choice(fragments), draw.choice(fragments)
    return opening + unit * (length // len(unit)) + end
