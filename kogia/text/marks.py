"""Marks of a model, as `<｜User｜>`, that the texts of others spell, and that stay text in a prompt.

A chat template puts texts and its own marks into one string, where nobody can tell them apart. So what spells a mark is
taken out of the texts before it, as a word that cannot be guessed, and put back when the string is cut there and its
parts are tokenised one by one. Texts that spell no mark are tokenised as they were.
"""

import re
import secrets
from collections.abc import Container
from functools import cached_property
from typing import Any

from kogia.text.tokenizer import Tokenizer


class Marks:
    """Of the texts of one prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._word = f"mark{secrets.token_hex(8)}x"
        self._hidden: dict[str, int] = {}
        """Marks by the number that is in their word."""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Of a word in place of a mark; few prompts need it."""
        return re.compile(rf"{self._word}(\d+)x")

    def hide(self, text: str, kept: Container[str] = ()) -> str:
        """The text with a word in place of each mark that it spells, but those that are kept."""
        parts, end = [], 0
        for start, stop in self._tokenizer.find_marks(text):
            mark = text[start:stop]
            if mark not in kept:
                number = self._hidden.setdefault(mark, len(self._hidden))
                parts += [text[end:start], f"{self._word}{number}x"]
                end = stop
        return "".join([*parts, text[end:]])

    def hide_in(self, value: Any) -> Any:
        """The same for all texts in a value as JSON has it."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide_in(each) for key, each in value.items()}
        return [self.hide_in(each) for each in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """A text with the marks in their places again, for people to read."""
        marks = list(self._hidden)
        if not marks:
            return text
        return self._pattern.sub(lambda found: marks[int(found[1])], text)

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of what was made of hidden texts, as `Tokenizer.encode`; what was hidden is text."""
        if not self._hidden:
            return self._tokenizer.encode(text, most)
        self._tokenizer.check_length(self.show(text), most)
        plain = [self._tokenizer.encode_plain(mark) for mark in self._hidden]
        first, *others = self._pattern.split(text)
        ids = self._tokenizer.encode(first)
        for number, part in zip(others[::2], self._tokenizer.encode_batch(others[1::2])):
            ids += plain[int(number)] + part
        return ids
