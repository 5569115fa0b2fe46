"""What goes into the engine and what comes out. Torch-free."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kogia import log
from kogia.engine.config import FilteredSamplingConfig, SamplingConfig
from kogia.engine.output import TextStream
from kogia.text.chat import ParsedResponse, Prompt

NOT_FINITE = "the model produced NaN or infinite logits: its weights or dtype overflow"
"""What "error" means, in words for the user."""
MOST_SHOWN = 60
"""Characters of a thought or an answer in the repr of a completion."""
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams(FilteredSamplingConfig):
    """How one prompt is continued."""

    max_tokens: int = 256
    n: int = 1
    """Completions of the same prompt; they share its cache blocks."""
    seed: int | None = None
    """None draws one. The same seed, prompt and model give the same tokens, whatever else the engine is running."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion. `text` is cut before the match, `token_ids` are not."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    """Return the log-probability of each token under softmax(logits / temperature), no filter applied."""
    active_experts: int | None = None
    """Routed experts that each token uses, fewer or more than the model was trained with; None is what the engine
    says. The shared experts are always on, and drafts follow."""
    expert_threshold: float | None = None
    """Drop the chosen experts whose gate is below this share of the best one's; None is what the engine says."""

    @classmethod
    def of(cls, settings: SamplingConfig, **changes: Any) -> "SamplingParams":
        """What the settings of a program say: the fields that it has by the same name, with `changes`."""
        shared = {field.name for field in fields(cls)} & {field.name for field in fields(settings)}
        return cls(**{name: getattr(settings, name) for name in shared} | changes)


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished continuation."""

    token_ids: list[int]
    """Every sampled token, the stop token included when one ended it."""
    text: str
    """Decoded text without the stop token or stop string."""
    logprobs: list[float] | None
    """One per token of `token_ids`, if asked for."""
    finish_reason: FinishReason
    """"stop": a stop token or string; "length": max_tokens, or context or cache are full; "abort": the caller gave up;
    "error": the model's logits were not finite, by weights or a dtype that overflow."""
    weights_version: int
    """Version of the weights that sampled the first token."""
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    num_drafted: int
    num_accepted: int
    opens_thought: bool = False
    """Whether the prompt ended in "<think>", so that `text` starts inside the thought."""

    @property
    def thinking(self) -> str | None:
        """What stands before the last `</think>`, stripped; None where nothing was thought."""
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


@dataclass(frozen=True, slots=True)
class TokenEvent:
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
    """Whether `Engine.step` reports every token or only the end."""
    active_experts: int = 0
    """Routed experts that its tokens use; 0 in a model that has none."""
    expert_threshold: float = 0.0
    salt: bytes = b""
    """What its cache rows depend on beside its tokens: goes before the name of the first block."""
    token_ids: NDArray[np.int64] = field(init=False)
    """Prompt and the tokens sampled before the last preemption."""
    logprobs: NDArray[np.float32] = field(init=False)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the full blocks of known tokens, as far as computed."""
    weights_version: int | None = None
    """Set when the weights change after the first token; None means the current ones."""
    num_cached_tokens: int | None = None
    num_drafted: int = 0
    num_accepted: int = 0

    def __post_init__(self) -> None:
        self.token_ids = self.prompt
        self.logprobs = np.zeros(len(self.prompt), dtype=np.float32)


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
    if failed and failed == len(completions):
        raise FloatingPointError(NOT_FINITE)
    if failed:
        log.warn(f"{failed} of {len(completions)} completions ended early: {NOT_FINITE}")
