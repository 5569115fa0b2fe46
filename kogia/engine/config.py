"""Settings of the engine, and those of sampling that every program has. Torch-free."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal

ACTIVE_EXPERTS_RULE = "a whole number from 1 to the routed experts there are; the shared ones are always on"
EXPERT_THRESHOLD_RULE = "in [0, 1]: a share of the best expert's gate (0 drops none)"
MOST_COMPLETIONS = 1_000_000
"""Of one prompt."""
MOST_LOGPROBS = 20
"""Likeliest tokens that come with each token."""
MOST_PHRASE_CHARS = 1000
_MOST_SHOWN = 100
"""Characters of a value that an error shows."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 2**31


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


def _is_logprobs(value: Any) -> bool:
    return isinstance(value, bool) or (_is_whole(value) and 1 <= value <= MOST_LOGPROBS)


def _is_penalty(value: Any) -> bool:
    return _is_number(value) and -2 <= value <= 2  # NaN is in no range


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    # float32 holds these, and a logit divided by them
    "temperature": (
        lambda value: _is_number(value) and (value == 0 or 1e-30 <= value <= 1e30),
        "0, which is greedy, or in [1e-30, 1e30]",
    ),
    "max_tokens": (lambda value: _is_whole(value) and value >= 1, "at least 1, a whole number"),
    "seed": (_is_whole, "a whole number"),
    "top_k": (lambda value: _is_whole(value) and 0 <= value < 2**31, "at least 0 (0 is off), whole and below 2^31"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "in (0, 1] (1 is off)"),
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "in [0, 1] (0 is off)"),
    "n": (lambda value: _is_whole(value) and 1 <= value <= MOST_COMPLETIONS, f"1 to {MOST_COMPLETIONS:,}, whole"),
    "stop": (_is_texts, "a tuple of non-empty strings"),
    "stop_token_ids": (
        lambda value: isinstance(value, tuple) and all(map(_is_token, value)),
        "a tuple of token ids, whole and at least 0",
    ),
    "include_stop_str_in_output": (lambda value: isinstance(value, bool), "true or false"),
    "ignore_eos": (lambda value: isinstance(value, bool), "true or false"),
    "active_experts": (  # one number, or several that an evaluation compares
        lambda value: all(_is_whole(each) and each >= 1 for each in (value if isinstance(value, tuple) else (value,))),
        ACTIVE_EXPERTS_RULE,
    ),
    "expert_threshold": (lambda value: _is_number(value) and 0 <= value <= 1, EXPERT_THRESHOLD_RULE),
    "min_tokens": (lambda value: _is_whole(value) and value >= 0, "at least 0 (0 is off), a whole number"),
    "logprobs": (_is_logprobs, f"true, false, or how many of the likeliest tokens come along, 1 to {MOST_LOGPROBS}"),
    "prompt_logprobs": (
        _is_logprobs,
        f"true, false, or how many of the likeliest tokens come along, 1 to {MOST_LOGPROBS}",
    ),
    "presence_penalty": (_is_penalty, "in [-2, 2] (0 is off)"),
    "frequency_penalty": (_is_penalty, "in [-2, 2] (0 is off)"),
    "repetition_penalty": (
        lambda value: _is_number(value) and 0.01 <= value <= 100,
        "in [0.01, 100] (1 is off; above 1 repeats less)",
    ),
    "logit_bias": (
        lambda value: (
            isinstance(value, Mapping)
            and all(_is_token(token) and _is_number(bias) and -100 <= bias <= 100 for token, bias in value.items())
        ),
        "a mapping of token ids to numbers in [-100, 100]",
    ),
    "allowed_token_ids": (
        lambda value: isinstance(value, tuple) and len(value) > 0 and all(map(_is_token, value)),
        "a tuple of at least one token id, whole and at least 0; None allows all",
    ),
    "bad_words": (_is_texts, "a tuple of non-empty strings"),
    "priority": (lambda value: _is_whole(value) and abs(value) < 2**31, "a whole number; lower ones come first"),
    "cache_salt": (lambda value: isinstance(value, str) and value != "", "a text that is not empty; None for no salt"),
    "return_routed_experts": (lambda value: isinstance(value, bool), "true or false"),
    "thinking_token_budget": (
        lambda value: _is_whole(value) and value >= 1,
        "at least 1, a whole number; for no thought at all turn thinking off, where the model's chat template can",
    ),
}
"""By field name: whether a value will do, and what it must be."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn: the settings of every program that samples, flat among its own."""

    temperature: float = 1.0
    """0 is greedy."""
    max_tokens: int = 512
    """Longest completion; one that has not ended by then is cut off."""
    seed: int | None = None
    """Makes sampling repeatable; None draws a new seed."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value that will not do, in the fields of subclasses too."""
        check_sampling(self)


