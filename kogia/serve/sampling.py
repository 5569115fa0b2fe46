"""What requests of all APIs say about how tokens are drawn, and the `SamplingParams` that it makes. Names are vLLM's.

Thinking is one state with many names: DeepSeek's `thinking`, `reasoning_effort`, Qwen's `enable_thinking`, vLLM's
`chat_template_kwargs` and `thinking_token_budget`, OpenAI's and Anthropic's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from kogia.engine.grammar import ResponseFormat
from kogia.engine.request import SamplingParams
from kogia.serve.access import Caller
from kogia.serve.errors import ApiError, refused
from kogia.serve.exchange import current
from kogia.serve.fields import (
    MOST_COMPLETIONS,
    MOST_LOGPROBS,
    MOST_STOPS,
    MOST_TOKENS,
    Biases,
    Body,
    Count,
    Flag,
    Name,
    Part,
    Penalty,
    Real,
    Seed,
    Share,
    Stop,
    Stops,
    Text,
    Token,
    Whole,
    given,
    items,
)
from kogia.serve.served import ServedModel
from kogia.serve.tools import refused_call
from kogia.text.chat import Prompt

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: dict[str, int | None] = {
    "minimal": 512,
    "low": 2048,
    "medium": 8192,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""Most tokens of a thought by effort; "none" turns thoughts off."""
SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "priority",
    "active_experts",
    "expert_threshold",
    "return_routed_experts",
)
"""Fields that `SamplingParams` has under the same name."""
ENGINE_FIELDS = ("prompt", *(each.name for each in fields(SamplingParams)))
"""That its errors name."""


class StructuredOutputs(Part):
    """vLLM's: one of them."""

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], items(1000)] | None = None
    grammar: Text | None = None

    @property
    def format(self) -> ResponseFormat:
        choice = None if self.choice is None else tuple(self.choice)
        return ResponseFormat(json=self.json_, regex=self.regex, choice=choice, grammar=self.grammar)


GUIDED = "is vLLM's older word; send structured_outputs"


