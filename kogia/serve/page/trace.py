"""An answer looked at once more: how likely each of its tokens was, and which experts each was sent to.

The answer is run again as a prompt, so it need not have been asked for when it was written, and costs one pass.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from kogia.engine.request import Completion, SamplingParams, TopLogprobs
from kogia.serve.access import Caller
from kogia.serve.logprobs import LEAST
from kogia.serve.page.facts import mixture_layers
from kogia.serve.sampling import Asked
from kogia.serve.served import ServedModel
from kogia.text.stream import IncrementalDecoder
from kogia.text.tokenizer import Tokenizer

NUM_ALTERNATIVES = 5


def trace_params(
    served: ServedModel, caller: Caller, active_experts: int | None, expert_threshold: float | None
) -> Asked:
    """A request that scores its prompt. The one token that it draws besides is not looked at."""
    params = SamplingParams(
        max_tokens=1,
        temperature=1.0,
        prompt_logprobs=NUM_ALTERNATIVES,
        return_routed_experts=served.config.moe is not None,
        active_experts=active_experts,
        expert_threshold=expert_threshold,
        cache_salt=caller.salt,
    )
    return Asked(params, {"prompt": "messages", "active_experts": "active_experts"})


def trace_of(served: ServedModel, answer: Sequence[int], start: int, completion: Completion) -> dict[str, Any]:
    """What the page shows of the tokens of an answer, which begins at `start` of the prompt that was scored."""
    span = slice(start, start + len(answer))
    scores = (completion.prompt_logprobs or [])[span]
    tops = (completion.prompt_top_logprobs or [])[span]
    return {
        "model": served.name,
        "tokens": token_texts(served.tokenizer, answer),
        "token_ids": list(answer),
        "logprobs": [max(score or 0.0, LEAST) for score in scores],
        "top": [_alternatives(served.tokenizer, top or {}) for top in tops],
        **_experts(served, completion, span),
    }


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text that each token completes; together they are the text of all."""
    decoder = IncrementalDecoder(tokenizer)
    texts = [decoder.push([token]) for token in token_ids]
    return [*texts[:-1], texts[-1] + decoder.flush()]


def _alternatives(tokenizer: Tokenizer, top: TopLogprobs) -> list[tuple[int, str, float]]:
    return [(token, tokenizer.decode([token]), max(score, LEAST)) for token, score in top.items()]


def _experts(served: ServedModel, completion: Completion, span: slice) -> dict[str, Any]:
    """[tokens, layers, topk] as base64 of little-endian uint16; 65535 is nobody."""
    if completion.routed_experts is None:
        return {"experts": None, "layers": []}
    ids = np.ascontiguousarray(completion.routed_experts[span].astype("<i2"))
    return {"experts": base64.b64encode(ids.tobytes()).decode(), "layers": mixture_layers(served.config)}
