"""What goes into the engine and what comes out. Torch-free."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isnan
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kogia import log
from kogia.engine.config import FilteredSamplingConfig, SamplingConfig
from kogia.engine.grammar import ResponseFormat
from kogia.engine.output import TextStream
from kogia.engine.rules import TokenRules
from kogia.engine.step import TopTokens
from kogia.text.chat import ParsedResponse, Prompt

NOT_FINITE = "the model produced NaN or infinite logits: its weights or dtype overflow"
"""What "error" means, in words for the user."""
MOST_SHOWN = 60
"""Characters of a thought or an answer in the repr of a completion."""
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams(FilteredSamplingConfig):
    """How one prompt is continued. Names are vLLM's where it has them; docs/requests.md has an example of each.

    What changes the logits does so before temperature and filters, in the order of `kogia.ops.adjust`.
    """

    max_tokens: int = 256
    n: int = 1
    """Completions of the same prompt; they share its cache blocks."""
    seed: int | None = None
    """None draws one. The same seed, prompt and model give the same tokens, whatever else the engine is running."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion. `text` is cut before the match, `token_ids` are not."""
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    """Leave the stop string, or the text of the token of `stop_token_ids`, at the end of `text`."""
    ignore_eos: bool = False
    active_experts: int | None = None
    """Routed experts that each token uses, fewer or more than the model was trained with; None is what the engine
    says. The shared experts are always on, and drafts follow."""
    expert_threshold: float | None = None
    """Drop the chosen experts whose gate is below this share of the best one's; None is what the engine says."""
    min_tokens: int = 0
    """Before so many tokens no stop token is drawn and no stop string counts; not where nothing else is allowed."""
    logprobs: bool | int = False
    """Return the log-probability of each token under softmax(logits / temperature), without filters, biases, penalties
    and bans; with a number, the likeliest tokens too, as many of them."""
    prompt_logprobs: bool | int = False
    """The same for each token of the prompt but the first. None of it is then taken from the prefix cache."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that is in the completion."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that it is in the completion."""
    repetition_penalty: float = 1.0
    """Divides the logit, where it is negative multiplies it, of every token that is in prompt or completion."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens are drawn; None allows all."""
    bad_words: tuple[str, ...] = ()
    """The last token of each word, as the tokenizer splits it with and without a space before it, is not drawn where
    those before it stand. A word that the model spells in other tokens is not found."""
    response_format: ResponseFormat | None = None
    """What the completion must be, behind its thought if it has one; the end token is drawn where it is complete."""
    thinking_token_budget: int | None = None
    """Tokens after which an open thought is closed by force; None leaves it open."""
    priority: int = 0
    """Requests with a lower number are started first, get their tokens first and give way last: where there is no room
    for one, running ones of a higher number wait."""
    cache_salt: str | None = None
    """Only requests with the same salt share cached prefixes with this one, so that nobody else can find out by the
    time it takes what was asked."""
    return_routed_experts: bool = False
    """Return which experts each token was sent to. Nothing of the prompt is then taken from the prefix cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens = {self.min_tokens}: is more than max_tokens = {self.max_tokens}; lower it, or raise that"
            )
        if not isinstance(self.response_format, ResponseFormat | None):
            raise ValueError(
                f"response_format = {self.response_format!r:.80}: must be a kogia.ResponseFormat, such as "
                "ResponseFormat(json=schema)"
            )
        if self.response_format is not None and self.ignore_eos:
            raise ValueError(
                "ignore_eos with response_format: an answer in a format ends with the end token; leave it out"
            )

    def stop_ids(self, eos_ids: Iterable[int]) -> list[int]:
        """Tokens that end a completion, for a model with these end tokens; sorted."""
        return sorted({*self.stop_token_ids, *(() if self.ignore_eos else eos_ids)})

    @classmethod
    def of(cls, settings: SamplingConfig, **changes: Any) -> "SamplingParams":
        """What the settings of a program say: the fields that it has by the same name, with `changes`."""
        shared = {field.name for field in fields(cls)} & {field.name for field in fields(settings)}
        return cls(**{name: getattr(settings, name) for name in shared} | changes)


class Times(NamedTuple):
    """Seconds of a request, from the moment at which it was made."""

    queue: float
    """Until a step first had room for it."""
    prefill: float
    """From then to its first token; of a request that does not stream, to its end."""
    decode: float
    """From there to its end."""


TopLogprobs = dict[int, float]
"""Token id -> log-probability, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished continuation."""

    token_ids: list[int]
    """Every sampled token, the stop token included when one ended it."""
    text: str
    """Decoded text; without the stop token or stop string, unless `include_stop_str_in_output`."""
    logprobs: list[float] | None
    """One per token of `token_ids`, if asked for."""
    finish_reason: FinishReason
    """"stop": a stop token or string; "length": max_tokens, or context or cache are full; "abort": the caller gave up;
    "error": the model's logits were not finite, by weights or a dtype that overflow, or what `error` says."""
    weights_version: int
    """Version of the weights that sampled the first token."""
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    num_drafted: int
    num_accepted: int
    opens_thought: bool = False
    """Whether the prompt ended in "<think>", so that `text` starts inside the thought."""
    top_logprobs: list[TopLogprobs] | None = None
    """The likeliest tokens in place of each of `token_ids`, if a number of them was asked for."""
    prompt_logprobs: list[float | None] | None = None
    """One per token of the prompt, if asked for; None for the first, which nothing stands before."""
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    routed_experts: NDArray[np.int16] | None = field(default=None, compare=False)
    """[tokens, mixtures, topk] experts of each token of prompt and completion but the last, which is not run, in each
    mixture layer of the main model, if asked for; -1 is nobody, or a token that had not run when it was given up."""
    error: str | None = None
    """Why its `response_format` could not be followed any further."""
    times: Times = field(default=Times(0.0, 0.0, 0.0), compare=False)

    @property
    def thinking(self) -> str | None:
        """What stands before the first `</think>`, stripped; None where nothing was thought."""
        return self._parsed.thinking

    @property
    def answer(self) -> str:
        """What follows the thought, stripped; empty while the thought is not closed. Without a thought, all text."""
        return self._parsed.answer

    @property
    def _parsed(self) -> ParsedResponse:
        return Prompt([], self.opens_thought).parse(self.text)

    def __repr__(self) -> str:
        parsed = self._parsed
        thinking = "None" if parsed.thinking is None else _shortened(parsed.thinking)
        return (
            f"Completion(thinking={thinking}, answer={_shortened(parsed.answer)}, {len(self.token_ids)} tokens, "
            f"finish_reason={self.finish_reason!r})"
        )


