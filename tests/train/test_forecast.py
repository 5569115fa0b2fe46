"""What a dry run says of a step, and in what a run tells its speed."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from train.runs import tiny_run
from train.tiny import tiny_config

from kogia.log import read_metrics
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.costs import flops_per_token
from kogia.model.presets import preset
from kogia.train.forecast import forecast, random_batch, trials
from kogia.train.speed import Speed
from kogia.train.supervised import forecast_step, main

CPU = torch.device("cpu")


def test_a_step_is_forecast_from_what_layers_of_each_kind_and_micro_batches_take(monkeypatch):
    """By a clock that steps put forward by as much as their model and batches say."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    model = ModelConfig(num_layers=9, moe=MoEConfig(num_dense_layers=3), num_mtp_layers=1)

    def once(dense: int, mixtures: int) -> float:
        return 0.004 + 0.001 * dense + 0.002 * mixtures

    def each(dense: int, mixtures: int, tokens: int) -> float:
        return 0.001 + 0.0005 * dense + tokens / 8 * (0.003 + 0.002 * dense + 0.004 * mixtures)

    def trial(shallow: ModelConfig):
        dense = shallow.moe.num_dense_layers
        kinds = dense, shallow.num_layers - dense
        assert sum(kinds) < 5 and shallow.num_mtp_layers == 1
        return lambda batches: wait(once(*kinds) + sum(each(*kinds, b.tokens.num_tokens) for b in batches))

    found = forecast(model, trial, CPU, row=8, batch_tokens=8, micro_batches=5, state_bytes=0)
    assert found.tokens == 8 and found.memory is None
    assert found.seconds == pytest.approx(once(3, 6) + 5 * each(3, 6, 8))

    for several in (1, 3):
        found = forecast(model, trial, CPU, row=8, batch_tokens=8 * 300, micro_batches=several, state_bytes=0)
        assert found.tokens < 8 * 300 / 2, "steps of the whole batch would take too long"
        assert found.seconds == pytest.approx(once(3, 6) + several * each(3, 6, 8 * 300))


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (preset("deepseek-v3"), {(2, 1), (4, 3), (4, 1)}),
        (preset("llama-3-8b"), {(1, None), (3, None)}),
        (tiny_config(), {(2, 1)}),
        (tiny_config(num_layers=1, moe=MoEConfig(num_experts=8, topk=2, num_dense_layers=4)), {(1, 4)}),
        (tiny_config(num_layers=4, moe=None, attention=MLAConfig(q_lora_ranks=(9, 8, 7, 6))), {(1, None), (3, None)}),
    ],
    ids=["mixtures", "dense", "as shallow as it gets", "mixtures in the module alone", "ranks by layer"],
)  # fmt: skip
def test_trials_have_a_layer_of_each_kind_or_three_and_else_what_the_model_has(model, shapes):
    found = trials(model)
    assert {(each.num_layers, each.moe and each.moe.num_dense_layers) for each in found} == shapes
    for each in found:
        assert (each.dim, each.vocab_size, each.num_mtp_layers) == (model.dim, model.vocab_size, model.num_mtp_layers)


def test_a_real_step_of_a_deeper_model_is_forecast_to_take_longer(tmp_path):
    config = replace(tiny_run(tmp_path), micro_batches=2)
    shallow = forecast_step(config, config.model, CPU)
    deep = forecast_step(config, replace(config.model, num_layers=22), CPU)
    assert deep.seconds > shallow.seconds > 0, "11 times the layers"


def test_mfu_is_the_share_of_what_the_device_reaches_that_the_models_flops_take():
    model = ModelConfig(
        vocab_size=50, dim=16, num_layers=3, ffn_dim=24, attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(num_experts=8, topk=2, expert_dim=4, num_shared_experts=1, num_dense_layers=1), num_mtp_layers=1,
    )  # fmt: skip
    projections, expert = 16 * (2 + 2) * 8 + 16 * 16, 3 * 16 * 4
    mixture, head = 3 * expert + 8 * 16, 50 * 16
    matrices = 3 * projections + 3 * 16 * 24 + 2 * mixture + head
    module = projections + mixture + head + 2 * 16 * 16
    lengths = np.array([10, 30])
    for depths in (0, 1):
        pairs = (3 + depths) * 2 * (8 + 8) * (10**2 + 30**2)  # of two heads, with keys and with values
        multiplied = 40 * (matrices + depths * module)
        speed = Speed(model, depths, CPU, torch.float32, peak=2e9)
        causal, full = speed.mfu(lengths, 0.5)
        assert full == pytest.approx(6 * (multiplied + pairs) / 0.5 / 2e9)
        assert causal == pytest.approx(6 * (multiplied + pairs / 2) / 0.5 / 2e9)


def test_full_attention_counts_all_pairs_and_sparse_attention_those_that_are_kept():
    v3 = preset("deepseek-v3")
    layers = v3.num_layers * 128 * (192 + 128) * 6
    assert flops_per_token(v3, 4096, is_causal=False) - flops_per_token(v3, 0) == pytest.approx(layers * 4096)
    sparse = preset("deepseek-v3.2")
    indexer = sparse.attention.indexer
    scored = sparse.num_layers * 6 * indexer.num_heads * indexer.head_dim
    found = flops_per_token(sparse, 10_000, is_causal=False) - flops_per_token(sparse, 0)
    assert found == pytest.approx(layers * 2048 + scored * 10_000)


def test_a_run_logs_its_speed_and_a_dry_run_says_what_it_will_be(tmp_path, capsys):
    config = replace(tiny_run(tmp_path), steps=2, eval_every=0)
    main(config)
    for line in read_metrics(config.out)[:2]:
        assert 0 < line["mfu_causal"] < line["mfu_full"] < 1
        assert line["peak_tflops"] > 0
        assert 0.05 < line["memory_gib"] < 50
    assert "MFU: of " in capsys.readouterr().err

    main(replace(config, out="nowhere", dry_run=True))
    text = capsys.readouterr().out
    for words in (
        "# speed       about ",
        " s a step of 256 tokens",
        "MFU ",
        " TFLOP/s, a float32 product of 512 x 512 x 512",
    ):
        assert words in text


def test_a_model_of_which_not_even_two_layers_fit_is_not_tried(tmp_path, capsys):
    config = tiny_run(tmp_path)
    large = replace(preset("deepseek-v3"), max_position=64, vocab_size=280, num_layers=61)
    main(replace(config, model=replace(large, dim=2**16), out="nowhere", dry_run=True))
    assert "not measured: the shallowest models take about" in capsys.readouterr().out


def test_sequences_of_a_forecast_are_random_and_count_but_for_their_first_token():
    batch = random_batch(50, [3, 5], CPU)
    assert batch.loss_mask.tolist() == [False, True, True, False, True, True, True, True]
    assert batch.num_loss_tokens == 6
    assert batch.tokens.token_ids.unique().numel() > 1