def check_sampling(settings: Any) -> None:
    """Raise ValueError for a field of a dataclass that has a rule, another value than its default, and breaks it."""
    for name, default in _ruled(type(settings)):
        value = getattr(settings, name)
        if value is not default:
            holds, rule = _RULES[name]
            if not holds(value):
                raise ValueError(f"{name} = {value!r:.{_MOST_SHOWN}}: must be {rule}")


@cache
def _ruled(settings: type[Any]) -> Sequence[tuple[str, Any]]:
    """Fields of a dataclass that have a rule, with their defaults."""
    return [(field.name, field.default) for field in fields(settings) if field.name in _RULES]


@dataclass(frozen=True, kw_only=True)
class FilteredSamplingConfig(SamplingConfig):
    """With filters, which apply after the temperature: top-k, then top-p, then min-p."""

    top_k: int = 0
    """Keep the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this probability; 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 is off."""


@dataclass(frozen=True)
class PruneConfig:
    """Drop the least attended rows of long contexts, layer by layer: an approximation (engine.pruning says what of).

    The layers between the first and the last have budgets in a straight line between theirs. A cache block spans all
    layers, so a sequence holds blocks for its largest budget and slack: a smaller one in other layers saves the time to
    read rows, not their memory.
    """

    first_budget: int
    """Tokens kept per sequence in the first decoder layer."""
    last_budget: int
    """Tokens kept per sequence in the last decoder layer."""
    recent: int = 64
    """Newest tokens that are never dropped."""
    slack: int = 64
    """Layers are cut back to their budgets every `slack` tokens. Prefill chunks end there: raise it for longer ones."""

    def __post_init__(self) -> None:
        for name, bound in {"first_budget": 1, "last_budget": 1, "recent": 0, "slack": 1}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"engine.prune.{name} = {getattr(self, name)}: must be at least {bound}")
        if self.recent > min(self.first_budget, self.last_budget):
            raise ValueError(
                f"engine.prune.recent = {self.recent}: must fit into the budgets {self.first_budget} and "
                f"{self.last_budget}, which count the newest tokens too; lower it or raise them"
            )

    @property
    def first_cut(self) -> int:
        """Context length at which a layer may first drop rows: a multiple of `slack`, as all later ones are."""
        return (min(self.first_budget, self.last_budget) // self.slack + 1) * self.slack

    @property
    def most_rows(self) -> int:
        """Most rows that a layer ever holds of one sequence."""
        return max(self.first_budget, self.last_budget) + self.slack


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine may run at once. Naming a field of `prune`, such as `first_budget`, switches pruning on."""

    block_size: int = 16
    """Tokens per cache block: the unit of allocation and of prefix sharing."""
    num_blocks: int | None = None
    """Cache blocks; None derives them from `cache_memory_bytes`."""
    cache_memory_bytes: int | None = None
    """Most memory that the cache may take when `num_blocks` is not given; None takes 80% of what is free on a GPU once
    the model is loaded, and half of it on a CPU. It is never more than `max_sequences` whole contexts need."""
    max_batch_tokens: int | None = None
    """Token budget of one step, shared by prefill chunks, decodes and draft verification. None: 2,048, but 8,192
    on a GPU in steps in which no sequence decodes; where one does, its next token waits for the prompts beside it."""
    max_sequences: int = 256
    """Sequences that run at once; the rest wait."""
    num_draft_tokens: int = 0
    """Tokens drafted per step by the model's MTP module; 0 turns speculative decoding off."""
    adaptive_drafts: bool = True
    """Pause drafting while it gains nothing, as measured for each size of batch (`engine.draft_switch`)."""
    overlap: bool | None = None
    """Plan the next step while the present one runs; with drafts only where steps are recorded. None: on a GPU, where
    it hides the planning; on a CPU, which has nothing to hide it behind, a sequence that ends would only run one token
    more."""
    graphs: bool | None = None
    """Record decode steps as graphs, one per size of batch; on a CPU those of up to 16 tokens, or 256 where the
    vocabulary is small. None: where the model's kernels allow it."""
    deterministic: bool | None = None
    """Batch-invariant: tokens and log-probabilities are the same bit for bit whatever else runs, however prompts are
    cut and whatever prefixes are found. Slower (docs/deterministic.md); not with pruning or sparse attention. None:
    evaluations and RL's signal check on a CPU, where the model allows it, and nothing else."""
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the cached latents: the model's dtype, or FP8 with 16-bit rotary keys (latent attention only)."""
    rank_by_context: tuple[tuple[int, int], ...] = ()
    """[[tokens, rank], ...]: from a context of `tokens` on, queries read only the first `rank` numbers of the latents.
    Starts at 0, falls; no more than the first rank is stored. For models trained with `nested_rank_min`."""
    active_experts: int | None = None
    """Routed experts that each token uses; None is the number that the model was trained with. Requests may say their
    own; the shared experts are always on."""
    expert_threshold: float = 0.0
    """Drop the chosen experts whose gate is below this share of the best one's; 0 drops none. Requests may say their
    own."""
    prefix_cache: bool = True
    """Share the blocks of equal prefixes between sequences, and keep them after a sequence ends."""
    thinking_end_phrase: str = ""
    """What is written before `</think>` where a thought is closed by force, by its budget or on demand: without such
    words of its own a model may answer as if it still thought."""
    prune: PruneConfig | None = None
    """Bounds what long contexts cost by dropping little-attended rows (latent attention only); None keeps them all."""

    def share(self, number: int) -> "EngineConfig":
        """Of each of several engines that are to take as much as this one together."""
        blocks, memory = self.num_blocks, self.cache_memory_bytes
        return replace(
            self,
            max_sequences=-(-self.max_sequences // number),
            num_blocks=None if blocks is None else max(1, blocks // number),
            cache_memory_bytes=None if memory is None else memory // number,
        )

    def __post_init__(self) -> None:
        least = {"block_size": 1, "max_batch_tokens": 1, "max_sequences": 1, "num_draft_tokens": 0, "num_blocks": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and value >= bound):
                raise ValueError(f"engine.{name} = {value!r:.{_MOST_SHOWN}}: must be at least {bound}, a whole number")
        for name in ("active_experts", "expert_threshold"):
            value, (holds, rule) = getattr(self, name), _RULES[name]
            if value is not None and not holds(value):
                raise ValueError(f"engine.{name} = {value!r:.{_MOST_SHOWN}}: must be {rule}")
        phrase = self.thinking_end_phrase
        if len(phrase) > MOST_PHRASE_CHARS or "</think>" in phrase:
            raise ValueError(
                f"engine.thinking_end_phrase = {phrase[:40]!r}: must have at most {MOST_PHRASE_CHARS} characters and "
                "no </think>, which follows it"
            )
        table = self.rank_by_context
        tokens, ranks = [pair[0] for pair in table], [pair[1] for pair in table]
        if table and (tokens[0] != 0 or tokens != sorted(set(tokens)) or ranks != sorted(ranks, reverse=True)):
            raise ValueError(
                f"engine.rank_by_context = {[list(pair) for pair in table]}: must start at 0 tokens, with rising "
                "tokens and falling ranks, as [[0, 512], [32768, 256]]"
            )
        if table and ranks[-1] < 1:
            raise ValueError(f"engine.rank_by_context = {[list(pair) for pair in table]}: each rank must be at least 1")
        if self.prune is not None and self.deterministic:
            raise ValueError(
                "engine.deterministic with engine.prune: pruning counts attention in an order of its own; leave one out"
            )
        if self.prune is not None and (self.prefix_cache or self.num_draft_tokens):
            raise ValueError(
                f"engine.prune with prefix_cache = {self.prefix_cache} and num_draft_tokens = {self.num_draft_tokens}: "
                "pruned rows move up within their blocks, layer by layer, so no prefix can be shared and no rejected "
                "draft taken back; set prefix_cache = false and num_draft_tokens = 0"
            )
