"""What a request says, checked against the model and turned into what the scheduler and the runner work with."""

from collections.abc import Collection, Sequence

from kogia.engine.request import SamplingParams
from kogia.engine.rules import Allowed, BadWords, Biases, NoStopBefore, Penalised, Rule, TokenRules
from kogia.text.tokenizer import Tokenizer


def check_params(params: SamplingParams, tokenizer: Tokenizer | None, vocab: int) -> None:
    """Raise ValueError for what an engine with this tokenizer and a model of `vocab` tokens cannot do."""
    for name, value, instead in (
        ("stop", params.stop, "stop_token_ids"),
        ("bad_words", params.bad_words, "logit_bias"),
    ):
        if value and tokenizer is None:
            kind = "stop strings" if name == "stop" else "words"
            raise ValueError(f"SamplingParams.{name} = {value}: {kind} need a tokenizer; use {instead}")
    for name, token_ids in (("logit_bias", params.logit_bias), ("allowed_token_ids", params.allowed_token_ids or ())):
        beyond = [token for token in token_ids if token >= vocab]
        if beyond:
            raise ValueError(
                f"SamplingParams.{name} names token {beyond[0]}: the model knows 0..{vocab - 1}; leave it out"
            )


def rules_of(
    params: SamplingParams, prompt: Sequence[int], tokenizer: Tokenizer | None, eos_ids: Collection[int], vocab: int
) -> TokenRules | None:
    """The rules of one request, whose parameters are checked; None where its tokens may be any."""
    rules: list[Rule] = []
    if params.allowed_token_ids is not None:
        rules.append(Allowed(params.allowed_token_ids, vocab))
    if params.bad_words:
        assert tokenizer is not None, "bad words are checked to have a tokenizer"
        rules.append(BadWords(_spellings(params.bad_words, tokenizer)))
    if params.min_tokens:
        rules.append(NoStopBefore(params.min_tokens, [i for i in params.stop_ids(eos_ids) if i < vocab]))
    if params.logit_bias:
        rules.append(Biases(params.logit_bias))
    repetition, frequency, presence = (
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    )
    if (repetition, frequency, presence) != (1, 0, 0):
        rules.append(Penalised(prompt if repetition != 1 else ()))
    return TokenRules(rules, (repetition, frequency, presence)) if rules else None


def _spellings(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each word at the beginning of a text and behind a space."""
    texts = [text for word in words for text in (word.lstrip() or word, f" {word.lstrip()}")]
    return list(dict.fromkeys(tuple(ids) for text in texts if (ids := tokenizer.encode(text))))
