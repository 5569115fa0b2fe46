"""Where the thought of a completion is: open, closed, or closed by force, with a budget or on demand. Torch-free.

A thought is open where the prompt ends in "<think>", and from that token on where the model writes it itself. It ends
with "</think>", which is one token or several.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kogia.engine.rules import Edit, Rule, Words, pack_bits
from kogia.text.chat import Prompt, has_thinking_switch
from kogia.text.tokenizer import END_THINK, THINK, Tokenizer

_LONGEST_TAG = 16
"""Tokens in which a tag is looked for."""


@dataclass(frozen=True, slots=True)
class ThoughtState:
    """After some tokens of a completion."""

    is_open: bool
    may_open: bool = False
    """Nothing but blanks so far: the model may open a thought."""
    num_tokens: int = 0
    """Of the thought."""
    num_closing: int = 0
    """Tokens of the phrase and the tag that stand at its end by force."""
    recent: tuple[int, ...] = ()
    """The last tokens of an open thought, where its closing tag is several."""

    def is_answer(self, token: int, thought: "Thought") -> bool:
        """Whether the next token, if it is this one, belongs to the answer."""
        return not self.is_open and not (self.may_open and token in thought.opening_ids)


class Thought(Rule):
    """The rule that a thought ends after `budget` tokens, those in the prompt too, or as soon as `stop` is called: with
    `phrase` and the tag."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, vocab: int, budget: int | None = None, phrase: str = ""
    ) -> None:
        self._tokenizer, self._vocab, self._budget = tokenizer, vocab, budget
        self._is_stopped = False
        self._tag = tokenizer.encode(END_THINK)
        self._closing = tokenizer.encode(phrase) + self._tag
        opening = tokenizer.encode(THINK)
        # a template with a switch leaves the tag to the model, unless it has written an empty thought
        leaves = len(opening) == 1 and has_thinking_switch(tokenizer) and not _is_closed(prompt.token_ids, tokenizer)
        leaves = leaves and not (prompt.opens_thought or prompt.is_begun)
        self.opening_ids = tuple(opening) if leaves else ()
        """The tokens by one of which the model may open a thought."""
        begun = prompt.token_ids[len(prompt.token_ids) - min(prompt.num_thought, _LONGEST_TAG) :]
        recent = tuple(begun) if len(self._tag) > 1 else ()
        self.beginning = ThoughtState(prompt.opens_thought, leaves, prompt.num_thought, recent=recent)
        self._state = self.beginning

    def stop(self) -> None:
        """Close the thought as soon as may be."""
        self._is_stopped = True

    def after(self, state: ThoughtState, token: int) -> ThoughtState:
        """The state when one more token stands."""
        if state.may_open:
            stays = not self._tokenizer.decode([token]).strip()
            return replace(state, is_open=token in self.opening_ids, may_open=stays)
        if not state.is_open:
            return state
        num_closing = state.num_closing + 1 if token == self._forced(state) else 0
        recent = (*state.recent, token)[-_LONGEST_TAG:] if len(self._tag) > 1 else ()
        is_open = num_closing < len(self._closing) and not self._closes(token, recent)
        return ThoughtState(is_open, False, state.num_tokens + 1, num_closing, recent)

    def learn(self, token_ids: list[int]) -> None:
        for token in token_ids:
            self._state = self.after(self._state, token)

    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        state = self._state
        for token in drafts:
            state = self.after(state, token)
        forced = self._forced(state)
        if forced is not None:
            edit.force(self._only(forced))

    def _forced(self, state: ThoughtState) -> int | None:
        """The token that must be next."""
        is_due = self._is_stopped or (self._budget is not None and state.num_tokens >= self._budget)
        return self._closing[state.num_closing] if state.is_open and is_due else None

    def _closes(self, token: int, recent: tuple[int, ...]) -> bool:
        if len(self._tag) == 1:
            return token == self._tag[0]
        return END_THINK in self._tokenizer.decode(recent)

    def _only(self, token: int) -> Words:
        return pack_bits([token], self._vocab)


def _is_closed(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    return tokenizer.decode(prompt[-_LONGEST_TAG:]).rstrip().endswith(END_THINK)
