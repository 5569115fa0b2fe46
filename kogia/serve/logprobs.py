"""Log-probabilities of tokens in the shapes of OpenAI's APIs."""

from collections.abc import Sequence
from typing import Any

from kogia.engine.request import TopLogprobs
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
