"""What reinforcement learning shares with supervised training: dtype, precision, recomputation, the guard."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from rl.tiny import rl_settings

from kogia.checkpoint.hf import load_model
from kogia.config import from_dict, to_dict
from kogia.log import read_metrics
from kogia.rl import grpo
from kogia.rl.config import RLConfig
from kogia.rl.grpo import Run, build_run, main, step, update
from kogia.train.config import Fp8Config, GuardConfig, LoopConfig, OptimConfig, SupervisedConfig
from kogia.train.guard import read_bad_step

SGD_LIKE = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0, clip=0.0)


@pytest.fixture
def build(checkpoint, tmp_path):
    with ExitStack() as stack:
        yield lambda name, **changes: build_run(rl_settings(checkpoint, tmp_path / name, **changes), stack)


def gradients(run: Run, rollout) -> dict[str, torch.Tensor]:
    """Of the weights, in float32, for rewards drawn anew but equal for all."""
    rewards = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    update(run, rollout, rewards)
    return {name: w.grad.clone() for name, w in run.state.optimizer.weights.items() if w.grad is not None}


@pytest.fixture
def rollout(build):
    run = build("sampling")
    c = run.config
    params = grpo.SamplingParams(temperature=1.0, max_tokens=c.max_tokens, n=c.group_size, seed=1, logprobs=True)
    return grpo.collect(run.engine, run.tokenizer, grpo.draw_problems(run.sources, 0, 4, 0), params)


def test_both_kinds_of_training_have_the_same_settings_of_the_loop():
    for kind in (SupervisedConfig, RLConfig):
        assert issubclass(kind, LoopConfig)
    config = RLConfig("model", dtype="bfloat16", precision="fp8", recompute="layer", guard=GuardConfig(skips=2))
    assert from_dict(RLConfig, to_dict(config)) == config


@pytest.mark.parametrize("recompute", ["layer", "attention", "feed_forward"])
def test_layers_done_again_leave_the_same_gradients_loads_and_biases(build, rollout, recompute):
    kept, again = build("kept", optim=SGD_LIKE), build("again", optim=SGD_LIKE, recompute=recompute)
    expected, found = gradients(kept, rollout), gradients(again, rollout)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (kept.state.loads == again.state.loads).all()
    for name, value in kept.state.model.state_dict().items():
        assert torch.equal(again.state.model.state_dict()[name], value), name


def test_a_policy_in_bfloat16_is_sampled_in_it_and_moved_in_float32(build, rollout):
    exact, half = build("exact", optim=SGD_LIKE), build("half", optim=SGD_LIKE, dtype="bfloat16")
    assert half.engine.model.dtype == torch.bfloat16
    expected, found = gradients(exact, rollout), gradients(half, rollout)
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}, "of one batch, as it came"
    for name in ("model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert 0 < error < 0.1, (name, error)
    metrics = step(half)
    assert metrics["mismatch"] < half.config.tolerance == 1.0
    for name, parameter in half.state.model.named_parameters():
        assert torch.equal(parameter, half.state.optimizer.weights[name].bfloat16()), name


def test_products_in_fp8_are_the_trainers_alone(build, rollout):
    exact, coarse = build("exact", optim=SGD_LIKE), build("fp8", optim=SGD_LIKE, precision="fp8", fp8=Fp8Config("all"))
    greedy = grpo.SamplingParams(temperature=0.0, max_tokens=8, logprobs=True)
    one, other = (run.engine.generate([[1, 2, 3]], greedy)[0][0] for run in (exact, coarse))
    assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs), "what samples is not rounded"
    expected, found = gradients(exact, rollout), gradients(coarse, rollout)
    error = (found["lm_head.weight"] - expected["lm_head.weight"]).norm() / expected["lm_head.weight"].norm()
    assert 1e-4 < error < 0.2


def poison(monkeypatch, updates):
    """Turns the loss of these optimiser steps (0-based) into NaN."""
    inner, calls = grpo.grpo_loss, []

    def poisoned(model, batch, **settings):
        calls.append(batch)
        loss = inner(model, batch, **settings)
        return replace(loss, total=loss.total * (math.nan if len(calls) - 1 in updates else 1.0))

    monkeypatch.setattr(grpo, "grpo_loss", poisoned)


def test_a_bad_update_is_left_out_its_batch_kept_and_the_run_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1})
    main(rl_settings(checkpoint, tmp_path / "run", guard=GuardConfig(skips=1), random_reward="bernoulli"))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 0, 0]
    kept = tmp_path / "run" / "bad_steps" / "step-000002-0"
    assert json.loads((kept / "report.json").read_text())["rollouts"] == 1
    assert read_bad_step(kept)[0].num_loss_tokens > 0
    assert "step 2 is left out" in " ".join(capsys.readouterr().err.split())
    assert load_model(tmp_path / "run").config.vocab_size > 0  # what was saved is finite


def test_one_bad_update_too_many_ends_the_run(checkpoint, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2})
    config = rl_settings(
        checkpoint, tmp_path / "run", guard=GuardConfig(skips=1), random_reward="bernoulli", save_every=1
    )
    with pytest.raises(FloatingPointError, match=r"step 3: .*step-000003-0.*last good checkpoint is .*step-000002"):
        main(config)


def test_a_guard_that_would_go_back_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"guard\.rollbacks = 1: .*set guard\.skips"):
        rl_settings(checkpoint, tmp_path / "run", guard=GuardConfig(rollbacks=1))


def test_a_run_with_all_of_it_resumes_exactly(checkpoint, tmp_path):
    settings = {
        "dtype": "bfloat16",
        "recompute": "layer",
        "guard": GuardConfig(skips=1, sigmas=6, window=4),
        "save_every": 2,
        "random_reward": "bernoulli",
    }
    config = rl_settings(checkpoint, tmp_path / "whole", **settings)
    main(config)
    main(replace(config, out=str(tmp_path / "parts"), steps=2))
    main(replace(config, out=str(tmp_path / "parts"), resume=True))
    first, second = (load_model(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-000004" / "train_state" / "state.json").read_text())
        for name in ("whole", "parts")
    ]
    assert states[0]["guard"] == states[1]["guard"]
    assert len(states[0]["guard"]["recent"]["loss"]) == 4
