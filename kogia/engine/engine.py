"""The engine: requests in, completions out, any number of sequences per step.

    step:  Scheduler.plan -> Runner.run -> speculative.accept -> Pruner.prune or Runner.draft -> events

The model is the trainer's own `Transformer`, used without gradients; nothing of it is copied.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kogia.engine.config import EngineConfig
from kogia.engine.output import TextStream
from kogia.engine.pruning import Pruner
from kogia.engine.request import Completion, FinishReason, Request, SamplingParams, TokenEvent, derive_seed
from kogia.engine.runner import Runner
from kogia.engine.scheduler import Scheduler, StepPlan
from kogia.engine.speculative import Accepted, accept
from kogia.model.cache import build_cache, latent_row
from kogia.model.config import ModelConfig
from kogia.model.transformer import Transformer
from kogia.ops.cache_rows import LatentRow
from kogia.text.tokenizer import Tokenizer


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was built, or since the caller last put a new value into `Engine.stats`."""

    seconds: float = 0.0
    """Inside `Engine.step`."""
    num_steps: int = 0
    num_run_tokens: int = 0
    """Rows through the model: prefill, decode and drafts."""
    num_generated_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_drafted: int = 0
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


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread adds, steps and aborts."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, config: EngineConfig | None = None) -> None:
        """Without a tokenizer there are no texts and no stop strings, only token ids."""
        self.config = config = config or EngineConfig()
        self.model = model
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self.weights_version = 0
        self.num_draft_tokens = config.num_draft_tokens
        """Drafts per step from now on; may be set to 0 between steps, but not back."""
        if config.num_draft_tokens and not model.config.num_mtp_layers:
            raise ValueError(
                f"engine.num_draft_tokens = {config.num_draft_tokens}: the model has no MTP module to draft with; set 0"
            )
        # Rows of the MTP layer are only kept for drafting.
        cached = model.config if config.num_draft_tokens else replace(model.config, num_mtp_layers=0)
        rank = config.rank_by_context[0][1] if config.rank_by_context else None
        row = latent_row(cached, fp8=config.cache_dtype == "fp8", rank=rank)
        if config.prune is not None and row is None:
            raise ValueError(
                "engine.prune: attention mass is counted on latent rows, but this model has key and value heads; "
                "leave it out"
            )
        num_blocks = config.num_blocks or _affordable_blocks(cached, config, model.dtype, row)
        cache = build_cache(cached, num_blocks, config.block_size, dtype=model.dtype, device=model.device, row=row)
        self.scheduler = Scheduler(config, num_blocks, tokenizer.eos_ids if tokenizer else (model.config.eos_id,))
        self.pruner = None if config.prune is None else Pruner(config.prune, cache, self.scheduler.table)
        self.runner = Runner(model, cache, self.scheduler.table, config.rank_by_context, self.pruner)
        self._num_requests = 0

    @property
    def num_unfinished(self) -> int:
        return self.scheduler.num_unfinished

    def add(self, prompt: Sequence[int], params: SamplingParams, *, stream: bool = False) -> list[int]:
        """Queue `params.n` continuations of a prompt; returns their request ids.

        With `stream`, `step` reports their tokens as they come, else only their ends. Raises ValueError for a prompt
        that is empty, too long for the model or the cache, or not made of the model's tokens.
        """
        limit, vocab = self.model.config.max_position, self.model.config.vocab_size
        ids = np.asarray(prompt, dtype=np.int64)
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
        if params.stop and self.tokenizer is None:
            raise ValueError(f"SamplingParams.stop = {params.stop}: stop strings need a tokenizer; use stop_token_ids")
        max_length = min(len(ids) + params.max_tokens, limit)
        requests = [
            Request(self._num_requests + index, ids, params, derive_seed(params.seed, prompt, index), max_length)
            for index in range(params.n)
        ]
        for request in requests:
            request.stream = stream
            if self.tokenizer is not None and (stream or params.stop):
                request.output = TextStream(self.tokenizer, params.stop)
            self.scheduler.add(request)
        self._num_requests += len(requests)
        return [request.id for request in requests]

    def step(self) -> list[TokenEvent]:
        """Run one step. Events: the end of each request that ended, and new tokens of those that stream."""
        started = time.perf_counter()
        plan = self.scheduler.plan()
        if plan is None:
            return []
        try:
            with torch.no_grad():
                result = self.runner.run(plan)
                accepted = accept(
                    self.scheduler.table,
                    self.scheduler.pool,
                    plan,
                    result.tokens,
                    result.logprobs,
                    lookahead=self.scheduler.lookahead,
                )
                if self.pruner is not None:
                    self.stats.num_dropped_rows += self.pruner.prune(plan)
                if self.num_draft_tokens:
                    self.runner.draft(result, plan, self.num_draft_tokens)
        except BaseException:  # Ctrl-C included: blocks were promised to the prefix index but not written
            self.scheduler.recompute_all()
            raise
        events = self._report(plan, accepted)
        self._count(plan, accepted, time.perf_counter() - started)
        return events

    def abort(self, request_id: int) -> Completion | None:
        """Give up a request and free its blocks; returns what it had, or None if it is not (any more) in the engine."""
        request = self.scheduler.abort(request_id)
        return None if request is None else self._complete(request, "abort", stopped=False)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_progress: Callable[[int, int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Continue every prompt to the end: `n` completions each, in order of the prompts.

        `on_progress(num_finished, total, num_tokens)` is called after every step. If anything fails, Ctrl-C included,
        nothing of this call stays in the engine.
        """
        if self.num_unfinished:
            raise ValueError(f"generate() needs an idle engine, {self.num_unfinished} requests are unfinished")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} SamplingParams: give one for all, or one each")
        ids: list[list[int]] = []
        done: dict[int, Completion] = {}
        before = self.stats.num_generated_tokens
        try:
            for prompt, own in zip(prompts, each, strict=True):
                ids.append(self.add(prompt, own))
            total = sum(map(len, ids))
            while self.num_unfinished:
                done.update({e.request_id: e.completion for e in self.step() if e.completion is not None})
                if on_progress is not None:
                    on_progress(len(done), total, self.stats.num_generated_tokens - before)
        except BaseException:
            self.abort_all()
            raise
        return [[done[request_id] for request_id in group] for group in ids]

    def abort_all(self) -> None:
        """Empty the engine."""
        self.scheduler.recompute_all()
        self.scheduler.waiting.clear()

    def update_weights(self, source: Transformer | Mapping[str, Tensor], version: int | None = None) -> None:
        """Use new weights from the next step on: copied into the model in place, so whoever shares it sees them too.

        `source` may be the engine's own model, already updated by a trainer. Cached prefixes are forgotten; unfinished
        requests keep their tokens and recompute their cache. `version` defaults to one more than before.
        """
        if source is not self.model:
            _copy_weights(self.model, source.state_dict() if isinstance(source, Transformer) else source)
        self.scheduler.recompute_all()
        for request in self.scheduler.waiting:
            if request.weights_version is None and len(request.token_ids) > len(request.prompt):
                request.weights_version = self.weights_version
        self.weights_version = self.weights_version + 1 if version is None else version

    def _report(self, plan: StepPlan, accepted: Accepted) -> list[TokenEvent]:
        """Events of the step; finished sequences leave their rows."""
        done = (accepted.num_new > 0) & (accepted.stopped | accepted.full)
        watched = self.scheduler.table.watched[plan.rows] & (accepted.num_new > 0)
        events = []
        for index in np.flatnonzero(done | watched).tolist():
            row, stopped = int(plan.rows[index]), bool(accepted.stopped[index])
            event = self._report_row(row, int(accepted.num_new[index]), stopped, bool(accepted.full[index]))
            if event is not None:
                events.append(event)
        return events

    def _report_row(self, row: int, num_new: int, stopped: bool, full: bool) -> TokenEvent | None:
        table = self.scheduler.table
        request = table.requests[row]
        assert request is not None
        known = int(table.num_known[row])
        fresh: list[int] = table.token_ids[row, known - num_new : known].tolist()
        matched = None
        if request.output is not None:
            matched = request.output.push(fresh[:-1] if stopped else fresh)
            if matched is not None:  # tokens after the stop string, accepted in the same step, never were
                fresh, stopped = fresh[:matched], False
                table.num_known[row] = known - num_new + matched
        completion = None
        if stopped or full or matched is not None:
            reason = "stop" if stopped or matched is not None else "length"
            completion = self._complete(self.scheduler.finish(row), reason, stopped=stopped)
        if completion is None and not request.stream:
            return None
        text = request.output.take(final=completion is not None) if request.output else ""
        return TokenEvent(request.id, fresh, text, completion)

    def _complete(self, request: Request, reason: FinishReason, *, stopped: bool) -> Completion:
        start = len(request.prompt)
        token_ids: list[int] = request.token_ids[start:].tolist()
        if request.output is not None:
            text = request.output.finish()
        elif self.tokenizer is not None:
            text = self.tokenizer.decode(token_ids[:-1] if stopped else token_ids)
        else:
            text = ""
        return Completion(
            token_ids=token_ids,
            text=text,
            logprobs=request.logprobs[start:].tolist() if request.params.logprobs else None,
            finish_reason=reason,
            weights_version=self.weights_version if request.weights_version is None else request.weights_version,
            num_cached_tokens=request.num_cached_tokens or 0,
            num_drafted=request.num_drafted,
            num_accepted=request.num_accepted,
        )

    def _count(self, plan: StepPlan, accepted: Accepted, seconds: float) -> None:
        stats = self.stats
        stats.seconds += seconds
        stats.num_steps += 1
        stats.num_run_tokens += plan.num_tokens
        stats.num_generated_tokens += int(accepted.num_new.sum())
        stats.num_drafted += int(np.maximum(plan.num_samples - 1, 0).sum())
        stats.num_accepted += int(np.maximum(accepted.num_new - 1, 0).sum())
        stats.num_prefix_hit_tokens += self.scheduler.take_prefix_hit_tokens()
        stats.num_preemptions += self.scheduler.take_preemptions()


def _affordable_blocks(model: ModelConfig, config: EngineConfig, dtype: torch.dtype, row: LatentRow | None) -> int:
    """Blocks within `cache_memory_bytes`, but no more than all sequences at full context could use."""
    width = model.attention.cache_row if row is None else row.width
    row_bytes = width if row is not None and row.fp8 else width * dtype.itemsize
    longest = model.max_position
    if config.prune is not None:
        row_bytes += 4  # its attention mass
        longest = min(longest, config.prune.most_rows)
    block_bytes = model.num_cache_layers * row_bytes * config.block_size
    if config.cache_memory_bytes < block_bytes:
        raise ValueError(
            f"engine.cache_memory_bytes = {config.cache_memory_bytes}: one block of {config.block_size} tokens takes "
            f"{block_bytes} bytes; give more"
        )
    most = config.max_sequences * -(-longest // config.block_size)
    return min(config.cache_memory_bytes // block_bytes, most)


def _copy_weights(model: Transformer, source: Mapping[str, Tensor]) -> None:
    """Copy tensors of equal names in place; ValueError, before any is copied, unless all names and shapes agree."""
    target = model.state_dict()
    wrong = sorted(source.keys() ^ target.keys()) or [
        f"{name} {tuple(source[name].shape)}" for name in target if source[name].shape != target[name].shape
    ]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"new weights do not fit the model: {shown}; they must come from the same configuration")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
