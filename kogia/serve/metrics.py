"""`/metrics` in Prometheus's format, under vLLM's names where it has them, so that dashboards made for it work.

Nothing here waits or locks. What the engine counts is read when somebody asks; what concerns requests is counted in the
event loop's thread as they go on, in one addition to a bucket. Labels are models, layers and reasons, never callers or
values of requests: the number of series is bounded by the models.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from kogia.engine.engine import STEP_TOKENS
from kogia.engine.request import Completion
from kogia.serve.access import Caller, authenticate
from kogia.serve.exchange import Exchange
from kogia.serve.page.facts import mixture_layers
from kogia.serve.served import Entry
from kogia.serve.state import Running, ServerState

router = APIRouter(tags=["operators"])
REASONS = ("stop", "length", "abort", "error")
SECONDS = tuple(digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5))
"""Bounds of buckets: from a millisecond to 5,000 seconds."""
TOKENS = tuple(digit * 10.0**power for power in range(6) for digit in (1, 2, 5))


@router.get("/metrics")
async def metrics(request: Request, caller: Caller = Depends(authenticate)) -> Response:
    """In the text format, or OpenMetrics where that is asked for. Takes a key where the server has keys."""
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.metrics.registry), media_type=kind)


class Histogram:
    """Counts by buckets; each holds what is at most its bound and above that of the one before."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        names = [*map(str, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(names, np.cumsum(self._counts).tolist())), self._sum)


class ModelMetrics:
    """What is counted of the requests of one model."""

    def __init__(self) -> None:
        self.first_token, self.between, self.total = (Histogram(SECONDS) for _ in range(3))
        self.queue, self.prefill, self.decode, self.per_token = (Histogram(SECONDS) for _ in range(4))
        self.inference = Histogram(SECONDS)
        self.prompt, self.generated, self.asked, self.answers = (Histogram(TOKENS) for _ in range(4))
        self.ended = dict.fromkeys(REASONS, 0)
        self.prompt_tokens = self.cached_tokens = 0
        self.cache_queries = self.cache_hits = 0
        self.expert_loads: np.ndarray | None = None
        """[layers, experts] choices, of requests that returned theirs."""

    def note_tokens(self, running: Running, index: int, count: int, now: float) -> None:
        """Tokens of one answer have come. Those that come at once share the time since the last ones."""
        last = running.token_times.get(index)
        if last is not None:
            self.between.observe((now - last) / count, count)
        elif not running.token_times:
            self.first_token.observe(now - running.began)
            self.prompt_tokens += len(running.prompt_ids)
            self.prompt.observe(len(running.prompt_ids))
            self.asked.observe(running.params.max_tokens)
            self.answers.observe(running.params.n)

    def note_end(self, running: Running, now: float) -> None:
        """A request has ended, with whatever answers; those that are not there were given up."""
        completions = running.stream.completions.values()
        self.ended["abort"] += len(running.stream.request_ids) - len(completions)
        for completion in completions:
            self._note_completion(running, completion)
        if completions:
            self.total.observe(now - running.began)
            self.cached_tokens += running.num_cached

    def _note_completion(self, running: Running, completion: Completion) -> None:
        self.ended[completion.finish_reason] += 1
        self.cache_queries += len(running.prompt_ids)
        self.cache_hits += completion.num_cached_tokens
        self.generated.observe(len(completion.token_ids))
        queue, prefill, decode = completion.times
        self.queue.observe(queue)
        self.prefill.observe(prefill)
        self.decode.observe(decode)
        self.inference.observe(prefill + decode)
        if len(completion.token_ids) > 1:
            self.per_token.observe(decode / (len(completion.token_ids) - 1))
        if completion.routed_experts is not None and running.model.config.moe is not None:
            self._note_experts(completion.routed_experts, running.model.config.moe.num_experts)

    def _note_experts(self, chosen: np.ndarray, num_experts: int) -> None:
        """`chosen`: [tokens, layers, topk], -1 is nobody."""
        layers = [np.bincount(layer[layer >= 0], minlength=num_experts) for layer in chosen.transpose(1, 0, 2)]
        if layers:
            self.expert_loads = np.array(layers) + (0 if self.expert_loads is None else self.expert_loads)


