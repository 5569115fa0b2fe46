"""`/metrics`: what Prometheus reads, against what the answers say."""

import time

import httpx2 as httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from serve.asks import HELLO, events, post
from serve.server import serving

from kogia.serve.metrics import SECONDS, Histogram, ModelMetrics
from kogia.serve.page.facts import mixture_layers

ENGINE = {"model_name": "tiny", "engine": "0"}


def scrape(server) -> dict[str, list]:
    """Name of a sample -> samples."""
    response = httpx.get(server.url + "/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, list] = {}
    for sample in (sample for family in parse(response.text) for sample in family.samples):
        found.setdefault(sample.name, []).append(sample)
    return found


def value(found: dict[str, list], name: str, **labels: str) -> float:
    (sample,) = [each for each in found[name] if labels.items() <= each.labels.items()]
    return sample.value


def test_what_vllms_dashboard_asks_for_is_there_from_the_start(server):
    found = scrape(server)
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc")
    totals = ("prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits")
    seconds = ("time_to_first_token", "inter_token_latency", "time_per_output_token", "e2e_request_latency")
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time")
    tokens = ("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens")
    tokens += ("iteration_tokens_total", "request_params_n", "request_inference_time_seconds")
    totals += ("prompt_tokens_cached",)
    totals += tuple(f"spec_decode_num_{each}" for each in ("drafts", "draft_tokens", "accepted_tokens"))
    histograms = [f"vllm:{name}_seconds" for name in (*seconds, *parts)] + [f"vllm:{name}" for name in tokens]
    for name in (*(f"vllm:{each}" for each in gauges), *(f"vllm:{each}_total" for each in totals)):
        assert found[name][0].labels == ENGINE
    for name in histograms:
        assert {f"{name}_bucket", f"{name}_sum", f"{name}_count"} <= set(found)
    reasons = {sample.labels["finished_reason"] for sample in found["vllm:request_success_total"]}
    assert reasons == {"stop", "length", "abort", "error"}
    waits = {sample.labels["reason"]: sample.labels for sample in found["vllm:num_requests_waiting_by_reason"]}
    assert waits == {reason: {**ENGINE, "reason": reason} for reason in ("capacity", "deferred")}
    (cache,) = found["vllm:cache_config_info"]
    assert int(cache.labels["num_gpu_blocks"]) == server.engine.scheduler.pool.num_blocks and cache.value == 1
    assert value(found, "kogia_cache_bytes") == server.engine.runner.cache.rows.nbytes
    assert value(found, "process_resident_memory_bytes") > 0


@pytest.mark.parametrize("stream", [False, True])
def test_counts_are_those_of_the_answers(server, stream):
    before = scrape(server)
    body = {"messages": HELLO, "max_tokens": 7, "ignore_eos": True, "n": 2}
    if stream:
        *_, last = events(server, "/v1/chat/completions", {**body, "stream": True, "stream_options": USAGE})
        used = last["usage"]
    else:
        used = post(server, "/v1/chat/completions", body).json()["usage"]
    after = scrape(server)

    def gained(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert gained("vllm:prompt_tokens_total") == gained("vllm:request_prompt_tokens_sum") == used["prompt_tokens"]
    assert gained("vllm:generation_tokens_total") == used["completion_tokens"] == 14
    assert gained("vllm:request_success_total", finished_reason="length") == 2
    assert gained("vllm:request_success_total", finished_reason="abort") == 0
    assert gained("vllm:prefix_cache_queries_total") == 2 * used["prompt_tokens"]
    assert gained("vllm:prompt_tokens_cached_total") == used["prompt_cache_hit_tokens"]
    assert gained("vllm:iteration_tokens_total_count") == gained("kogia_engine_steps_total") >= 7
    rows = used["prompt_cache_miss_tokens"] + used["completion_tokens"] - 2  # the last token of each is not run
    assert gained("vllm:iteration_tokens_total_sum") >= rows
    assert gained("vllm:request_params_n_sum") == 2 and gained("vllm:request_inference_time_seconds_count") == 2
    assert gained("vllm:request_generation_tokens_count") == 2
    assert gained("vllm:request_max_num_generation_tokens_sum") == 7
    assert gained("vllm:time_to_first_token_seconds_count") == gained("vllm:e2e_request_latency_seconds_count") == 1
    assert gained("vllm:inter_token_latency_seconds_count") <= 12
    first, whole = (gained(f"vllm:{name}_seconds_sum") for name in ("time_to_first_token", "e2e_request_latency"))
    assert 0 < first <= whole < 60
    assert value(after, "vllm:num_requests_running") == value(after, "vllm:kv_cache_usage_perc") == 0


USAGE = {"include_usage": True}


def test_who_leaves_is_counted_as_an_abort_and_while_he_waits_he_runs(server):
    before = value(scrape(server), "vllm:request_success_total", finished_reason="abort")
    body = {"messages": HELLO, "stream": True, "max_tokens": 3000, "ignore_eos": True}
    stream = events(server, "/v1/chat/completions", body)
    next(stream)
    found = scrape(server)
    assert value(found, "vllm:num_requests_running") + value(found, "vllm:num_requests_waiting") == 1
    stream.close()
    for _ in range(200):
        found = scrape(server)
        if value(found, "vllm:request_success_total", finished_reason="abort") == before + 1:
            break
    assert value(found, "vllm:request_success_total", finished_reason="abort") == before + 1


def test_the_load_of_experts_is_that_of_the_requests_that_returned_theirs(server):
    own = ModelMetrics()
    chosen = np.random.default_rng(0).integers(-1, 8, (50, 3, 2))
    own._note_experts(chosen[:20], 8)
    own._note_experts(chosen[20:], 8)
    assert own.expert_loads is not None
    for layer in range(3):
        assert own.expert_loads[layer].tolist() == [(chosen[:, layer] == expert).sum() for expert in range(8)]
    body = {"messages": HELLO, "max_tokens": 4, "return_routed_experts": True}
    assert post(server, "/v1/chat/completions", body).status_code == 200
    loads = scrape(server)["kogia_expert_load"]
    busiest, idlest = ([each.value for each in loads if each.labels["expert"] == of] for of in ("busiest", "idlest"))
    assert len(busiest) == len(idlest) == len(mixture_layers(server.engine.model.config)) > 0
    assert {int(each.labels["layer"]) for each in loads} == set(mixture_layers(server.engine.model.config))
    assert min(busiest) >= 1 >= max(idlest)


def test_who_waits_is_counted_by_the_reason(model):
    with serving(model, engine={"max_sequences": 1}) as one:
        step = one.engine.step
        one.engine.step = lambda: (time.sleep(0.05), step())[1]
        body = {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True, "n": 3, "stream": True}
        stream = events(one, "/v1/chat/completions", body)
        next(filter(lambda chunk: chunk["choices"][0]["delta"].get("reasoning_content"), stream))
        found = scrape(one)
        assert value(found, "vllm:num_requests_waiting_by_reason", reason="capacity") == 2
        assert value(found, "vllm:num_requests_waiting_by_reason", reason="deferred") == 0
        assert value(found, "vllm:num_requests_waiting") == 2
        stream.close()


def test_openmetrics_is_spoken_to_who_asks_for_it(server):
    accept = "application/openmetrics-text; version=1.0.0"
    response = httpx.get(server.url + "/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert "vllm:prompt_tokens" in {family.name for family in parse_openmetrics(response.text)}


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 5)), max_size=30))
def test_a_histogram_counts_what_is_at_most_each_bound(values):
    histogram, family = Histogram(SECONDS), HistogramMetricFamily("x", "")
    for each, times in values:
        histogram.observe(each, times)
    histogram.add_to(family, [])
    each = np.array([value for value, times in values for _ in range(times)])
    found = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    for bound in SECONDS:
        assert found[str(bound)] == (each <= bound).sum()
    assert found["+Inf"] == found["x_count"] == len(each)
    assert found["x_sum"] == pytest.approx(float(each.sum()))


def test_answers_are_counted_by_route_and_status_and_addresses_that_lead_nowhere_are_one(server):
    for path in ("/nowhere", "/v1/else", "/v1/models", "/v1/models"):
        httpx.get(server.url + path)
    found = scrape(server)
    assert value(found, "kogia_http_requests_total", route="none", status="404") >= 2
    assert value(found, "kogia_http_requests_total", route="/v1/models", status="200") >= 2
    assert value(found, "http_requests_total", handler="none", status="4xx", method="none") >= 2
    assert value(found, "http_requests_total", handler="/v1/models", status="2xx", method="GET") >= 2
    assert not any("nowhere" in each.labels["route"] for each in found["kogia_http_requests_total"])
