"""What the next token of a sequence may be, on the host: biases, penalties, bans and masks, token by token.

A rule answers for any prefix of a completion. Of the tokens that stand it is told once and may keep account; drafts
behind them are part of the question, so a draft that is rejected leaves nothing to take back. Torch-free.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int64]
"""[words] one bit per token of the vocabulary, 64 a word, the lowest first."""

Penalties = tuple[float, float, float]
"""Those of repetition, frequency and presence."""
NO_PENALTIES: Penalties = (1.0, 0.0, 0.0)


@dataclass(slots=True)
class Edit:
    """What happens to the logits of one token to be sampled; see `kogia.ops.adjust`."""

    bias: Mapping[int, float] = field(default_factory=dict)
    counts: Mapping[int, int] = field(default_factory=dict)
    """Of the tokens that penalties apply to: times in the completion."""
    penalties: Penalties = NO_PENALTIES
    """Of these tokens."""
    bans: list[int] = field(default_factory=list)
    mask: Words | None = None
    """None allows all."""

    def allow(self, words: Words) -> None:
        """Only what these bits allow as well."""
        self.mask = words if self.mask is None else self.mask & words

    def permit(self, token_ids: Sequence[int]) -> None:
        """These tokens too, where only some are allowed."""
        if self.mask is not None:
            self.mask = self.mask | pack_bits(token_ids, 64 * len(self.mask))

    def force(self, words: Words) -> None:
        """Only what these bits allow, whatever else was said."""
        self.mask, self.bans = words, []


class Rule(ABC):
    """One thing that a request says of its tokens."""

    error: str | None = None
    """Why it knows no answer any more; the request cannot go on."""

    @property
    def needs_tokens(self) -> bool:
        """Whether the answer depends on which tokens there are, not only on how many."""
        return True

    def learn(self, token_ids: list[int]) -> None:  # noqa: B027  (most rules take no note)
        """Take note of the next tokens of the completion that stand."""

    @abstractmethod
    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        """Say what follows `num_tokens` tokens of the completion, of which the last are `drafts`, the others learnt."""


class TokenRules:
    """The rules of one request, and how far they have been told of its tokens."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = list(rules)
        self._num_learnt = 0

    @property
    def needs_tokens(self) -> bool:
        """Whether a step must wait until the tokens before it are known."""
        return any(rule.needs_tokens for rule in self.rules)

    @property
    def error(self) -> str | None:
        """Why the request cannot go on, in words for the user."""
        return next((rule.error for rule in self.rules if rule.error), None)

    def add(self, rule: Rule, known: NDArray[np.int64]) -> None:
        """One more, which comes last, for a completion that has `known` tokens at least."""
        rule.learn(known[: self._num_learnt].tolist())
        self.rules.append(rule)

    def edits(self, known: NDArray[np.int64], drafts: NDArray[np.int64], num_pending: int) -> list[Edit]:
        """One for each of the next 1 + len(drafts) tokens of a completion with `known` tokens. `num_pending` more have
        been sampled, and are not known; of rules that need tokens there are then none."""
        assert not (num_pending and self.needs_tokens), "a rule was asked about tokens that are not known"
        fresh: list[int] = known[self._num_learnt :].tolist()
        if fresh:
            for rule in self.rules:
                rule.learn(fresh)
            self._num_learnt = len(known)
        first, guesses = len(known) + num_pending, drafts.tolist()
        return [self._edit(first + count, guesses[:count]) for count in range(len(guesses) + 1)]

    def _edit(self, num_tokens: int, drafts: list[int]) -> Edit:
        edit = Edit()
        for rule in self.rules:
            rule.apply(edit, num_tokens, drafts)
        return edit


class Counted(Rule):
    """A rule that need not know the tokens, only their number."""

    @property
    def needs_tokens(self) -> bool:
        return False


class Biases(Counted):
    """`logit_bias`."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._bias = bias

    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        edit.bias = self._bias


class Allowed(Counted):
    """`allowed_token_ids`."""

    def __init__(self, token_ids: Sequence[int], vocab: int) -> None:
        self._words = pack_bits(token_ids, vocab)

    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        edit.allow(self._words)


class NoStopBefore(Counted):
    """`min_tokens`."""

    def __init__(self, min_tokens: int, stop_ids: Sequence[int]) -> None:
        self._min_tokens, self._stop_ids = min_tokens, list(stop_ids)

    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        if num_tokens < self._min_tokens:
            edit.bans += self._stop_ids


class BadWords(Rule):
    """`bad_words`: the last token of a sequence is banned where the others stand before it."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._endings = [(tuple(ids[:-1]), ids[-1]) for ids in sequences]
        self._longest = max(len(before) for before, _ in self._endings)
        self._recent: list[int] = []

    @property
    def needs_tokens(self) -> bool:
        return self._longest > 0

    def learn(self, token_ids: list[int]) -> None:
        self._recent = (self._recent + token_ids)[-self._longest :] if self._longest else []

    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        recent = self._recent + drafts
        edit.bans += [last for before, last in self._endings if not before or tuple(recent[-len(before) :]) == before]


class Penalised(Rule):
    """The tokens that penalties apply to: those of the completion, and where repetition counts those of the prompt."""

    def __init__(self, penalties: Penalties, prompt: Sequence[int] = ()) -> None:
        self._penalties, self._counts = penalties, Counter(dict.fromkeys(prompt, 0))

    def learn(self, token_ids: list[int]) -> None:
        self._counts.update(token_ids)

    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        edit.counts, edit.penalties = self._counts, self._penalties
        if drafts:
            edit.counts = self._counts.copy()
            edit.counts.update(drafts)


def pack_bits(token_ids: Sequence[int], vocab: int) -> Words:
    """A mask in which the bits of these tokens are set."""
    bits = np.zeros(-(-vocab // 64) * 64, dtype=bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.dtype("<i8"))