class Metrics(Collector):
    """Of a whole server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._of: dict[str, ModelMetrics] = {}
        self._num_exchanges: dict[tuple[str, str, str], int] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        state.on_tokens.append(lambda running, *news: self.of(running.model.name).note_tokens(running, *news))
        state.on_end.append(lambda running: self.of(running.model.name).note_end(running, state.clock()))

        state.on_exchange.append(self._note_exchange)

    def _note_exchange(self, exchange: Exchange) -> None:
        """By method, route and status, of which there are so many and no more."""
        method = exchange.method if exchange.route else "none"
        key = method, exchange.route or "none", str(exchange.status or "none")
        self._num_exchanges[key] = self._num_exchanges.get(key, 0) + 1

    def _exchanges(self) -> Iterator[Metric]:
        own = CounterMetricFamily("kogia_http_requests", "Answers sent.", labels=("route", "status"))
        for (route, status), count in _summed(self._num_exchanges, lambda method, route, status: (route, status)):
            own.add_metric((route, status), count)
        yield own
        # as prometheus-fastapi-instrumentator has them, beside vLLM's own
        family = CounterMetricFamily("http_requests", "Answers sent.", labels=("method", "status", "handler"))
        grouped = _summed(self._num_exchanges, lambda method, route, status: (method, _group(status), route))
        for labels, count in grouped:
            family.add_metric(labels, count)
        yield family

    def of(self, name: str) -> ModelMetrics:
        """What has been counted of a model, however often it was loaded meanwhile."""
        found = self._of.get(name)
        if found is None:
            found = self._of[name] = ModelMetrics()
        return found

    def collect(self) -> Iterator[Metric]:
        each = [(entry, self.of(entry.name)) for entry in self._state.models]
        for name, help, values in GAUGES:
            yield _family(GaugeMetricFamily, name, help, each, values)
        for name, help, values in COUNTERS:
            yield _family(CounterMetricFamily, name, help, each, values)
        for name, help, histogram in HISTOGRAMS:
            family = HistogramMetricFamily(name, help, labels=LABELS)
            for model, own in each:
                histogram(own).add_to(family, _labels(model))
            yield family
        yield _ended(each)
        yield _waiting(each)
        yield _steps(each)
        yield _cache_config(each)
        yield from self._exchanges()
        yield _expert_load(each)


LABELS = ("model_name", "engine")
Each = Iterable[tuple[Entry, ModelMetrics]]
Value = Callable[[Entry, ModelMetrics], float]


def _labels(model: Entry) -> list[str]:
    """vLLM numbers the engines of a model; here it is one."""
    return [model.name, "0"]


def _family(kind: Any, name: str, help: str, each: Each, value: Value) -> Metric:
    family = kind(name, help, labels=LABELS)
    for model, own in each:
        family.add_metric(_labels(model), value(model, own))
    return family


def _summed(
    counts: Mapping[tuple[str, str, str], int], labels: Callable[[str, str, str], tuple[str, ...]]
) -> Iterable[tuple[tuple[str, ...], int]]:
    """Counts of those with the same labels together."""
    found: dict[tuple[str, ...], int] = {}
    for key, count in counts.items():
        found[labels(*key)] = found.get(labels(*key), 0) + count
    return found.items()


def _group(status: str) -> str:
    return f"{status[0]}xx" if status.isdecimal() else status


def _waiting(each: Each) -> Metric:
    """In vLLM's words "capacity" is want of room, "deferred" all else: here those that the engine has not seen yet."""
    help = "Sequences that wait for room, by its reason."
    family = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", help, labels=(*LABELS, "reason"))
    for model, own in each:
        in_line = 0 if model.served is None else len(model.served.engine.scheduler.waiting)
        in_line = min(in_line, waiting := _num_waiting(model, own))
        for reason, count in (("capacity", in_line), ("deferred", waiting - in_line)):
            family.add_metric([*_labels(model), reason], count)
    return family


def _steps(each: Each) -> Metric:
    family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens that a step runs.", labels=LABELS)
    names = [*map(str, map(float, STEP_TOKENS)), "+Inf"]
    for model, _ in each:
        counts = np.cumsum(model.stats.steps_by_tokens).tolist()
        family.add_metric(_labels(model), list(zip(names, counts)), model.stats.num_run_tokens)
    return family


def _cache_config(each: Each) -> Metric:
    """Of loaded models."""
    labels = (*LABELS, "block_size", "num_gpu_blocks", "enable_prefix_caching")
    family = GaugeMetricFamily("vllm:cache_config_info", "How large the cache is, in its labels.", labels=labels)
    for model, _ in each:
        if model.served is not None:
            engine = model.served.engine
            pool, cache = engine.scheduler.pool, engine.runner.cache
            has_prefixes = str(engine.config.prefix_cache)
            family.add_metric([*_labels(model), str(cache.block_size), str(pool.num_blocks), has_prefixes], 1)
    return family


def _ended(each: Each) -> Metric:
    help = "Answers that have ended, by their reason."
    family = CounterMetricFamily("vllm:request_success", help, labels=(*LABELS, "finished_reason"))
    for model, own in each:
        for reason, count in own.ended.items():
            family.add_metric([*_labels(model), reason], count)
    return family


def _expert_load(each: Each) -> Metric:
    """Relative to the mean of a layer, the largest and the least load of an expert; 1 and 1 are balance."""
    help = "Load of the busiest and the idlest routed expert over the mean, by requests that returned their experts."
    family = GaugeMetricFamily("kogia_expert_load", help, labels=(*LABELS, "layer", "expert"))
    for model, own in each:
        for layer, load in zip(mixture_layers(model.config), () if own.expert_loads is None else own.expert_loads):
            for which, value in (("busiest", load.max()), ("idlest", load.min())):
                family.add_metric([*_labels(model), str(layer), which], float(value / load.mean()))
    return family