class SamplingBody(Body):
    """Of every request that generates."""

    instead = {  # noqa: RUF012 - pydantic's own declaration
        **{f"guided_{kind}": GUIDED for kind in ("json", "regex", "choice", "grammar")},
        "use_beam_search": "answers are sampled here; leave it out",
        "truncate_prompt_tokens": "nothing is cut from a prompt here; shorten it",
        "prompt_embeds": "a prompt is text or token ids here",
    }

    model: Name | None = None
    stream: Flag | None = None
    max_tokens: Annotated[Whole, Field(ge=0, le=2**20)] | None = None
    n: Annotated[Whole, Field(ge=1, le=MOST_COMPLETIONS)] | None = None
    temperature: Annotated[Real, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[Token], items(MOST_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Real, Field(ge=0.01, le=100)] | None = None
    logit_bias: Biases | None = None
    min_tokens: Annotated[Whole, Field(ge=0, le=2**20)] | None = None
    ignore_eos: Flag | None = None
    include_stop_str_in_output: Flag | None = None
    allowed_token_ids: Annotated[list[Token], items(MOST_TOKENS, 1)] | None = None
    bad_words: Stops | None = None
    priority: Annotated[Whole, Field(ge=-1000, le=1000)] | None = None
    """Lower goes first."""
    cache_salt: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: Count | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_token_ids: Flag | None = None
    return_routed_experts: Flag | None = None
    active_experts: Annotated[Whole, Field(ge=1, le=100_000)] | None = None
    expert_threshold: Share | None = None
    timings: Flag | None = None
    """Say how long each part of the work took."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def called(self) -> dict[str, str]:
        """What this body calls the engine's fields: their own names, where it says nothing else."""
        return dict(_called_alike(type(self)))


@cache
def _called_alike(body: type[SamplingBody]) -> Mapping[str, str]:
    """The engine's fields that a body has by the same names."""
    return {name: name for name in ENGINE_FIELDS if name in body.model_fields}


@dataclass(frozen=True)
class AskedFormat:
    """What an answer must be, and what the body calls it."""

    format: ResponseFormat
    called: Mapping[str, str]
    schemas: Sequence[str] = ()
    """Of calls of tools: where the body has their schemas, in the order of the grammar."""


@dataclass(frozen=True)
class Asked:
    """What a request asks of the engine, and what its body calls that."""

    params: SamplingParams
    called: Mapping[str, str]
    schemas: Sequence[str] = ()
    """As `AskedFormat`."""

    def refused(self, error: ValueError) -> ApiError:
        """400 for what the engine refuses, in the words of the body."""
        return refused_call(error, self.schemas) or refused(error, self.called)


class JsonSchema(Part):
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    name: Name | None = None
    strict: Flag | None = None


class Format(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def format_of(asked: Format | None) -> AskedFormat | None:
    """What a completion must be. Raises 400 for a schema that is missing, too large or too deep."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return AskedFormat(ResponseFormat(json={"type": "object"}), {"response_format": "response_format"})
    return schema_format(
        None if asked.json_schema is None else asked.json_schema.schema_, "response_format.json_schema"
    )


def schema_format(schema: Mapping[str, Any] | None, place: str) -> AskedFormat:
    """JSON of a schema that the body has at `place`. Raises as `format_of`."""
    name = f"{place}.schema"
    called = {"response_format": place.partition(".json_schema")[0], "response_format.json": name}
    if schema is None:
        raise ApiError(f"{name} is missing", param=name)
    try:
        return AskedFormat(ResponseFormat(json=schema), called)
    except ValueError as error:
        raise refused(error, called) from None


def _structured(body: SamplingBody) -> AskedFormat | None:
    if body.structured_outputs is None:
        return None
    called = {"response_format": "structured_outputs"}
    try:
        return AskedFormat(body.structured_outputs.format, called)
    except ValueError as error:
        raise refused(error, called) from None


def check_best_of(best_of: int | None, n: int | None) -> None:
    """Raise 400 where of several answers the better ones are asked for."""
    if best_of not in (None, n or 1):
        raise ApiError(f"best_of = {best_of}: must be n, as nothing is left out here; leave it out", param="best_of")


@dataclass(frozen=True)
class Thinking:
    """Whether an answer begins with a thought, and how long it may be."""

    enabled: bool | None = None
    """None is what the model does by itself."""
    budget: int | None = None


MOST_SCORES = 2**22
"""Log-probabilities in all the answers to a request: each takes some hundred bytes on its way out."""


def check_scores(num_tokens: int, top: int | None, name: str) -> None:
    """Raise 400 for more log-probabilities than an answer may have: each token's own and `top` others; None is none."""
    if top is not None and (wanted := num_tokens * (1 + top)) > MOST_SCORES:
        raise ApiError(
            f"{name} = {top}: {num_tokens:,} tokens have {wanted:,} log-probabilities then, and an answer at most "
            f"{MOST_SCORES:,}; ask for fewer, or set max_tokens",
            param=name,
        )


def sampling_params(
    body: SamplingBody,
    served: ServedModel,
    caller: Caller,
    prompt: Prompt,
    *,
    logprobs: bool | int = False,
    response_format: AskedFormat | None = None,
    thinking_budget: int | None = None,
    max_tokens: int | None = None,
) -> Asked:
    """What a request of any API asks of the engine. Raises 400 for what will not do.

    The arguments are what each API says in its own way; they go before fields of the body.
    """
    values: dict[str, Any] = {**served.defaults, **given(body, *SHARED)}
    values["top_k"] = max(0, values.get("top_k", 0))  # -1 is vLLM's word for off
    if body.logit_bias:
        values["logit_bias"] = _biases(body.logit_bias)
    num_tokens = _max_tokens(body.max_tokens if max_tokens is None else max_tokens, served, prompt)
    if num_tokens > (room := served.config.max_position - len(prompt.token_ids)) and (exchange := current.get()):
        exchange.notes.setdefault(
            "max_tokens", f"{body.called['max_tokens']} = {num_tokens}: the context leaves {room}"
        )
    left = min(num_tokens, served.config.max_position)
    top = None if logprobs is False else 0 if logprobs is True else logprobs
    check_scores(left * (body.n or 1), top, body.called.get("logprobs", "logprobs"))
    check_scores(len(prompt.token_ids), body.prompt_logprobs, "prompt_logprobs")
    if body.allowed_token_ids is not None:
        values["allowed_token_ids"] = tuple(body.allowed_token_ids)
    structured = _structured(body)
    if structured is not None and response_format is not None:
        other = response_format.called["response_format"]
        raise ApiError(
            f"structured_outputs with {other}: an answer has one format; leave one out", param="structured_outputs"
        )
    form = structured or response_format
    called = {**body.called, **({} if form is None else form.called)}
    try:
        params = SamplingParams(
            **values,
            n=body.n or 1,
            max_tokens=num_tokens,
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            bad_words=tuple(body.bad_words or ()),
            logprobs=logprobs,
            prompt_logprobs=False if body.prompt_logprobs is None else body.prompt_logprobs or True,
            response_format=None if form is None else form.format,
            thinking_token_budget=body.thinking_token_budget or thinking_budget,
            cache_salt=_salt(caller, body.cache_salt),
        )
    except ValueError as error:
        raise refused(error, called) from None
    return Asked(params, called, () if form is None else form.schemas)


def _max_tokens(asked: int | None, served: ServedModel, prompt: Prompt) -> int:
    """As asked, or as the server says, or what is left of the context."""
    left = max(1, served.config.max_position - len(prompt.token_ids))
    if asked is not None:
        return max(asked, 1)  # 0 scores a prompt: the one token that comes of it is not shown
    return min(left, served.max_tokens or left)


def _salt(caller: Caller, asked: str | None) -> str | None:
    """Of a key's prefixes: nobody shares them with another key, whatever salt he names."""
    parts = [part for part in (caller.salt, asked) if part]
    return ":".join(parts) or None


def _biases(given: dict[str, float]) -> dict[int, float]:
    wrong = next((token for token in given if not (token.isdecimal() and token.isascii() and len(token) < 10)), None)
    if wrong is not None:
        raise ApiError(f"logit_bias names {wrong!r:.40}: must be token ids, as digits", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}
