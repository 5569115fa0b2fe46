"""A span of OpenTelemetry for each request of a model: what it asked for in numbers, what it took, how it ended.

Never a prompt, an answer, a key or an address. Imported where the operator names a collector, by `--otlp-endpoint`;
spans are made when requests have ended and sent by a thread of the SDK, so that nobody waits for the collector. Of a
client's `traceparent` the trace goes on, and so does his choice not to sample it.

Names are those of the GenAI semantic conventions (opentelemetry-semantic-conventions 0.66b2, which may still change
them) and, for what they have no word for, vLLM's.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kogia import __version__, log
from kogia.engine.request import Completion
from kogia.serve.exchange import Exchange
from kogia.serve.generation import usage
from kogia.serve.state import Running, ServerState

OPERATIONS = {
    **dict.fromkeys(("/v1/chat/completions", "/chat/completions", "/beta/chat/completions"), "chat"),
    **dict.fromkeys(("/v1/responses", "/v1/messages", "/anthropic/v1/messages", "/page/chat"), "chat"),
    **dict.fromkeys(("/v1/completions", "/completions", "/beta/completions"), "text_completion"),
}
"""By route: what others ask is no work of a model, and makes no span."""
CONTEXT_HEADERS = ("traceparent", "tracestate")
MOST_WAITING = 4096
"""Spans that are not sent yet; more are dropped."""
END_SECONDS = 3.0
"""How long a server that ends waits for the last spans."""
COMPLAINT_SECONDS = 300.0
"""Between two lines that say that the collector cannot be reached."""


@contextmanager
def telemetry(state: ServerState, exporter: SpanExporter | None = None) -> Iterator[None]:
    """Send spans to the collector that `ServeConfig.otlp_endpoint` names, or to `exporter`, until the block ends."""
    exporter = exporter or OTLPSpanExporter(endpoint=traces_url(state.config.otlp_endpoint or ""), timeout=10)
    about = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "kogia"), "service.version": __version__}
    provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MOST_WAITING, schedule_delay_millis=1000))
    spans = Spans(state, provider)
    state.on_begin.append(spans.begin)
    state.on_exchange.append(spans.end)
    complaints = Complaints()
    try:
        yield
    finally:
        state.on_begin.remove(spans.begin)
        state.on_exchange.remove(spans.end)
        ending = threading.Thread(target=provider.shutdown, daemon=True)  # which may wait for a dead collector
        ending.start()
        ending.join(END_SECONDS)
        complaints.close()


class Complaints(logging.Handler):
    """What the SDK says of a collector that does not answer, in the server's log and not with every try."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._next = 0.0
        self._logger = logging.getLogger("opentelemetry")
        self._propagated, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + COMPLAINT_SECONDS
            log.warn(f"spans are not sent: {log.one_line(record.getMessage())[:300]}")

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated
        super().close()


def traces_url(endpoint: str) -> str:
    """Where spans go: the path of OTLP over HTTP, where none is given."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


class Spans:
    """Makes the spans of one server."""

    def __init__(self, state: ServerState, provider: TracerProvider) -> None:
        self._state = state
        self._tracer = provider.get_tracer("kogia", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, exchange: Exchange, headers: Mapping[str, str]) -> None:
        exchange.trace = {name: headers[name] for name in CONTEXT_HEADERS if name in headers}

    def end(self, exchange: Exchange) -> None:
        operation = OPERATIONS.get(exchange.route or "")
        if operation is None:
            return
        ended = time.time_ns()
        began = ended - int((self._state.clock() - exchange.began) * 1e9)
        running = exchange.running
        attributes: dict[str, Any] = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "kogia"}
        attributes |= _http(exchange)
        if running:
            attributes |= _asked(running[0]) | _answered(running, exchange.began)
        span = self._tracer.start_span(
            f"{operation} {running[0].model.name}" if running else operation,
            context=self._propagator.extract(exchange.trace or {}),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=began,
        )
        if "error.type" in attributes:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended)


def _http(exchange: Exchange) -> dict[str, Any]:
    status, told = exchange.status, {"http.request.method": exchange.method, "http.route": exchange.route}
    if status is None:
        return told | {"error.type": "client_left"}
    return told | {"http.response.status_code": status} | ({"error.type": str(status)} if status >= 500 else {})


def _asked(running: Running) -> dict[str, Any]:
    params = running.params
    return {
        "gen_ai.request.model": running.model.name,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": float(params.frequency_penalty),
        "gen_ai.request.presence_penalty": float(params.presence_penalty),
        "gen_ai.request.choice.count": params.n,
    }


def _answered(running: Sequence[Running], began: float) -> dict[str, Any]:
    completions = [each for own in running for each in own.stream.completions.values()]
    num_answers = sum(len(own.stream.request_ids) for own in running)
    reasons = [each.finish_reason for each in completions] + ["abort"] * (num_answers - len(completions))
    used = usage(running, completions)
    told: dict[str, Any] = {
        "gen_ai.response.id": running[0].id,
        "gen_ai.response.model": running[0].model.name,
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.input_tokens": used["prompt_tokens"],
        "gen_ai.usage.output_tokens": sum(own.num_tokens for own in running),
        "gen_ai.usage.cache_read.input_tokens": used["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.usage.reasoning.output_tokens": used["completion_tokens_details"]["reasoning_tokens"],
    }
    firsts = [own.first_token for own in running if own.first_token is not None]
    if firsts:
        told["gen_ai.response.time_to_first_chunk"] = min(firsts) - began
    if "error" in reasons:
        told["error.type"] = "error"
    return told | (_times(completions) if completions else {})


def _times(completions: Sequence[Completion]) -> dict[str, float]:
    """Seconds of the slowest answer, by vLLM's names."""
    queue, prefill, decode = (max(part) for part in zip(*(each.times for each in completions)))
    return {
        "gen_ai.latency.time_in_queue": queue,
        "gen_ai.latency.time_in_model_prefill": prefill,
        "gen_ai.latency.time_in_model_decode": decode,
    }