def _num_running(model: Entry, _: ModelMetrics) -> int:
    return 0 if model.served is None else len(model.served.engine.scheduler.running)


def _num_waiting(model: Entry, own: ModelMetrics) -> int:
    """Those that have not reached the scheduler, too."""
    if model.served is None:
        return 0
    return max(0, model.served.engine.loop.num_unfinished - _num_running(model, own))


def _cache_used(model: Entry, _: ModelMetrics) -> float:
    if model.served is None:
        return 0.0
    pool = model.served.engine.scheduler.pool
    return 1 - pool.num_free / pool.num_blocks


def _acceptance(model: Entry, _: ModelMetrics) -> float:
    return model.stats.acceptance if model.stats.num_drafted else math.nan


GAUGES: Sequence[tuple[str, str, Value]] = (
    ("vllm:num_requests_running", "Sequences that steps run.", _num_running),
    ("vllm:num_requests_waiting", "Sequences that wait for room.", _num_waiting),
    ("vllm:kv_cache_usage_perc", "Share of the cache's blocks that sequences hold, 0 to 1.", _cache_used),
    ("vllm:gpu_cache_usage_perc", "The older name of vllm:kv_cache_usage_perc.", _cache_used),
    ("kogia_draft_acceptance", "Share of the drafts that were right since the start; NaN without any.", _acceptance),
    ("kogia_cache_bytes", "Size of the cache, used or not; 0 while unloaded.", lambda model, _: model.cache_bytes),
    ("kogia_model_loaded", "1 while the model is loaded, else 0.", lambda model, _: float(model.served is not None)),
    ("kogia_model_bytes", "What the model takes: weights and cache; 0 while unloaded.", lambda m, _: m.num_bytes),
)
COUNTERS: Sequence[tuple[str, str, Value]] = (
    ("vllm:prompt_tokens", "Tokens of prompts that have been read.", lambda _, own: own.prompt_tokens),
    ("vllm:prompt_tokens_cached", "Tokens of prompts that nobody had to compute.", lambda _, own: own.cached_tokens),
    ("vllm:generation_tokens", "Tokens drawn.", lambda model, _: model.stats.num_generated_tokens),
    ("vllm:num_preemptions", "Sequences put back for want of room.", lambda m, _: m.stats.num_preemptions),
    ("vllm:prefix_cache_queries", "Tokens of prompts that were looked up.", lambda _, own: own.cache_queries),
    ("vllm:prefix_cache_hits", "Tokens of prompts that were found.", lambda _, own: own.cache_hits),
    ("vllm:spec_decode_num_drafts", "Sequences' steps with drafts.", lambda model, _: model.stats.num_proposals),
    ("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", lambda model, _: model.stats.num_drafted),
    ("vllm:spec_decode_num_accepted_tokens", "Drafts that were right.", lambda m, _: m.stats.num_accepted),
    ("kogia_engine_steps", "Steps of the engine.", lambda model, _: model.stats.num_steps),
    ("kogia_model_loads", "How often the model was loaded.", lambda model, _: model.num_loads),
    ("kogia_model_load_seconds", "Time that loading it took, together.", lambda model, _: model.load_seconds),
    ("kogia_engine_busy_seconds", "Time inside steps of the engine.", lambda model, _: model.stats.seconds),
)
HISTOGRAMS: Sequence[tuple[str, str, Callable[[ModelMetrics], Histogram]]] = (
    ("vllm:time_to_first_token_seconds", "From a request to its first token.", lambda own: own.first_token),
    ("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", lambda own: own.between),
    ("vllm:time_per_output_token_seconds", "The older name of inter_token_latency.", lambda own: own.between),
    ("vllm:e2e_request_latency_seconds", "From a request to its end.", lambda own: own.total),
    ("vllm:request_queue_time_seconds", "From a request to its first step.", lambda own: own.queue),
    ("vllm:request_prefill_time_seconds", "From there to the first token.", lambda own: own.prefill),
    ("vllm:request_decode_time_seconds", "From there to the end.", lambda own: own.decode),
    ("vllm:request_inference_time_seconds", "From its first step to the end.", lambda own: own.inference),
    ("vllm:request_time_per_output_token_seconds", "Of an answer, on average.", lambda own: own.per_token),
    ("vllm:request_prompt_tokens", "Tokens of a prompt.", lambda own: own.prompt),
    ("vllm:request_generation_tokens", "Tokens of an answer.", lambda own: own.generated),
    ("vllm:request_params_n", "Answers that a request asked for.", lambda own: own.answers),
    ("vllm:request_params_max_tokens", "What a request asked for.", lambda own: own.asked),
    ("vllm:request_max_num_generation_tokens", "What a request asked for.", lambda own: own.asked),
)
