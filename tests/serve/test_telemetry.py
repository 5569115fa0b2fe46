"""Spans of requests: their names and numbers, whose trace they belong to, and that nobody waits for a collector."""

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from serve.asks import HELLO, events, post, refusal, until
from serve.server import serving

from kogia import cli
from kogia.serve.config import ServeConfig

pytest.importorskip("opentelemetry.sdk", reason="needs kogia[telemetry]")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs kogia[telemetry]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kogia.serve.telemetry import telemetry, traces_url

ENGINE = {"num_blocks": 256, "max_sequences": 8}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def spans(server):
    """A list that has the spans of what is asked within, once it is left."""
    exporter, found, open_ones = InMemorySpanExporter(), [], []
    with telemetry(server.state, exporter):
        server.state.on_begin.append(begin := lambda exchange, _: open_ones.append(exchange))
        server.state.on_exchange.append(open_ones.remove)
        yield found
        while open_ones:  # an exchange ends behind its answer
            time.sleep(0.01)
        server.state.on_begin.remove(begin)
        server.state.on_exchange.remove(open_ones.remove)
    found += exporter.get_finished_spans()


def test_a_span_has_the_names_and_numbers_of_its_request(server):
    body = {"messages": HELLO, "max_tokens": 5, "ignore_eos": True, "temperature": 0.5, "timings": True, "n": 2}
    began = time.time_ns()
    with spans(server) as found:
        answer = post(server, "/v1/chat/completions", body).json()
    (span,), used, times = found, answer["usage"], answer["timings"]
    told = dict(span.attributes)
    assert (span.name, span.kind, span.status.status_code) == ("chat tiny", SpanKind.SERVER, StatusCode.UNSET)
    assert began <= span.start_time < span.end_time <= time.time_ns() and span.parent is None
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.provider.name"] == "kogia"
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == answer["model"] == "tiny"
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.max_tokens"]) == (0.5, 5)
    assert told["gen_ai.request.choice.count"] == 2 and told["gen_ai.response.id"] == answer["id"]
    assert told["gen_ai.response.finish_reasons"] == ("length", "length")
    assert told["gen_ai.usage.input_tokens"] == used["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == used["completion_tokens"] == 10
    assert told["gen_ai.usage.cache_read.input_tokens"] == used["prompt_cache_hit_tokens"]
    reasoning = used["completion_tokens_details"]["reasoning_tokens"]
    assert told["gen_ai.usage.reasoning.output_tokens"] == reasoning
    parts = {"queue": "queue", "model_prefill": "prompt", "model_decode": "predicted"}
    for part, name in parts.items():
        assert told[f"gen_ai.latency.time_in_{part}"] == pytest.approx(times[f"{name}_ms"] / 1000)
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < (span.end_time - span.start_time) / 1e9
    assert (told["http.route"], told["http.response.status_code"]) == ("/v1/chat/completions", 200)
    assert span.resource.attributes["service.name"] == "kogia"


def test_the_trace_of_a_client_goes_on_and_what_he_does_not_sample_is_not(server):
    body = {"prompt": "the answer", "max_tokens": 2, "ignore_eos": True}
    with spans(server) as found:
        for flags in ("01", "00"):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
            assert post(server, "/v1/completions", body, headers=headers).status_code == 200
        assert post(server, "/v1/completions", body, headers={"traceparent": "junk"}).status_code == 200
    continued, own = found
    assert (continued.name, f"{continued.context.trace_id:032x}") == ("text_completion tiny", TRACE)
    assert f"{continued.parent.span_id:016x}" == PARENT
    assert own.parent is None and f"{own.context.trace_id:032x}" != TRACE


def test_nothing_that_was_said_is_in_a_span(server):
    said = {"messages": [{"role": "user", "content": "sesame opens"}], "stop": ["plugh"], "max_tokens": 4}
    with spans(server) as found:
        answer = post(server, "/v1/messages", said, headers={"x-api-key": "xyzzy"}).json()
        post(server, "/v1/responses", {"input": "sesame again", "max_output_tokens": 3})
        post(server, "/tokenize", {"prompt": "sesame"})
    assert [span.name for span in found] == ["chat tiny", "chat tiny"]
    text = " ".join(span.to_json() for span in found)
    assert not any(word in text for word in ("sesame", "plugh", "xyzzy"))
    assert all(len(block.get("text", "")) < 4 or block["text"] not in text for block in answer["content"])


def test_a_request_that_is_refused_and_one_whose_client_leaves_are_spans_too(server):
    with spans(server) as found:
        refusal(post(server, "/v1/chat/completions", {"messages": HELLO, "temperature": -1}))
        stream = events(
            server,
            "/v1/chat/completions",
            {"messages": HELLO, "stream": True, "max_tokens": 2000, "ignore_eos": True},
        )
        next(stream)
        next(stream)
        stream.close()
        while server.state.running:
            time.sleep(0.01)
    refused, left = found
    assert (refused.name, refused.attributes["http.response.status_code"]) == ("chat", 400)
    assert refused.status.status_code is StatusCode.UNSET and "gen_ai.usage.input_tokens" not in refused.attributes
    assert left.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert left.attributes["gen_ai.usage.output_tokens"] > 0


def test_a_fault_of_the_server_is_an_error(server, monkeypatch):
    with spans(server) as found:
        monkeypatch.setattr(server.state.models, "find", lambda name: 1 / 0)
        assert post(server, "/v1/chat/completions", {"messages": HELLO}).status_code == 500
    assert found[0].status.status_code is StatusCode.ERROR and found[0].attributes["error.type"] == "500"
    assert not found[0].events and not found[0].status.description


def test_a_collector_gets_them_over_http(model):
    got: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    try:
        with serving(model, engine=ENGINE, otlp_endpoint=f"http://127.0.0.1:{collector.server_port}") as server:
            assert post(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 2}).status_code == 200
    finally:
        collector.shutdown()
    ((path, request),) = got  # what had not been sent is, when the server ends
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert path == "/v1/traces" and span.name == "chat tiny"
    assert {each.key: each.value.int_value for each in span.attributes}["gen_ai.usage.output_tokens"] in (1, 2)


