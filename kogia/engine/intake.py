"""What a request says, checked against the model and turned into what the scheduler and the runner work with."""

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from kogia.engine.blocks import hash_block
from kogia.engine.grammar import Grammar, Grammars
from kogia.engine.request import SamplingParams
from kogia.engine.rules import NO_PENALTIES, Allowed, BadWords, Biases, NoStopBefore, Penalised, Rule, TokenRules
from kogia.engine.thinking import Thought
from kogia.model.config import ModelConfig
from kogia.text.chat import Prompt
from kogia.text.tokenizer import Tokenizer

NEEDS_TOKENIZER = {
    "stop": "stop strings need a tokenizer; use stop_token_ids",
    "bad_words": "words need a tokenizer; use logit_bias",
    "response_format": "formats need a tokenizer; leave it out",
    "thinking_token_budget": "the tags of a thought need a tokenizer; leave it out",
}


class Intake:
    """For the requests of one engine."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_ids: Collection[int], model: ModelConfig, phrase: str = ""
    ) -> None:
        """`eos_ids` are the model's end tokens, `phrase` what ends a thought that is closed by force."""
        self._phrase = phrase
        self.tokenizer, self.eos_ids, self.vocab = tokenizer, eos_ids, model.vocab_size
        self._has_experts = model.moe is not None

    @cached_property
    def _grammars(self) -> Grammars:
        assert self.tokenizer is not None, "formats are checked to have a tokenizer"
        return Grammars(self.tokenizer, self.vocab)

    def check(self, params: SamplingParams) -> None:
        """Raise ValueError for what this engine cannot do."""
        for name, rule in NEEDS_TOKENIZER.items():
            if self.tokenizer is None and (value := getattr(params, name)):
                raise ValueError(f"SamplingParams.{name} = {value}: {rule}")
        if params.return_routed_experts and not self._has_experts:
            raise ValueError("SamplingParams.return_routed_experts = True: the model has no experts; leave it out")
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            beyond = [token for token in getattr(params, name) or () if token >= self.vocab]
            if beyond:
                raise ValueError(
                    f"SamplingParams.{name} names token {beyond[0]}: the model knows 0..{self.vocab - 1}; leave it out"
                )

    def salt(self, params: SamplingParams, own: bytes) -> bytes:
        """What goes before the name of the first block: `own`, with the salt that the request names."""
        if params.cache_salt is None:
            return own
        named = hash_block(b"cache salt", np.frombuffer(params.cache_salt.encode(), dtype=np.uint8))
        return hash_block(own, np.frombuffer(named, dtype=np.uint8))

    def rules(self, params: SamplingParams, prompt: Prompt) -> TokenRules | None:
        """The rules of one request, whose parameters are checked; None where its tokens may be any. Raises ValueError
        for a format that cannot be compiled."""
        rules: list[Rule] = []
        thought = None
        if params.response_format is not None or params.thinking_token_budget is not None:
            thought = self.thought(prompt, params.thinking_token_budget)
        if params.response_format is not None:
            assert thought is not None and self.tokenizer is not None
            compiler, matcher = self._grammars.start(params.response_format)
            rules.append(Grammar(compiler, matcher, self.tokenizer.eos_ids, thought))
        if params.allowed_token_ids is not None:
            rules.append(Allowed(params.allowed_token_ids, self.vocab))
        if params.bad_words:
            rules.append(BadWords(self._spellings(params.bad_words)))
        if params.min_tokens:
            stop_ids = [token for token in params.stop_ids(self.eos_ids) if token < self.vocab]
            rules.append(NoStopBefore(params.min_tokens, stop_ids))
        if params.logit_bias:
            rules.append(Biases(params.logit_bias))
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        if penalties != NO_PENALTIES:
            rules.append(Penalised(penalties, prompt.token_ids if params.repetition_penalty != 1 else ()))
        if thought is not None and params.thinking_token_budget is not None:
            rules.append(thought)  # the last: what it forces is more than what others allow
        return TokenRules(rules) if rules else None

    def thought(self, prompt: Prompt, budget: int | None = None) -> Thought:
        """The rule that bounds the thought of a request. Raises ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("the tags of a thought need a tokenizer: build the engine with one")
        return Thought(self.tokenizer, prompt, self.vocab, budget, self._phrase)

    def _spellings(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each word at the beginning of a text and behind a space."""
        assert self.tokenizer is not None, "words are checked to have a tokenizer"
        texts = [text for word in words for text in (word.lstrip() or word, f" {word.lstrip()}")]
        return list(dict.fromkeys(tuple(ids) for text in texts if (ids := self.tokenizer.encode(text))))
