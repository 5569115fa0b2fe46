import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train.runs import tiny_run
from train.tiny import MOE, make_batch, random_sequences, tiny_config, tiny_model, tiny_state

from kogia.checkpoint.resume import ResumeState
from kogia.log import read_metrics
from kogia.model.routing import Routing
from kogia.train.config import SupervisedConfig
from kogia.train.loss import LossWeights, balance_of, supervised_loss, validation_loss
from kogia.train.routing_log import RoutingLog
from kogia.train.step import Loss, train_step
from kogia.train.supervised import loss_for_step, main


def step_with(loads: list[list[int]], num_copies: int) -> dict[str, float]:
    def loss(model, batch):
        return Loss(model.model.norm.weight.sum(), {}, torch.tensor(loads), num_copies)

    state = tiny_state(tiny_model(moe=replace(MOE, num_experts=4)))
    return train_step(state, [make_batch([[1, 2]])], loss)


def test_the_metrics_of_a_step_are_those_worked_out_by_hand():
    metrics = step_with([[4, 4, 4, 4], [8, 8, 0, 0], [0, 0, 0, 0]][:2], 32)
    assert metrics["max_vio"] == pytest.approx(0.5)
    assert metrics["max_vio_worst"] == pytest.approx(1.0)
    assert metrics["dead_experts"] == 2.0
    assert metrics["routing_entropy"] == pytest.approx((1.0 + math.log(2) / math.log(4)) / 2)
    assert metrics["dropped_tokens"] == 0.0


def test_a_mixture_that_did_not_run_has_no_part_in_them():
    metrics = step_with([[5, 3, 4, 4], [0, 0, 0, 0]], 17)
    assert metrics["max_vio"] == metrics["max_vio_worst"] == pytest.approx(0.25)
    assert metrics["dead_experts"] == 0.0
    assert metrics["dropped_tokens"] == 1.0


def test_no_token_is_dropped_and_all_micro_batches_count():
    state = tiny_state(tiny_model())
    batches = [make_batch(random_sequences([40], seed)) for seed in range(3)]
    metrics = train_step(state, batches, lambda m, b: supervised_loss(m, b, LossWeights(mtp=0.3, balance=1e-3)))
    assert metrics["dropped_tokens"] == 0.0
    assert state.loads.sum(-1).tolist() == [120 * MOE.topk] * 2


def test_an_expert_without_a_token_gets_no_gradient_and_spoils_none():
    model = tiny_model(num_mtp_layers=0)
    with torch.no_grad():
        model.routers()[0].e_score_correction_bias[:] = torch.tensor([9.0, 9, 9] + [0.0] * 5)
    state = tiny_state(model, clip=0.0)
    metrics = train_step(
        state,
        [make_batch(random_sequences([50]))],
        lambda m, b: supervised_loss(m, b, LossWeights(mtp=0.0, balance=0.1)),
    )
    assert metrics["dead_experts"] >= 5
    experts = model.model.layers[1].mlp.experts
    for weight in (experts.gate_up_proj.weight, experts.down_proj.weight):
        assert weight.grad.isfinite().all()
        assert not weight.grad[3:].any()
        assert weight.grad[:3].any()
    assert all(p.isfinite().all() for p in model.parameters())


def test_memory_that_was_not_zeroed_changes_nothing():
    """With uninitialised memory full of NaN, as PyTorch's deterministic mode has it, a step is what it is without."""
    results = []
    for poisoned in (False, True):
        torch.use_deterministic_algorithms(poisoned)
        try:
            state = tiny_state(tiny_model(num_mtp_layers=1))
            with torch.no_grad():
                state.model.routers()[0].e_score_correction_bias[3:] = -9.0  # experts without a token, too
            batches = [make_batch(random_sequences([33, 1, 60], seed)) for seed in range(2)]
            loss = [
                train_step(state, batches, lambda m, b: supervised_loss(m, b, LossWeights(mtp=0.3, balance=1e-3)))
                for _ in range(3)
            ]
            results.append((loss, [p.detach().clone() for p in state.model.parameters()]))
        finally:
            torch.use_deterministic_algorithms(False)
    (first, weights), (second, again) = results
    assert first == second
    assert all(map(torch.equal, weights, again))