def test_a_collector_that_is_dead_or_silent_holds_nobody_up_and_is_told_of_once(model, capfd, monkeypatch):
    """What would wait for it waits for 10 s."""
    monkeypatch.setattr("kogia.serve.telemetry.END_SECONDS", 0.5)
    said = []

    def is_told_of() -> bool:
        said.append(capfd.readouterr().err)
        return "spans are not sent" in "".join(said)

    with socket.socket() as silent:  # takes connections, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        dead = socket.socket()
        dead.bind(("127.0.0.1", 0))
        for where in (silent, dead):
            with serving(model, engine=ENGINE, otlp_endpoint=f"http://127.0.0.1:{where.getsockname()[1]}") as server:
                for _ in range(3):
                    began = time.monotonic()
                    answered = post(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 2})
                    assert answered.status_code == 200 and time.monotonic() - began < 9
                assert where is silent or until(is_told_of)
                began = time.monotonic()
            assert time.monotonic() - began < 9
        dead.close()
    assert ("".join(said) + capfd.readouterr().err).count("spans are not sent") == 1


def test_without_an_endpoint_nothing_of_it_is_imported():
    """FastAPI imports the API, which does nothing by itself."""
    names = "opentelemetry.sdk", "opentelemetry.exporter", "kogia.serve.telemetry"
    code = f"import sys, kogia.serve.process; sys.exit(any(name.startswith({names}) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_what_will_not_do_is_said_before_anything_is_loaded(model, monkeypatch, capsys):
    with pytest.raises(ValueError, match="must be a URL"):
        ServeConfig(path="x", otlp_endpoint="127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    assert cli.main(["serve", str(model), "--port", "0", "--otlp-endpoint", "http://127.0.0.1:4318"]) == 2
    assert "pip install 'kogia[telemetry]'" in capsys.readouterr().err


def test_the_path_of_an_endpoint_is_kept_where_it_has_one():
    assert traces_url("http://a:4318") == traces_url("http://a:4318/") == "http://a:4318/v1/traces"
    assert traces_url("https://a/otlp/traces") == "https://a/otlp/traces"
