"""The engine: requests in, completions out, any number of sequences per step.

    step:  Scheduler.plan -> Runner.launch -> (Flight.wait) -> Scheduler.settle, propose -> events

Where steps overlap, the next one is planned and launched before the flight of the last one is waited for.
The model is the trainer's own `Transformer`, used without gradients; nothing of it is copied.
"""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kogia import log
from kogia.engine.activation import ActiveExperts
from kogia.engine.blocks import hash_block
from kogia.engine.config import EngineConfig
from kogia.engine.draft_switch import DraftSwitch
from kogia.engine.drafting import why_not_drafts
from kogia.engine.graphs import why_not
from kogia.engine.intake import Intake
from kogia.engine.limits import (
    block_bytes,
    cache_layout,
    check_activation,
    check_budget,
    check_engine,
    has_sparse_attention,
)
from kogia.engine.loop import OnProgress, Stream, StreamLoop
from kogia.engine.memory import cache_budget
from kogia.engine.output import TextStream
from kogia.engine.pruning import Pruner
from kogia.engine.ranks import RankByContext
from kogia.engine.request import Completion, Request, SamplingParams, TokenEvent, derive_seed, num_top
from kogia.engine.rules import TokenRules
from kogia.engine.runner import Flight, Runner
from kogia.engine.scheduler import NO_LIMIT, Outcome, Scheduler
from kogia.engine.step import StepPlan, StepResult
from kogia.engine.thinking import Thought
from kogia.engine.views import CacheView, WholeCache
from kogia.engine.warm_up import warm_up
from kogia.model.cache import PagedCache, build_cache
from kogia.model.config import ModelConfig
from kogia.model.transformer import Transformer
from kogia.ops.dispatch import batch_invariant
from kogia.text.chat import Prompt
from kogia.text.tokenizer import Tokenizer

