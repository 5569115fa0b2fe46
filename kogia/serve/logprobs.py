"""Log-probabilities of tokens in the shapes of OpenAI's APIs."""

from collections.abc import Sequence
from typing import Any

from kogia.engine.request import Completion, TopLogprobs
from kogia.text.stream import IncrementalDecoder
from kogia.text.tokenizer import Tokenizer

LEAST = -9999.0
"""In place of minus infinity, which JSON has no number for."""


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[TopLogprobs] | None
) -> list[dict[str, Any]]:
    """One object per token, as chat completions have them."""
    tables = top or [{}] * len(token_ids)
    return [
        {
            **_token(tokenizer, token, value),
            "top_logprobs": [_token(tokenizer, each, own) for each, own in table.items()],
        }
        for token, value, table in zip(token_ids, logprobs, tables)
    ]


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token) if tokenizer.is_byte_level else tokenizer.decode([token]).encode()
    return {"token": tokenizer.decode([token]), "logprob": max(logprob, LEAST), "bytes": list(data)}


class TextLogprobs:
    """Log-probabilities as text completions have them: lists beside each other, with places in the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, IncrementalDecoder(tokenizer)
        self._offset = 0

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[TopLogprobs | None] | None,
    ) -> dict[str, Any]:
        """Of the next tokens."""
        offsets = []
        for token in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push([token]))
        return {
            "tokens": [self._tokenizer.decode([token]) for token in token_ids],
            "token_logprobs": [None if value is None else max(value, LEAST) for value in logprobs],
            "top_logprobs": None if top is None else [self._table(each) for each in top],
            "text_offset": offsets,
        }

    def _table(self, table: TopLogprobs | None) -> dict[str, float] | None:
        if table is None:
            return None
        return {self._tokenizer.decode([token]): max(value, LEAST) for token, value in table.items()}


def prompt_logprobs(tokenizer: Tokenizer, prompt: Sequence[int], completion: Completion) -> list[Any]:
    """vLLM's: per token of the prompt what could stand there, by token id; None for the first."""
    tables = completion.prompt_top_logprobs or [{}] * len(prompt)
    found: list[Any] = []
    for token, value, table in zip(prompt, completion.prompt_logprobs or [], tables):
        if value is None:
            found.append(None)
            continue
        own = {token: value, **(table or {})}
        found.append(
            {
                str(each): {"logprob": max(p, LEAST), "decoded_token": tokenizer.decode([each])}
                for each, p in own.items()
            }
        )
    return found


def routed_experts(completion: Completion) -> dict[str, Any]:
    """[tokens, mixture layers, topk] experts of prompt and completion, where they were asked for."""
    found = completion.routed_experts
    return {} if found is None else {"routed_experts": found.tolist()}
