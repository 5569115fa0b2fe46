"""`kogia bench` and `kogia doctor` on small models: figures that add up, and refusals before any work."""

import json

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint

from kogia.cli import main
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.inference import bench
from kogia.inference.config import BenchConfig
from kogia.model.presets import preset
from kogia.model.transformer import build_model

QUICK = ["--prompt-tokens", "8", "--max-tokens", "32", "--rounds", "2", "--engine.num-blocks", "64"]


def test_a_preset_with_drawn_weights_is_measured_and_written(tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["bench", "kogia-demo", "--random-weights", *QUICK, "--batches", "1", "3", "--out", str(out)]
    assert main([*words, "--rate", "200", "--requests", "5"]) == 0
    found = json.loads(out.read_text())
    assert [speed["name"] for speed in found["speeds"]] == [
        "decode, batch 1", "prefill, 1 x 8", "decode, batch 3", "prefill, 3 x 8",
    ]  # fmt: skip
    for speed in found["speeds"]:
        assert 0 < speed["low"] <= speed["tokens_per_second"] <= speed["high"]
    assert found["speeds"][0]["gigabytes_per_step"] < found["speeds"][2]["gigabytes_per_step"]
    assert list(found["ready_seconds"]) == ["weights", "engine", "graphs", "first token"]
    load = found["load"]
    assert (load["completed"], load["total_input_tokens"], load["total_output_tokens"]) == (5, 40, 160)
    for name in ("ttft", "itl", "tpot", "e2el"):
        assert 0 < load[f"median_{name}_ms"] <= load[f"p90_{name}_ms"] <= load[f"p99_{name}_ms"]
    shown = capsys.readouterr().out
    assert "decode, batch 3" in shown and "P99 TTFT (ms):" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_acceptance_is_told_where_there_are_drafts(tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["bench", "kogia-demo", "--random-weights", *QUICK, "--batches", "1", "--engine.num-draft-tokens", "1"]
    assert main([*words, "--out", str(out)]) == 0
    decode, prefill = json.loads(out.read_text())["speeds"]
    assert 0 <= decode["acceptance"] <= 1 and "acceptance" not in prefill
    shown = capsys.readouterr()
    assert "of drafts accepted" in shown.out and "ready after" in shown.err


def test_fewer_active_experts_are_fewer_bytes():
    model = build_model(preset("kogia-demo"))
    one, two = (Engine(model, None, EngineConfig(num_blocks=8, active_experts=number)) for number in (1, 2))
    saved = bench.step_bytes(two, 1, 10) - bench.step_bytes(one, 1, 10)
    moe, config = model.config.moe, model.config
    assert moe is not None
    mixtures = config.num_layers - moe.num_dense_layers
    assert saved == pytest.approx(4 * mixtures * 3 * config.dim * moe.expert_dim)


def test_the_bytes_of_a_step_are_weights_once_the_experts_in_use_and_the_cache():
    config = preset("kogia-demo")
    model = build_model(config)
    engine = Engine(model, None, EngineConfig(num_blocks=8))
    moe = config.moe
    assert moe is not None
    experts = sum(
        w.numel() for n, w in model.named_parameters() if ".experts." in n and f"layers.{config.num_layers}" not in n
    )
    mtp = sum(w.numel() for n, w in model.named_parameters() if n.startswith(f"model.layers.{config.num_layers}."))
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.dim
    rest = sum(w.numel() for w in model.parameters()) - mtp - experts - embedding
    for batch in (1, 5):
        used = 1 - (1 - moe.topk / moe.num_experts) ** batch
        row = engine.runner.cache.row
        cache = batch * 10 * config.num_layers * row.width
        lookup = 0 if config.tie_embeddings else batch * config.dim
        want = 4 * (rest + used * experts + lookup + cache)
        assert bench.step_bytes(engine, batch, 10) == pytest.approx(want)
    if config.tie_embeddings:
        return
    drafting = Engine(model, None, EngineConfig(num_blocks=8, num_draft_tokens=2))
    more = bench.step_bytes(drafting, 1, 0) - bench.step_bytes(engine, 3, 0)
    mtp_experts = sum(w.numel() for n, w in model.named_parameters() if f".{config.num_layers}.mlp.experts." in n)
    used = 1 - (1 - moe.topk / moe.num_experts) ** 3
    head = model.lm_head.weight.numel()
    assert more == pytest.approx(4 * 2 * (mtp - (1 - used) * mtp_experts + head)), "twice the module, and the head"


def test_a_checkpoint_is_measured_as_it_is(tmp_path, capsys):
    directory = save_tiny_checkpoint(tmp_path / "model")
    assert main(["bench", str(directory), *QUICK, "--batches", "2"]) == 0
    assert "decode, batch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["kogia-demo"], "add --random-weights"),
        (["no-such-model", "--random-weights"], "no-such-model"),
        (["kogia-demo", "--random-weights", "--prompt-tokens", "600"], "context is 512"),
        (["kogia-demo", "--random-weights", "--dtype", "fp8"], "drawn ones take --quantize fp8"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(words, says, capsys):
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batches": (0,)}, "at least 1"),
        ({"batches": (300,)}, "engine.max_sequences = 256"),
        ({"rate": -1.0}, "rate = -1.0"),
        ({"max_tokens": 1}, "max_tokens = 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        BenchConfig("kogia-demo", **fields)


def test_drawn_weights_are_those_of_the_seed():
    config = BenchConfig("kogia-demo", random_weights=True, seed=3)
    first, second = bench.open_for_bench(config), bench.open_for_bench(config)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_drawn_weights_may_be_packed_and_count_as_what_they_are_stored_in(format, tmp_path):
    out = tmp_path / "bench.json"
    words = ["bench", "kogia-demo", "--random-weights", *QUICK, "--batches", "1", "--out", str(out)]
    gigabytes = []
    for quantize in ("none", format):
        assert main([*words, "--quantize", quantize]) == 0
        found = json.loads(out.read_text())
        assert found["quantize"] == quantize
        gigabytes.append(found["speeds"][0]["gigabytes_per_step"])
    assert gigabytes[1] < gigabytes[0] / 2


def test_doctor_names_every_op_and_the_rates(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "mix_experts" in shown and "GB/s" in shown and "TFLOP/s" in shown
    assert max(map(len, shown.splitlines())) <= 110
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    found_by_name = found["ops"]["grouped_linear"]  # "cpu" says why where no compiler is at hand
    assert set(found_by_name) == {"cpu", "aten", "reference"} and found_by_name["aten"] is None
    assert found["copy_gb_per_second"] > 0 and set(found["tflops"]) == {"bfloat16", "float32"}


def test_completions_as_quick_as_their_first_token_have_no_speed(monkeypatch):
    engine = Engine(build_model(preset("kogia-demo")), None, EngineConfig(num_blocks=64))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: 1.0)
    config = BenchConfig("kogia-demo", prompt_tokens=8, max_tokens=2, rounds=1)
    with pytest.raises(ValueError, match=r"max_tokens = 2: .* raise it"):
        bench.batch_speeds(engine, config, 1)
