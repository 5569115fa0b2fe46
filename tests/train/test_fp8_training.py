"""Training in FP8, as a CPU emulates it."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from train.runs import assert_same_run, tiny_run
from train.tiny import make_batch, random_sequences, tiny_model, tiny_state

from kogia.log import read_metrics
from kogia.model.config import MLAConfig, MoEConfig
from kogia.model.fp8 import train_in_fp8
from kogia.model.linear import Linear
from kogia.model.transformer import Transformer
from kogia.train.config import Fp8Config, SupervisedConfig
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.step import train_step
from kogia.train.supervised import run_stage

# the demonstration's base model, with a small vocabulary and a layer less
DEMO = {
    "vocab_size": 64, "dim": 96, "num_layers": 2, "ffn_dim": 384, "num_mtp_layers": 0, "init_std": 0.04,
    "attention": MLAConfig(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32),
    "moe": MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=64, num_dense_layers=1),
}  # fmt: skip
LOSS = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-4))


def demo_model(gradients: str | None) -> Transformer:
    model = tiny_model(**DEMO)
    if gradients is not None:
        assert train_in_fp8(model, gradients, power_of_two=gradients == "all") == []  # pyright: ignore[reportArgumentType]
    return model


def losses(model: Transformer, steps: int = 14) -> list[float]:
    state = tiny_state(model, steps, lr=6e-3)
    # counting up from anywhere: what can be learned soon
    batch = make_batch([[(start + i) % 60 for i in range(24)] for start in range(0, 60, 6)])
    return [train_step(state, [batch], LOSS)["loss"] for _ in range(steps)]


@pytest.fixture(scope="module")
def full_precision() -> list[float]:
    return losses(demo_model(None))


@pytest.mark.parametrize("gradients", ["none", "all"])
def test_the_demonstrations_model_learns_in_fp8_as_in_full_precision(gradients, full_precision):
    ours = losses(demo_model(gradients))
    assert ours[0] != full_precision[0] and abs(ours[0] / full_precision[0] - 1) < 2e-3
    assert full_precision[-1] < 0.5 * full_precision[0], "it learns"
    assert abs(sum(ours) / sum(full_precision) - 1) < 0.02


def test_what_the_report_keeps_in_higher_precision_is_not_in_fp8():
    model = demo_model("dense")
    ours = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, Linear) and m.fp8 is not None}
    assert ours == {
        "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"
    }  # fmt: skip
    assert model.lm_head.fp8 is None


def test_powers_of_two_are_for_what_stands_behind_attention_and_goes_to_experts():
    model = demo_model("all")
    powers = {name for name, m in model.named_modules() if isinstance(m, Linear) and m.fp8 and m.fp8.power_of_two}
    assert {name.split(".")[-1] for name in powers} == {"o_proj", "gate_up_proj", "down_proj"}
    assert not any("shared" in name or "layers.0.mlp" in name for name in powers)


def test_widths_that_are_no_multiples_of_16_stay_as_they_are_and_are_named():
    model = tiny_model()  # latent and key: 24
    left = train_in_fp8(model, "dense", power_of_two=False)
    assert left == [f"model.layers.{i}.self_attn.kv_a_proj_with_mqa [24, 32]" for i in range(3)]


def test_without_gradients_the_model_is_that_of_the_dtype():
    model, plain = demo_model("dense"), demo_model(None)
    batch = make_batch(random_sequences([20, 9]))
    with torch.no_grad():
        assert torch.equal(model(batch.tokens), plain(batch.tokens))
    assert not torch.equal(model(batch.tokens), plain(batch.tokens))


def test_weights_are_rounded_once_a_step_and_anew_after_it(monkeypatch):
    from kogia.ops import blockwise

    rounded: list[int] = []
    real = blockwise.quantize_weight
    monkeypatch.setattr(blockwise, "quantize_weight", lambda w: rounded.append(w.numel()) or real(w))
    model = demo_model("dense")
    layers = sum(isinstance(m, Linear) and m.fp8 is not None for m in model.modules())
    state = tiny_state(model, 3)
    batches = [make_batch(random_sequences([20, 9], seed)) for seed in range(3)]
    for step in range(2):
        train_step(state, batches, partial(LOSS, recompute="layer"))
        assert len(rounded) == layers * (step + 1), "three micro-batches, each done twice"


def fp8_run(folder) -> SupervisedConfig:
    return replace(tiny_run(folder), steps=4, save_every=2, eval_every=0, precision="fp8", fp8=Fp8Config("all", True))


def test_a_run_in_fp8_is_resumed_to_the_same_bits(tmp_path):
    whole, parts = (replace(fp8_run(tmp_path), out=str(tmp_path / name)) for name in ("whole", "parts"))
    run_stage(whole)
    run_stage(parts)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000004")
    run_stage(replace(parts, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    plain = replace(fp8_run(tmp_path), precision="dtype", out=str(tmp_path / "plain"))
    run_stage(plain)
    ours, theirs = (read_metrics(tmp_path / name)[0]["loss"] for name in ("whole", "plain"))
    assert ours != theirs and abs(ours / theirs - 1) < 0.01


def test_the_run_says_what_stays_out_of_fp8(tmp_path, capsys):
    run_stage(replace(fp8_run(tmp_path), steps=1, save_every=0))
    said = capsys.readouterr().err
    assert "kv_a_proj_with_mqa [24, 32] and 2 more stay in float32: in FP8 widths are multiples of 16" in " ".join(
        said.split()
    )
