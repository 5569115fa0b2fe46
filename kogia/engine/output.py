"""Text of a growing completion: complete characters only, cut at a stop string."""

from collections.abc import Sequence

from kogia.text.stream import IncrementalDecoder
from kogia.text.tokenizer import Tokenizer


class TextStream:
    """Decodes one completion token by token and watches for its stop strings."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, keeps_stop: bool = False, min_tokens: int = 0
    ) -> None:
        """With `keeps_stop` the text is cut behind a stop string. One that ends before `min_tokens` is text."""
        self.text = ""
        self._keeps_stop, self._min_tokens, self._num_tokens = keeps_stop, min_tokens, 0
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop = tuple(stop)
        self._num_sent = 0
        self._is_cut = False

    @property
    def watches(self) -> bool:
        """Whether there is a stop string that any token may complete; without one, tokens may be pushed late."""
        return bool(self._stop)

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Append tokens. At the first stop string, cut the text there and return how many tokens that took."""
        if not self._stop:
            self.text += self._decoder.push(token_ids)
            return None
        for count, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            if self._append(self._decoder.push([token_id])):
                return count
        return None

    def finish(self) -> str:
        """The whole text, closed."""
        if not self._is_cut:
            self._append(self._decoder.flush())
        return self.text

    def _append(self, fresh: str) -> bool:
        """Add text; at a stop string, cut it there and return True."""
        since = max(0, len(self.text) - max(map(len, self._stop), default=1) + 1)
        self.text += fresh
        if self._num_tokens < self._min_tokens:
            return False
        found = [(place, stop) for stop in self._stop if (place := self.text.find(stop, since)) >= 0]
        if found:
            place, stop = min(found)
            self.text, self._is_cut = self.text[: place + len(stop) * self._keeps_stop], True
        return self._is_cut

    def take(self, *, final: bool) -> str:
        """Text not taken yet. Before the end, what may still become a stop string is held back."""
        end = len(self.text) if final else len(self.text) - self._held_back()
        fresh = self.text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return fresh

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = range(max(map(len, self._stop), default=1) - 1, 0, -1)
        return next((k for k in lengths if any(self.text.endswith(s[:k]) for s in self._stop if len(s) > k)), 0)


def printable(text: str) -> str:
    """`text` for a terminal: a model must not be able to send it escape sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