def test_evaluation_counts_load_over_all_batches_and_moves_no_bias():
    model = tiny_model()
    batches = [make_batch(random_sequences([30, 20], seed)) for seed in range(3)]
    loads = []
    for batch in batches:
        routing = Routing()
        step = model.step(batch.tokens, routing=routing)
        hidden = model(batch.tokens, step=step)
        shifted = batch.tokens.token_ids.roll(-1)  # the last of a sequence gets another, as validation gives it
        ends = batch.tokens.segments.cu_seqlens[1:] - 1
        shifted[ends] = 0
        model.mtp_hidden(0, hidden, shifted, step)
        loads.append(routing.loads(2))
    total = sum(loads).double()
    expected = (total.amax(-1) / total.mean(-1) - 1).mean()
    assert validation_loss(model, batches)["val_max_vio"] == pytest.approx(float(expected))
    assert not any(router.e_score_correction_bias.any() for router in model.routers())


@pytest.mark.parametrize(
    "fields", [{"balance_over": "batch"}, {"device_balance_weight": 0.5}, {"communication_balance_weight": 0.5}]
)
def test_each_balance_loss_reaches_the_routers_and_is_told(fields):
    grads = []
    for given in ({}, fields):
        config = SupervisedConfig("unused", balance_weight=0.5, balance_devices=4, **given)
        state = tiny_state(tiny_model(num_mtp_layers=0), clip=0.0)
        batches = [make_batch(random_sequences([30, 20]))]
        metrics = train_step(state, batches, loss_for_step(config, state, batches))
        grads.append(state.model.routers()[0].weight.grad.clone())
    assert not torch.equal(*grads)
    for name in fields:
        if name.endswith("weight"):
            assert 0.3 < metrics[name.removesuffix("_weight")] < 4.0


def test_devices_are_the_models_groups_unless_said_and_must_share_the_experts_evenly():
    grouped = tiny_config(moe=replace(MOE, num_groups=4, topk_groups=2))
    config = SupervisedConfig("unused", device_balance_weight=0.1)
    assert (balance_of(config, grouped).devices, balance_of(config, grouped).reach) == (4, 2)
    for model, devices in ((tiny_config(), None), (grouped, 3)):
        with pytest.raises(
            ValueError, match=r"are of \d device\(s\) for model.moe.num_experts = 8: set balance_devices"
        ):
            balance_of(replace(config, balance_devices=devices), model)


def test_biases_stay_frozen_from_a_share_of_the_run_on():
    config = SupervisedConfig("unused", bias_freeze_at=0.5)
    state = tiny_state(tiny_model(), num_steps=4)
    batches, biases = [make_batch(random_sequences([50]))], []
    for _ in range(4):
        train_step(state, batches, loss_for_step(config, state, batches))
        biases.append(torch.cat([router.e_score_correction_bias for router in state.model.routers()]).clone())
    assert biases[0].any()
    assert not torch.equal(biases[0], biases[1])
    assert torch.equal(biases[1], biases[3])


def test_the_loads_of_a_run_are_on_disk_in_about_a_hundred_lines_also_after_a_resume(tmp_path):
    config = replace(tiny_run(tmp_path), steps=12, save_every=5, eval_every=0, keep_checkpoints=9)
    log = RoutingLog(tmp_path, 250)
    for step in range(1, 251):
        log.add(step, np.ones((2, 4), np.int64))
        if step == 100:
            saved = ResumeState({}, log.tensors())
    lines = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(3, 250, 3), 250]
    assert sum(line["steps"] for line in lines) == 250
    assert lines[0]["loads"] == [[3] * 4] * 2
    log.restore(saved)
    assert (log.steps, log.loads.tolist()) == (1, [[1] * 4] * 2)
    main(config)
    whole = (Path(config.out) / "routing.jsonl").read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    tokens = sum(sum(line["loads"][0]) for line in lines) / MOE.topk
    assert tokens == pytest.approx(sum(x["tokens"] for x in read_metrics(config.out) if "tokens" in x), rel=0.3)
    (Path(config.out) / "checkpoints" / "step-000012").rename(tmp_path / "away")
    main(replace(config, resume=True))
    assert (Path(config.out) / "routing.jsonl").read_text() == whole
