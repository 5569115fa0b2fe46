from functools import partial

import pytest
import torch
from torch import nn
from train.tiny import make_batch, random_sequences, tiny_config, tiny_model, tiny_state

from kogia.model.transformer import build_model
from kogia.ops import adamw
from kogia.train import optim as optim_module
from kogia.train.config import OptimConfig
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.optim import Optimizer, build_optimizer
from kogia.train.step import Loss, train_step

LOSS = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-3))


def quadratic(model, batch):
    return Loss(sum((p.float() ** 2).sum() for p in model.parameters()) / 2, {})


def half_model(**fields):
    return build_model(tiny_config(**fields), dtype=torch.bfloat16)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_one_step_is_adamw_as_written_down_with_decay_on_matrices_only(moments):
    model = tiny_model()
    state = tiny_state(model, weight_decay=0.5, clip=0.0, eps=1e-8, moments=moments)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    train_step(state, [make_batch([[1, 2]])], quadratic)
    for name, p in model.named_parameters():
        w = before[name]
        grad = w  # of the sum of squares over two, one counted token
        m_hat, v_hat = (0.1 * grad) / (1 - 0.9), (0.05 * grad**2) / (1 - 0.95)
        decay = 0.5 if p.ndim >= 2 else 0.0
        expected = w - 1e-2 * decay * w - 1e-2 * m_hat / (v_hat.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_norm_weights_are_not_decayed_and_every_parameter_is_in_exactly_one_group():
    for kind in ("adamw", "muon"):
        model = tiny_model(tie_embeddings=True)
        optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, kind=kind))
        groups = [group for part in optimizer.parts for group in part.param_groups]
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.3][: len(groups)]
        plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        for name, p in model.named_parameters():
            assert (id(p) in plain) == name.endswith("norm.weight"), name
        members = [id(p) for group in groups for p in group["params"]]
        assert sorted(members) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimiser_state_goes_through_tensors_by_name_and_continues_identically(kind, moments, dtype):
    batches = [make_batch(random_sequences([9, 4], seed)) for seed in range(4)]
    first, second = (tiny_state(build_model(tiny_config(), dtype=dtype), kind=kind, moments=moments) for _ in range(2))
    for batch in batches[:2]:
        train_step(first, [batch], quadratic)
    tensors = {name: value.clone() for name, value in first.optimizer.tensors().items()}
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load(tensors)
    for state in (first, second):
        for batch in batches[2:]:
            train_step(state, [batch], quadratic)
    for (name, a), b in zip(first.optimizer.weights.items(), second.optimizer.weights.values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)
    del tensors["model.norm.weight/exp_avg"]
    with pytest.raises(ValueError, match=r"model.norm.weight: found .*another model"):
        second.optimizer.load(tensors)


def test_a_checkpoint_of_the_other_kind_is_refused_by_name():
    first, second = (tiny_state(tiny_model(), kind=kind) for kind in ("adamw", "muon"))
    train_step(first, [make_batch(random_sequences([9]))], quadratic)
    with pytest.raises(ValueError, match=r"q_a_proj.weight: found .*exp_avg.*expected .*momentum.*optim.kind"):
        second.optimizer.load(first.optimizer.tensors())


def test_low_moments_are_bfloat16_between_steps_and_the_same_however_they_are_cut(monkeypatch):
    models = []
    for at_once in (1, 2**26):
        monkeypatch.setattr(adamw, "WIDENED_AT_ONCE", at_once)
        state = tiny_state(tiny_model(), moments="bfloat16")
        for seed in range(3):
            train_step(state, [make_batch(random_sequences([20], seed))], LOSS)
        kept = {name: value.dtype for name, value in state.optimizer.tensors().items()}
        assert {dtype for name, dtype in kept.items() if "exp_avg" in name} == {torch.bfloat16}
        models.append(state.model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_of_the_numbers_keep_their_masters_and_learn_what_float32_learns():
    words = random_sequences([6] * 12, vocab=48)
    batch = make_batch([word + word + word for word in words])
    last = {}
    for name, model, fields in (
        ("float32", tiny_model(num_layers=1), {}),
        ("bfloat16", half_model(num_layers=1), {"moments": "bfloat16"}),
    ):
        state = tiny_state(model, num_steps=60, **fields)
        for _ in range(60):
            last[name] = train_step(state, [batch], LOSS)["loss"]
    assert last["bfloat16"] == pytest.approx(last["float32"], abs=0.1)
    for name, p in state.model.named_parameters():
        master = state.optimizer.weights[name]
        assert master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16()), name
    assert any(not torch.equal(p.float(), state.optimizer.weights[n]) for n, p in state.model.named_parameters())


def test_updates_too_small_for_bfloat16_add_up_in_the_masters():
    model = half_model(moe=None, num_mtp_layers=0)
    state = tiny_state(model, lr=1e-5, num_steps=200, weight_decay=0.0)
    before = model.model.norm.weight.detach().clone()
    for _ in range(200):
        train_step(state, [make_batch([[1, 2]])], quadratic)
    after = model.model.norm.weight
    assert (before == 1).all()
    assert (after < before).all(), "200 steps of 1e-5 are half a step of bfloat16 below 1; each alone is nothing"


def test_gradients_of_micro_batches_are_added_in_float32():
    model = half_model(moe=None, num_mtp_layers=0)
    state = tiny_state(model, clip=0.0)
    weight = model.model.norm.weight

    def slope(model, batch):
        return Loss((model.model.norm.weight.float() * (1.0 if batch.num_loss_tokens == 1 else 1e-3)).sum(), {})

    batches = [make_batch([[1, 2]]), *(make_batch([[1, 2, 3]]) for _ in range(8))]
    train_step(state, batches, slope, denominator=1.0)
    master = state.optimizer.weights["model.norm.weight"]
    torch.testing.assert_close(master.grad, torch.full_like(master, 1.008), rtol=1e-4, atol=0)
    assert weight.grad is None


def test_the_norm_of_gradients_of_any_size_and_dtype_is_that_in_float64(monkeypatch):
    monkeypatch.setattr(optim_module, "_LARGE", 100)
    model = nn.ParameterDict({
        "large": nn.Parameter(torch.zeros(11, 13, dtype=torch.bfloat16)), "small": nn.Parameter(torch.zeros(7)),
        "narrow": nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)), "whole": nn.Parameter(torch.zeros(200)),
    })  # fmt: skip
    optimizer = Optimizer(model, OptimConfig())
    draw, squares = torch.Generator().manual_seed(0), 0.0
    for name, weight in optimizer.weights.items():
        weight.grad = grad = torch.randn(weight.shape, generator=draw).to(model[name].dtype)
        squares += float(grad.double().square().sum())
    assert float(optimizer.gradient_norm()) == pytest.approx(squares**0.5, rel=1e-6)
