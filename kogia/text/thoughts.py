"""The thought of an answer, told from the rest while both still come."""

from collections.abc import Sequence

from kogia.text.stream import num_tokens_within
from kogia.text.tokenizer import END_THINK, THINK, Tokenizer


class ThoughtSplitter:
    """Splits text that comes in pieces at the tags of a thought, which may come in pieces too.

    A thought is open from the start where the prompt opens it, else where the text begins with `<think>`. It ends with
    the first `</think>`; without one, all of it is thought. Blanks at both ends of a thought, and those before an
    answer that follows one, belong to neither. However the text is cut, the parts are the same.
    """

    def __init__(self, opens_thought: bool) -> None:
        self.is_open = opens_thought
        """Whether what comes next belongs to a thought."""
        self._may_open = not opens_thought
        self._pending = ""
        self._is_fresh = opens_thought
        """Nothing but blanks so far, of a part whose blanks in front do not count."""

    def push(self, text: str) -> tuple[str, str]:
        """(thought, answer) as far as both are known."""
        self._pending += text
        if self._may_open and not self._open():
            return "", ""
        thought = self._take_thought() if self.is_open else ""
        return thought, "" if self.is_open else self._take_answer()

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no more comes."""
        rest, self._pending = self._pending, ""
        if self.is_open:
            return (rest.strip() if self._is_fresh else rest.rstrip()), ""
        return "", rest if not self._is_fresh else rest.lstrip()

    def _open(self) -> bool:
        """Whether it is known if the text begins with a tag."""
        start = self._pending.lstrip()
        if start != THINK and THINK.startswith(start):
            return False
        self._may_open = False
        if start.startswith(THINK):
            self.is_open = self._is_fresh = True
            self._pending = start.removeprefix(THINK)
        return True

    def _take_thought(self) -> str:
        thought, closing, rest = self._pending.partition(END_THINK)
        if closing:
            self._pending, self.is_open = rest, False
            thought = thought.strip() if self._is_fresh else thought.rstrip()
            self._is_fresh = True
            return thought
        kept = held_back(thought, (END_THINK,))
        ready = thought[: len(thought) - kept].rstrip()
        if self._is_fresh:
            ready = ready.lstrip()
            if not ready:
                return ""
            thought = thought.lstrip()
            self._is_fresh = False
        self._pending = thought[len(ready) :]
        return ready

    def _take_answer(self) -> str:
        ready, self._pending = self._pending, ""
        if self._is_fresh:
            ready = ready.lstrip()
            self._is_fresh = not ready
        return ready


def num_thought_tokens(token_ids: Sequence[int], tokenizer: Tokenizer, opens_thought: bool) -> int:
    """Tokens of an answer before the `</think>` that ends its thought, where a `ThoughtSplitter` finds one: all of them
    where it never ends."""
    text = tokenizer.decode(token_ids)
    if not opens_thought and not text.lstrip().startswith(THINK):
        return 0
    before, closing, _ = text.partition(END_THINK)
    if not closing:
        return len(token_ids)
    return num_tokens_within(token_ids, tokenizer, len(before))


def held_back(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins one of the marks."""
    longest = min(max(map(len, marks)) - 1, len(text))
    if not any(mark[0] in text[len(text) - longest :] for mark in marks):
        return 0
    lengths = range(longest, 0, -1)
    return next((k for k in lengths if any(mark.startswith(text[-k:]) for mark in marks if len(mark) > k)), 0)
