"""Token ids to text as they come, without ever emitting part of a character."""

import codecs
import re
from collections.abc import Sequence

from kogia.text.tokenizer import Tokenizer

STRETCH = 256
"""Tokens that are read at once where none of them is looked for."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class IncrementalDecoder:
    """Turns a stream of ids into text.

    All pushed text and the final `flush` joined equal `Tokenizer.decode` of all ids, invalid bytes included.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._pieces = _Bytes(tokenizer) if tokenizer.is_byte_level else _Pieces(tokenizer)

    def push(self, ids: Sequence[int]) -> str:
        """Text completed by these ids; may be empty while a character is unfinished."""
        return self._pieces.push([i for i in ids if i not in self._skipped])

    def flush(self) -> str:
        """What was held back; U+FFFD where the stream stopped inside a character."""
        return self._pieces.flush()


class _Bytes:
    """Byte-level tokens: a token is a string of bytes, and the text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Pieces:
    """Tokens that are text, with `<0x..>` tokens for single bytes (Llama 2).

    A run of byte tokens is text only as a whole: one invalid byte in it turns each of them into U+FFFD. So it waits for
    the token that ends it. Any other token's text depends on nothing but whether it is the first of all (which loses
    its leading space), so what new tokens add shows behind the one token before them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._run: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        self._run += [i for i in ids if self._tokenizer.backend.id_to_token(i)]  # `decode` drops unknown ids
        end = next((k for k in range(len(self._run), 0, -1) if not self._is_byte(self._run[k - 1])), 0)
        return self._emit(end)

    def flush(self) -> str:
        return self._emit(len(self._run))

    def _emit(self, end: int) -> str:
        if end == 0:
            return ""
        ready, self._run = self._run[:end], self._run[end:]
        known = len(self._tokenizer.decode(self._before))
        text = self._tokenizer.decode(self._before + ready)[known:]
        self._before = ready[-1:]
        return text

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._tokenizer.backend.id_to_token(token_id) or "") is not None


def num_tokens_within(token_ids: Sequence[int], tokenizer: Tokenizer, num_chars: int) -> int:
    """How many tokens lie within the first characters of their text: those before the one that goes beyond.

    Only a stretch that goes beyond is read token by token, which for a long answer takes the better part of a second.
    """
    decoder, length = IncrementalDecoder(tokenizer), 0
    for start in range(0, len(token_ids), STRETCH):
        length += len(decoder.push(token_ids[start : start + STRETCH]))
        if length > num_chars:
            return start + _num_within_stretch(token_ids, tokenizer, num_chars, start)
    return len(token_ids)


def _num_within_stretch(token_ids: Sequence[int], tokenizer: Tokenizer, num_chars: int, start: int) -> int:
    decoder = IncrementalDecoder(tokenizer)
    length = len(decoder.push(token_ids[:start]))
    for count, token_id in enumerate(token_ids[start:]):
        length += len(decoder.push([token_id]))
        if length > num_chars:
            return count
    return len(token_ids) - start