class TokenEvent(NamedTuple):
    """News of one request after one step."""

    request_id: int
    token_ids: list[int]
    """New tokens."""
    logprobs: list[float]
    """One each, under softmax(logits / temperature), no filter applied."""
    text: str
    """New text that can no longer change; a possible beginning of a stop string is held back."""
    completion: Completion | None
    """Set once, when the request is done."""
    top_logprobs: list[TopLogprobs] | None = None
    """The likeliest tokens in place of each new one, if asked for."""


@dataclass(eq=False, slots=True)
class Request:
    """One sequence on its way through the engine. While it runs, its counters live in a `SequenceTable` row."""

    id: int
    prompt: NDArray[np.int64]
    params: SamplingParams
    seed: int
    max_length: int
    """Prompt and completion tokens may not exceed this."""
    output: TextStream | None = None
    """Text as it grows, for requests with stop strings or a listener; None decodes once, at the end."""
    stream: bool = False
    """Whether `Engine.step` reports new tokens or only the end."""
    on_demand: bool = False
    """Of one that streams: whether it reports tokens only when asked (`Engine.report`), but for the first ones and the
    end. What it does not report costs a step nothing."""
    is_awaited: bool = False
    """Whether the next step that brings it tokens reports them."""
    num_reported: int = 0
    """Tokens of the completion that have been."""
    row: int | None = None
    """In the `SequenceTable`, while it runs."""
    active_experts: int = 0
    """Routed experts that its tokens use; 0 in a model that has none."""
    expert_threshold: float = 0.0
    salt: bytes = b""
    """What its cache rows depend on beside its tokens: goes before the name of the first block."""
    given: Prompt = field(default_factory=lambda: Prompt([], opens_thought=False))
    """The prompt as it was given."""
    rules: TokenRules | None = None
    """What its next token may be; None where it may be any."""
    token_ids: NDArray[np.int64] = field(init=False)
    """Prompt and the tokens sampled before the last preemption."""
    logprobs: NDArray[np.float32] = field(init=False)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the full blocks of known tokens, as far as computed."""
    weights_version: int | None = None
    """Set when the weights change after the first token; None means the current ones."""
    num_cached_tokens: int | None = None
    made: float = field(default_factory=perf_counter)
    started: float | None = None
    """When a step first had room for it; on the clock of `made`."""
    first_token: float | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """Of the completion's tokens, where asked for."""
    prompt_logprobs: NDArray[np.float32] | None = field(init=False)
    """NaN where they are not known yet; None where they are not asked for."""
    prompt_top_logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    """By position."""
    routed_experts: NDArray[np.int16] | None = None
    """[max_length, mixtures, topk] as far as they are known, where asked for."""

    def __post_init__(self) -> None:
        wanted = self.params.prompt_logprobs
        self.prompt_logprobs = np.full(len(self.prompt), np.nan, dtype=np.float32) if wanted else None
        self.token_ids = self.prompt
        self.logprobs = np.zeros(len(self.prompt), dtype=np.float32)

    def times(self) -> Times:
        """Until now; what has not happened has taken all the time there was."""
        now = perf_counter()
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        return Times(started - self.made, first - started, now - first)

    def without_stop(self, token_ids: list[int]) -> list[int]:
        """Tokens that end in a stop token, as far as their text is wanted."""
        stays = self.params.include_stop_str_in_output and token_ids[-1] in self.params.stop_token_ids
        return token_ids if stays else token_ids[:-1]

    def note_top(self, position: int, best: Sequence[TopLogprobs]) -> None:
        """The likeliest tokens in place of those from `position` on; what was noted there before is forgotten."""
        del self.top_logprobs[position - len(self.prompt) :]
        self.top_logprobs += best

    def note_prompt(
        self, position: int, logprobs: NDArray[np.float32], top: TopTokens | None = None, first: int = 0
    ) -> None:
        """Log-probabilities of the prompt's tokens from `position` on; the likeliest in their place are those of `top`
        from row `first` on."""
        assert self.prompt_logprobs is not None, "they were not asked for"
        self.prompt_logprobs[position : position + len(logprobs)] = logprobs
        count = num_top(self.params.prompt_logprobs)
        if count and top is not None:
            for offset in range(len(logprobs)):
                self.prompt_top_logprobs[position + offset] = top.table(first + offset, count)

    def note_routes(self, position: int, experts: NDArray[np.int64]) -> None:
        """Experts of the tokens from `position` on, [tokens, mixtures, topk]."""
        if self.routed_experts is None:
            self.routed_experts = np.full((self.max_length, *experts.shape[1:]), -1, dtype=np.int16)
        count = min(len(experts), self.max_length - position)
        self.routed_experts[position : position + count] = experts[:count]

    def prompt_scores(self) -> dict[str, Any]:
        """Fields of a `Completion`; what has not run before the request was given up is None."""
        scores: dict[str, Any] = {}
        if self.prompt_logprobs is not None:
            scores["prompt_logprobs"] = [_known(value) for value in self.prompt_logprobs.tolist()]
            if num_top(self.params.prompt_logprobs):
                scores["prompt_top_logprobs"] = [self.prompt_top_logprobs.get(i) for i in range(len(self.prompt))]
        return scores


def _known(value: float) -> float | None:
    return None if isnan(value) else value


def num_top(logprobs: bool | int) -> int:
    """How many of the likeliest tokens a value of `logprobs` asks for."""
    return 0 if isinstance(logprobs, bool) else logprobs


def derive_seed(seed: int | None, prompt: Sequence[int], index: int) -> int:
    """Signed 64-bit seed of sample `index` of a prompt.

    The prompt is folded in so that different prompts of one batch do not move together; the place in the batch is
    not, so that a prompt samples the same tokens alone and in company.
    """
    if seed is None:
        return int.from_bytes(os.urandom(8), "little", signed=True)
    content = np.asarray([seed & (2**63 - 1), index, *prompt], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…")


def report_errors(completions: Sequence[Completion]) -> None:
    """Warn of completions that ended in "error". Raises FloatingPointError when all of them did."""
    failed = sum(completion.finish_reason == "error" for completion in completions)
    reason = next((completion.error for completion in completions if completion.error), NOT_FINITE)
    if failed and failed == len(completions):
        raise FloatingPointError(reason)
    if failed:
        log.warn(f"{failed} of {len(completions)} completions ended early: {reason}")
