"""What benchmarks/training.py and fp8_loss.py compare, and how."""

import importlib.util
import sys
from argparse import Namespace
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from kogia.model.costs import num_active_params, num_params

ROOT = Path(__file__).parent.parent.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


training, fp8_loss = load("training"), load("fp8_loss")


@pytest.mark.parametrize(("work", "params", "active"), [("1b", 1.245e9, 0.242e9), ("16b-layers", 4.594e9, 1.082e9)])
def test_models_have_the_size_that_is_told_and_the_dense_one_as_many_as_a_token_uses(monkeypatch, work, params, active):
    monkeypatch.setattr(training, "ON_GPU", True)
    ours, dense = (training.model_of(work, who) for who in ("ours", "dense"))
    assert num_params(ours) == pytest.approx(params, rel=1e-3)
    assert num_active_params(ours) == pytest.approx(active, rel=2e-3)
    assert num_params(dense) == num_active_params(dense) == pytest.approx(num_active_params(ours), rel=5e-3)
    assert replace(dense, moe=ours.moe, ffn_dim=ours.ffn_dim) == ours


def measured(work: str, variant: str, value: float) -> dict:
    return training.figure(work, variant, {"tokens_per_second": [0.9 * value, value, value]}, 1e15)


def test_moe_tax_is_time_over_time_at_the_largest_step_and_other_ratios_are_best_over_best():
    steps = {"dense-eager-8": 9, "ours-eager-8": 3, "dense-eager-16": 10, "ours-eager-16": 8}
    (tax,) = training.ratios("moe-tax", [measured("moe-tax", *each) for each in steps.items()])
    assert (tax["id"], tax["value"], tax["low"], tax["sequences"]) == ("moe-tax", 1.25, 1.125, 16)
    steps = {"peer-compiled-4": 10, "ours-eager-4": 11, "peer-compiled-8": 8, "ours-eager-8": 15}
    rows = [measured("16b-layers", *each) for each in steps.items()]
    assert [each["value"] for each in training.ratios("16b-layers", rows)] == [1.5]
    assert training.ratios("16b-layers", [*rows[1::2], {"id": "train-16b-layers-peer-compiled-b4", "error": ""}]) == []


@pytest.mark.parametrize("is_tiny", [False, True])
def test_two_runs_of_a_pair_differ_in_their_precision_alone(tmp_path, is_tiny):
    args = Namespace(work=tmp_path, tokens=None, documents=None, weight_gradients="dense", device="cpu")
    dense, fp8 = (fp8_loss.run_of(args, tmp_path, precision, 3, is_tiny) for precision in ("dtype", "fp8"))
    assert (fp8.precision, fp8.seed) == ("fp8", 3)
    assert replace(fp8, precision="dtype", out=dense.out) == dense
    assert is_tiny or fp8.steps * fp8.data.batch_tokens >= 1e8


def test_the_gap_is_in_percent_of_the_loss_in_bfloat16_with_the_interval_of_pairs(tmp_path):
    args = Namespace(work=tmp_path, tokens=None, documents=None, weight_gradients="dense", device="cpu")
    run = fp8_loss.run_of(args, tmp_path, "fp8", 0, True)
    pairs = [
        {
            "bf16": {"loss": 2.0, "val_loss": 4.0, "tokens_per_second": 10.0},
            "fp8": {"loss": 2.0 * (1 + gap / 100), "val_loss": 4.0, "tokens_per_second": 8.0, "tokens": 5},
        }
        for gap in (0.1, 0.3, 0.2)
    ]
    gap, held_out, speed = fp8_loss.rows(pairs, run)
    reach = 4.303 * 0.1 / sqrt(3)  # Student's t of two degrees of freedom
    assert (gap["value"], gap["low"], gap["high"]) == pytest.approx((0.2, 0.2 - reach, 0.2 + reach), abs=2e-4)
    assert (held_out["value"], speed["value"], gap["seeds"]) == (0.0, 0.8, 3)
    assert fp8_loss.rows(pairs[:1], run)[0]["low"] is None
