"""Training whose float32 products are made of bfloat16."""

import shutil
from dataclasses import replace
from functools import partial

import torch
from train.runs import assert_same_run, tiny_run
from train.test_fp8_training import DEMO
from train.tiny import make_batch, tiny_model, tiny_state

from kogia.ops.cpu import build
from kogia.ops.linear import are_rounded
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.step import train_step
from kogia.train.supervised import build_run, run_stage

LOSS = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-4))
BATCH = make_batch([[(start + i) % 60 for i in range(24)] for start in range(0, 60, 6)])


def has_instructions() -> bool:
    try:
        return "BF16" in build.level()
    except ImportError:
        return False


def losses(*, rounds: bool, steps: int = 14) -> list[float]:
    state = tiny_state(tiny_model(**DEMO), steps, lr=6e-3)
    state.rounds_products = rounds
    return [train_step(state, [BATCH], LOSS)["loss"] for _ in range(steps)]


def test_the_demonstrations_model_learns_from_rounded_products_as_in_full_precision():
    exact, ours = losses(rounds=False), losses(rounds=True)
    assert (ours[0] != exact[0]) is has_instructions() and abs(ours[0] / exact[0] - 1) < 1e-3
    assert exact[-1] < 0.5 * exact[0], "it learns"
    assert abs(sum(ours) / sum(exact) - 1) < 0.01
    assert not are_rounded(), "outside of steps"


def test_gradients_of_rounded_products_are_float32_and_nearly_those_of_exact_ones():
    found = []
    for rounds in (False, True):
        state = tiny_state(tiny_model(**DEMO), 1)
        state.rounds_products = rounds
        with state.products():
            LOSS(state.model, BATCH).total.backward()
        found.append({name: p.grad for name, p in state.model.named_parameters() if p.grad is not None})
    exact, ours = (torch.cat([grad.flatten() for grad in each.values()]) for each in found)
    assert ours.dtype == torch.float32 and (ours - exact).norm() < 0.03 * exact.norm()


def test_a_run_with_rounded_products_is_resumed_to_the_bit(tmp_path):
    config = replace(tiny_run(tmp_path), steps=4, save_every=2, eval_every=0, precision="bfloat16")
    whole, parts = (replace(config, out=str(tmp_path / name)) for name in ("whole", "parts"))
    assert run_stage(whole).state.rounds_products
    run_stage(parts)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000004")
    run_stage(replace(parts, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_model_in_bfloat16_has_nothing_to_round(tmp_path):
    config = replace(tiny_run(tmp_path), dtype="bfloat16", precision="bfloat16")
    assert not build_run(config).state.rounds_products
