"""What a tokenizer.json may hold. It runs in this process, so its steps are known ones and their sizes bounded.

The library trusts the file: steps that each double the text, patterns that match in exponential time, a template of a
million tokens are all valid. On some files it panics, and on one kind it ends the process.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from kogia.text.patterns import pattern_shape

STEPS = {
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"),
    "pre_tokenizer": (
        *("ByteLevel", "Split", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
        *("UnicodeScripts", "BertPreTokenizer", "CharDelimiterSplit"),
    ),
    "post_processor": ("ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing"),
    "decoder": ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"),
}
_MEMBERS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
MAX_STEPS = 32
MAX_DEPTH = 8
MAX_CONTENT = 64
"""Characters that one step may put in."""
MAX_GROWTH = 16.0
"""Times that all replacements together may lengthen a text."""
MAX_PIECES = 64
"""Tokens that a template may add to a text."""
MAX_TOKEN = 10_000
"""Characters of one token."""


def check_tokenizer_file(data: Mapping[str, Any]) -> None:
    """Raises ValueError with the reason for a file that is not of the supported kinds or could take without bound."""
    _check_model(data.get("model"))
    for part in STEPS:
        steps = list(_flat(part, data.get(part), 0))
        if len(steps) > MAX_STEPS:
            raise ValueError(f"{part} has {len(steps)} steps, more than {MAX_STEPS}")
        growth = 1.0
        for step in steps:
            growth *= _growth(part, step)
        if growth > MAX_GROWTH:
            raise ValueError(f"{part} may make a text {growth:.3g} times as long, more than {MAX_GROWTH:g} times")
    for token in _list(data.get("added_tokens") or [], "added_tokens"):
        _check_length(token.get("content") if isinstance(token, Mapping) else token)


@contextlib.contextmanager
def panics_as_errors(subject: str) -> Iterator[None]:
    """A panic of the library, which is no Exception, as a ValueError about `subject`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # its module cannot be imported
            raise
        raise ValueError(f"{subject}: the tokenizers library gave up ({error}); use another tokenizer.json") from None


def _check_model(model: Any) -> None:
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("not a tokenizer.json of the BPE kind; use one of the DeepSeek, Qwen or Llama kind")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):  # on a wrong prefix the library ends the whole process
            raise ValueError(f"model.{key} = {model[key]!r} is not supported; it must be empty")
    vocabulary = model.get("vocab")
    for token in vocabulary if isinstance(vocabulary, dict) else ():
        _check_length(token)


def _check_length(token: Any) -> None:
    if isinstance(token, str) and len(token) > MAX_TOKEN:
        raise ValueError(f"token {token[:20]!r}... has {len(token)} characters, more than {MAX_TOKEN}")


def _flat(part: str, step: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    """The steps of one part, out of the sequences they stand in."""
    if step is None:
        return
    if not isinstance(step, Mapping) or depth > MAX_DEPTH:
        raise ValueError(f"{part} holds {step!r:.60}: must be a step, in at most {MAX_DEPTH} sequences")
    kind = step.get("type")
    if kind == "Sequence":
        for member in _list(step.get(_MEMBERS[part]), _MEMBERS[part]):
            yield from _flat(part, member, depth + 1)
    elif kind in STEPS[part]:
        yield step
    else:
        raise ValueError(f"{part} {kind!r:.60} is not supported; known are {', '.join(STEPS[part])}")


def _growth(part: str, step: Mapping[str, Any]) -> float:
    """How many times as long a step may make a text; ValueError for a step of unbounded size or cost."""
    if step["type"] == "TemplateProcessing":
        _check_template(step)
    if step["type"] == "Prepend":
        _content(part, step.get("prepend"))
    if step["type"] not in ("Split", "Replace"):
        return 1.0
    length, at_any_place = _matched(part, step.get("pattern"))
    if step["type"] == "Split":
        return 1.0
    return max(1.0, _content(part, step.get("content")) / length + at_any_place)


def _matched(part: str, pattern: Any) -> tuple[int, bool]:
    """The least number of characters that a pattern matches, or 1, and whether it may also match none."""
    if not isinstance(pattern, Mapping) or not all(isinstance(text, str) for text in pattern.values()):
        raise ValueError(f"{part}: pattern {pattern!r:.60}: must be a text or a regular expression")
    if text := pattern.get("String"):
        return len(text), False
    if "Regex" not in pattern:
        raise ValueError(f"{part}: pattern {pattern!r:.60}: must not be empty")
    try:
        return 1, pattern_shape(pattern["Regex"]).optional
    except ValueError as error:
        raise ValueError(f"{part}: the regular expression {pattern['Regex'][:60]!r} {error}; simplify it") from None


def _content(part: str, content: Any) -> int:
    if not isinstance(content, str) or len(content) > MAX_CONTENT:
        raise ValueError(f"{part} puts in {content!r:.60}: must be a text of at most {MAX_CONTENT} characters")
    return len(content)


def _check_template(step: Mapping[str, Any]) -> None:
    table = step.get("special_tokens")
    if not isinstance(table, Mapping):
        raise ValueError(f"post_processor: special_tokens {table!r:.60}: must be a table")
    ids = [_list(entry.get("ids") if isinstance(entry, Mapping) else None, "ids") for entry in table.values()]
    pieces = [_list(step.get(key), key) for key in ("single", "pair")]
    most = max(map(len, pieces), default=0) * max(1, max(map(len, ids), default=0))
    if most > MAX_PIECES or len(table) > MAX_PIECES:
        raise ValueError(f"post_processor may add {most} tokens to a text, more than {MAX_PIECES}")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r:.60}: must be a list")
    return value