STEP_TOKENS = (1, 8, *(2**power for power in range(4, 15)))
"""Bounds by which steps are counted; vLLM's."""


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was built, or since the caller last put a new value into `Engine.stats`."""

    seconds: float = 0.0
    """Inside `Engine.step`."""
    num_steps: int = 0
    num_run_tokens: int = 0
    """Rows through the model: prefill, decode and drafts."""
    steps_by_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))
    """Steps that ran at most as many rows as each of STEP_TOKENS, and more than the one before; the last ran more."""
    num_generated_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_drafted: int = 0
    num_proposals: int = 0
    """Sequences' steps that verified drafts."""
    num_accepted: int = 0
    num_dropped_rows: int = 0
    """Cache rows that pruning dropped, each layer's counted."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafts that were right; 0 when nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0


class _Landing(NamedTuple):
    """A step that is over."""

    plan: StepPlan
    drafted: bool
    num_new: int
    """Tokens that it gave."""


class Engine:
    """Continuous batching over one model.

    `submit`, `generate` and `update_weights` may be called from several threads. `add`, `step` and `abort` are what
    they are made of, for one thread that does without them.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, config: EngineConfig | None = None) -> None:
        """Without a tokenizer there are no texts and no stop strings, only token ids."""
        self.config = config = config or EngineConfig()
        self.model = model
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self.weights_version = 0
        check_engine(model.config, config, model.dtype)
        self.is_deterministic = bool(config.deterministic)
        """Whether steps are batch-invariant."""
        self.overlap = model.device.type == "cuda" if config.overlap is None else config.overlap
        cache = _build_cache(model, config)
        self.pruner = None if config.prune is None else Pruner(config.prune, cache, config.max_sequences)
        self.scheduler = Scheduler(
            config,
            cache.num_blocks,
            tokenizer.eos_ids if tokenizer else (model.config.eos_id,),
            is_gpu=model.device.type == "cuda",
            **({} if self.pruner is None else self.pruner.limits()),
        )
        self.intake = Intake(tokenizer, self.scheduler.eos_ids, model.config, config.thinking_end_phrase)
        self.experts = ActiveExperts(model.config, config)
        view: CacheView = self.pruner or WholeCache(cache, self.scheduler.lookahead)
        if len(config.rank_by_context) > 1:  # one rank for all: the rows are that narrow, nothing is left to choose
            view = RankByContext(view, config.rank_by_context, model.device)
        longest = self._graph_length(cache, view)
        self.runner = Runner(model, cache, self.scheduler.table, view, self.experts, longest, config.num_draft_tokens)
        self.scheduler.drafts_ahead = self.runner.records_drafts
        self.draft_switch = DraftSwitch() if config.num_draft_tokens and config.adaptive_drafts else None
        """Pauses drafting; without one, every step drafts as configured."""
        self.num_draft_tokens = config.num_draft_tokens
        """Drafts per sequence of the next step: as many as configured, or 0."""
        self.clock = time.perf_counter
        self.loop = StreamLoop(self)
        self._flights: deque[Flight] = deque()
        self._news: list[TokenEvent] = []
        self._ids = count()
        self._has_warned = False
        model.absorb()

    def _graph_length(self, cache: PagedCache, view: CacheView) -> int | None:
        """The longest context of recorded decode steps, or None where they are not recorded."""
        reason = "pruning and ranks by context change what each layer sees"
        if self.is_deterministic:
            reason = "deterministic steps are not recorded"
        elif isinstance(view, WholeCache):
            reason = why_not(self.model, cache) or why_not_drafts(self.config.num_draft_tokens)
        if reason is None and self.config.graphs is not False:
            return min(self.model.config.max_position, self.scheduler.longest)
        if self.config.graphs:
            raise ValueError(f"engine.graphs = true: {reason}; leave it out, or set it to false")
        return None

    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile all kernels and record all graphs now, so that no request waits for one. Nothing on a CPU."""
        recorders = [graphs for graphs in (self.runner.draft_graphs, self.runner.graphs) if graphs is not None]
        warm_up(recorders, self.scheduler.budgets.prompts, on_progress)

    @property
    def num_unfinished(self) -> int:
        return self.scheduler.num_unfinished

    @property
    def num_generated_tokens(self) -> int:
        return self.stats.num_generated_tokens

    def submit(self, prompt: Prompt | Sequence[int], params: SamplingParams, *, stream: bool = True) -> Stream:
        """Start `params.n` continuations of a prompt; see `Stream`. Raises ValueError as `add` does."""
        return self.loop.submit(prompt, params, stream=stream)

    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_progress: OnProgress | None = None,
    ) -> list[list[Completion]]:
        """Continue every prompt to the end: `n` completions each, in order of the prompts.

        If anything fails, Ctrl-C included, nothing of this call stays in the engine.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} SamplingParams: give one for all, or one each")
        total, before = sum(own.n for own in each), self.totals().num_generated_tokens

        def report(num_ended: int) -> None:
            if on_progress is not None:
                on_progress(num_ended, total, self.totals().num_generated_tokens - before)

        done = dict(self.complete(zip(prompts, each, strict=True), on_step=report))
        return [done[place] for place in range(len(prompts))]

    def complete(
        self,
        requests: Iterable[tuple[Prompt | Sequence[int], SamplingParams]],
        *,
        ahead: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """`StreamLoop.complete`."""
        return self.loop.complete(requests, ahead=ahead, on_step=on_step)

    def totals(self) -> EngineStats:
        """A copy of `stats`, of all that work together."""
        return replace(self.stats, steps_by_tokens=list(self.stats.steps_by_tokens))

    def requests(
        self, prompt: Prompt | Sequence[int], params: SamplingParams, *, stream: bool = False
    ) -> list[Request]:
        """`params.n` continuations of a prompt, checked and not yet queued.

        With `stream`, `step` reports their tokens as they come, else only their ends. Raises ValueError for a prompt
        that is empty, too long for the model or the cache, or not made of the model's tokens, and for experts that the
        model has not. A completion for which
        context or cache have not all the room that `max_tokens` asks for ends earlier, with reason "length".
        """
        limit, vocab = self.model.config.max_position, self.model.config.vocab_size
        ids = np.asarray(prompt.token_ids if isinstance(prompt, Prompt) else prompt, dtype=np.int64)
        if not 0 < len(ids) < limit:
            raise ValueError(
                f"a prompt of {len(ids)} tokens: must have 1 to {limit - 1}, the model's context is {limit} and the "
                "completion needs room; shorten the prompt"
            )
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(
                f"prompt token ids span {ids.min()}..{ids.max()}: the model knows 0..{vocab - 1}; encode with the "
                "model's own tokenizer"
            )
        check_activation(self.model.config, params.active_experts, params.expert_threshold)
        self.intake.check(params)
        given = prompt if isinstance(prompt, Prompt) else self._as_given(prompt)
        max_length = self._max_length(len(ids), params.max_tokens)
        requests = [
            Request(next(self._ids), ids, params, derive_seed(params.seed, given.token_ids, index), max_length)
            for index in range(params.n)
        ]
        for request in requests:
            request.active_experts, request.expert_threshold = experts = self.experts.of(params)
            request.salt = self.intake.salt(params, self._salt(*experts))
            request.stream, request.given = stream, given
            request.is_awaited = stream
            request.rules = self.intake.rules(params, given)
            if self.tokenizer is not None and (stream or params.stop):
                request.output = TextStream(
                    self.tokenizer,
                    params.stop,
                    keeps_stop=params.include_stop_str_in_output,
                    min_tokens=params.min_tokens,
                )
            self.scheduler.check(request)
        return requests

    def _as_given(self, token_ids: Sequence[int]) -> Prompt:
        return Prompt(list(token_ids), False) if self.tokenizer is None else Prompt.of(token_ids, self.tokenizer)

    def _max_length(self, num_prompt: int, max_tokens: int) -> int:
        """Length at which a sequence ends. Where the cache is what bounds it, that is said once."""
        length, longest = min(num_prompt + max_tokens, self.model.config.max_position), self.scheduler.longest
        if length <= longest or num_prompt >= longest:  # the scheduler refuses a prompt that the cache cannot hold
            return length
        if not self._has_warned:
            self._has_warned = True
            log.warn(
                f"the whole cache holds {longest - 1} tokens, so a completion of {max_tokens} tokens may end early; "
                "raise engine.num_blocks or engine.cache_memory_bytes for longer ones"
            )
        return longest

    def add(self, prompt: Prompt | Sequence[int], params: SamplingParams, *, stream: bool = False) -> list[int]:
        """Queue what `requests` makes of a prompt; returns the ids that events will name."""
        requests = self.requests(prompt, params, stream=stream)
        self.queue(requests)
        return [request.id for request in requests]

    def queue(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> list[TokenEvent]:
        """Run one step. Events: the end of each request that ended, and new tokens of those that stream.

        Where steps overlap, they are those of the step before.
        """
        started, landed = self.clock(), []
        with self._whole():
            launched = self._launch()
            left_in_flight = 1 if launched and self.overlap else 0
            while len(self._flights) > left_in_flight:
                landed.append(self._land())
            if not self.num_unfinished:
                self._land_all()
                self.scheduler.limit = NO_LIMIT
        seconds = self.clock() - started
        self.stats.seconds += seconds
        if self.draft_switch is not None and launched:
            self._judge_drafts(self.draft_switch, landed, seconds)
        events, self._news = self._news, []
        return events

    def report(self, request: Request) -> TokenEvent | None:
        """The tokens of an unfinished request that have not been reported. Where there are none, None, and the next
        step that brings some reports them. Not while a step is under way."""
        outcome = self.scheduler.report(request)
        return None if outcome is None else self._event(outcome)

    def abort(self, request_id: int) -> Completion | None:
        """Give up a request and free its blocks; returns what it had, or None if it is not (any more) in the engine."""
        with self._whole():
            request = self.scheduler.abort(request_id)
            if not self.num_unfinished:
                self._land_all()  # its row and blocks are free when nothing in flight runs it
        return None if request is None else self._complete(Outcome(request, [], [], "abort"))

    def stop_thinking(self, request_id: int) -> bool:
        """Close the thought of an unfinished request from its next token on, as a budget does; nothing where none is
        open. False if there is no such request. For the one thread that steps; see `Stream.stop_thinking`."""
        request = self.scheduler.find(request_id)
        if request is None:
            return False
        if request.rules is None:
            request.rules = TokenRules([])
        thought = next((rule for rule in request.rules.rules if isinstance(rule, Thought)), None)
        if thought is None:
            thought = self.intake.thought(request.given)
            request.rules.add(thought, self.scheduler.generated(request))
        thought.stop()
        self.scheduler.table.note_rules(request)
        return True

    def update_weights(self, source: Transformer | Mapping[str, Tensor], version: int | None = None) -> None:
        """Use new weights from the next step on: copied into the model in place, so whoever shares it sees them too.

        `source` may be the engine's own model, already updated by a trainer. Cached prefixes are forgotten; unfinished
        requests keep their tokens and recompute their cache. `version` defaults to one more than before.
        """
        with self.loop.paused():
            with self._whole():
                self._land_all()
            self._take_weights(source)
            self.model.absorb()
            self.scheduler.recompute_all()
            for request in self.scheduler.waiting:
                if request.weights_version is None and len(request.token_ids) > len(request.prompt):
                    request.weights_version = self.weights_version
            self.weights_version = self.weights_version + 1 if version is None else version

    def forget_prefixes(self) -> int:
        """Let no later request find a cached prefix; running ones keep theirs. Returns how many blocks were known."""
        with self.loop.paused():
            return self._forget_prefixes()

    def _forget_prefixes(self) -> int:
        return self.scheduler.pool.forget_all()

    def _take_weights(self, source: Transformer | Mapping[str, Tensor]) -> None:
        if source is not self.model:
            target, new = self.model.state_dict(), source.state_dict() if isinstance(source, Transformer) else source
            check_weights(new, {name: tensor.shape for name, tensor in target.items()})
            with torch.no_grad():
                for name, tensor in target.items():
                    tensor.copy_(new[name])

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """For measurements: within the block, steps are batch-invariant where the configuration leaves that open and it
        costs little, on a CPU. Prefixes that were cached otherwise are not found.

        Raises ValueError where requests are under way.
        """
        config, model = self.config, self.model
        is_open = config.deterministic is None and config.prune is None
        if not is_open or model.device.type != "cpu" or has_sparse_attention(model.config):
            yield
            return
        if self.num_unfinished:
            raise ValueError(
                f"a measurement begins when the engine is idle: {self.num_unfinished} requests are not done"
            )
        self.is_deterministic = True
        try:
            with self.runner.unrecorded():  # recordings are of other implementations, or know the numbers of one step
                yield
        finally:
            self.is_deterministic = False

    def _salt(self, number: int, threshold: float) -> bytes:
        """Of the prefixes of a request with so many experts, which depend on how steps are computed, too."""
        salt = self.experts.salt(number, threshold)
        if self.is_deterministic == bool(self.config.deterministic):
            return salt
        return hash_block(b"deterministic" + salt, np.empty(0))

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails within, by Ctrl-C too, leaves no step in flight and nothing in the cache: blocks were promised to
        the prefix index but not written. Sequences keep their tokens."""
        try:
            yield
        except BaseException:
            self._flights.clear()
            self.scheduler.recompute_all()
            raise

    def _launch(self) -> bool:
        """Plan a step and start it, if there is one to plan."""
        if self.num_draft_tokens != self.scheduler.num_drafts:
            if self._flights:  # they must land first
                return False
            self.scheduler.draft(self.num_draft_tokens)
        plan = self.scheduler.plan()
        if plan is None:
            return False
        if tainted := self.scheduler.pool.take_to_clear():
            self.runner.clear(tainted)
        try:
            with batch_invariant() if self.is_deterministic else nullcontext():
                flight = self.runner.launch(plan, self.scheduler.num_drafts)
        except torch.OutOfMemoryError:
            if plan.num_tokens == 1:
                raise
            self._retreat(plan)
            return False
        self._flights.append(flight)
        if self.pruner is not None:
            self.stats.num_dropped_rows += self.pruner.prune(self.scheduler.table, plan)
        self._count(plan)
        return True

    def _retreat(self, plan: StepPlan) -> None:
        """Go on with smaller steps after one that did not fit into the device's memory: no request is lost."""
        self.scheduler.retreat(plan)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warn(
            f"the device has no memory for a step of {plan.num_tokens} tokens; steps have {self.scheduler.limit} at "
            "most now. Lower engine.max_batch_tokens, or engine.cache_memory_bytes, which leaves more to a step"
        )

    def _judge_drafts(self, switch: DraftSwitch, landed: Sequence["_Landing"], seconds: float) -> None:
        """Measure a step that landed, and say whether the next one drafts."""
        if len(landed) == 1 and landed[0].plan.only_newest:
            switch.note(len(landed[0].plan.rows), landed[0].drafted, seconds, landed[0].num_new)
        self.num_draft_tokens = self.config.num_draft_tokens if switch.wants(len(self.scheduler.running)) else 0

    def _land(self) -> "_Landing":
        """Wait for the oldest step in flight and take in what it brings."""
        flight = self._flights.popleft()
        plan, result = flight.plan, flight.wait()
        outcomes, num_new = self._settle(plan, result)
        if result.drafts.shape[1]:
            self.scheduler.propose(plan, result.drafts)
        self._news += [self._event(outcome) for outcome in outcomes]
        gained = int(num_new.sum())
        self.stats.num_generated_tokens += gained
        if self.config.num_draft_tokens:
            num_drafted, num_proposals = self.scheduler.take_drafted()
            self.stats.num_drafted += num_drafted
            self.stats.num_proposals += num_proposals
            self.stats.num_accepted += gained - int(np.count_nonzero(num_new))
        return _Landing(plan, result.drafts.shape[1] > 0, gained)

    def _settle(self, plan: StepPlan, result: StepResult) -> tuple[list[Outcome], NDArray[np.int64]]:
        return self.scheduler.settle(plan, result)

    def _land_all(self) -> None:
        while self._flights:
            self._land()

    def _event(self, outcome: Outcome) -> TokenEvent:
        request = outcome.request
        if outcome.token_ids and request.first_token is None:
            request.first_token = time.perf_counter()
        completion = None if outcome.finish_reason is None else self._complete(outcome)
        text = "" if request.output is None else request.output.take(final=completion is not None)
        return TokenEvent(request.id, outcome.token_ids, outcome.logprobs, text, completion, outcome.top_logprobs)

    def _complete(self, outcome: Outcome) -> Completion:
        request = outcome.request
        assert outcome.finish_reason is not None, "only what has ended is complete"
        start = len(request.prompt)
        token_ids: list[int] = request.token_ids[start:].tolist()
        if request.output is not None:
            text = request.output.finish()
        elif self.tokenizer is not None:
            text = self.tokenizer.decode(request.without_stop(token_ids) if outcome.ends_in_stop_token else token_ids)
        else:
            text = ""
        return Completion(
            token_ids=token_ids,
            text=text,
            logprobs=request.logprobs[start:].tolist() if request.params.logprobs else None,
            finish_reason=outcome.finish_reason,
            weights_version=self.weights_version if request.weights_version is None else request.weights_version,
            num_cached_tokens=request.num_cached_tokens or 0,
            num_drafted=request.num_drafted,
            num_accepted=request.num_accepted,
            opens_thought=request.given.opens_thought,
            top_logprobs=request.top_logprobs[: len(token_ids)] if num_top(request.params.logprobs) else None,
            routed_experts=self._routed_experts(request),
            error=None if request.rules is None else request.rules.error,
            times=request.times(),
            **request.prompt_scores(),
        )

    def _routed_experts(self, request: Request) -> NDArray[np.int16] | None:
        """Of what it has so far but the last token; that of nothing where it was given up before its first step."""
        if not request.params.return_routed_experts:
            return None
        count, found = len(request.token_ids) - 1, request.routed_experts
        return np.empty((0, 0, 0), dtype=np.int16) if found is None else found[:count].copy()

    def _count(self, plan: StepPlan) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_run_tokens += plan.num_tokens
        stats.steps_by_tokens[bisect_left(STEP_TOKENS, plan.num_tokens)] += 1
        stats.num_prefix_hit_tokens += self.scheduler.take_prefix_hit_tokens()
        stats.num_preemptions += self.scheduler.take_preemptions()


def _build_cache(model: Transformer, config: EngineConfig) -> PagedCache:
    cached, row = cache_layout(model.config, config)
    num_blocks = config.num_blocks or affordable_blocks(model.config, config, model.dtype, model.device)
    return build_cache(cached, num_blocks, config.block_size, dtype=model.dtype, device=model.device, row=row)


def affordable_blocks(model: ModelConfig, config: EngineConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Blocks within `cache_memory_bytes`, but no more than all sequences at full context could use."""
    given, block = config.cache_memory_bytes, block_bytes(model, config, dtype)
    budget = cache_budget(device) if given is None else given
    check_budget(budget, "the free memory" if given is None else "engine.cache_memory_bytes", block, config)
    longest = model.max_position if config.prune is None else min(model.max_position, config.prune.most_rows)
    return min(budget // block, config.max_sequences * -(-longest // config.block_size))


def check_weights(source: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError unless the tensors of new weights are those of a model, in name and shape."""
    wrong = sorted(source.keys() ^ shapes.keys()) or [
        f"{name} {tuple(source[name].shape)}" for name, shape in shapes.items() if source[name].shape != shape
    ]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"new weights do not fit the model: {shown}; they must come from the same configuration")
