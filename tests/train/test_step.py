import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from train.tiny import ATTENTION, make_batch, random_sequences, tiny_model, tiny_state

from kogia.model.config import IndexerConfig
from kogia.train.config import SupervisedConfig
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.step import Loss, train_step
from kogia.train.supervised import loss_for_step

LOSS = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-3))


def test_every_parameter_changes_after_one_step():
    for fields in ({}, {"num_mtp_layers": 2}, {"tie_embeddings": True}):
        model = tiny_model(**fields)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(tiny_state(model, weight_decay=0.0), [make_batch(random_sequences([40, 60]))], LOSS)
        same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
        assert same == []


def test_two_micro_batches_give_the_update_of_one_twice_as_large():
    sequences = random_sequences([12, 20, 12, 20])
    whole, split = tiny_state(tiny_model()), tiny_state(tiny_model())
    one = train_step(whole, [make_batch(sequences)], LOSS)
    two = train_step(split, [make_batch(sequences[:2]), make_batch(sequences[2:])], LOSS)
    for (name, a), b in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(whole.model.routers(), split.model.routers(), strict=True):
        assert torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)
    assert one == pytest.approx(two, rel=1e-4)


def test_uneven_micro_batches_are_weighted_by_their_tokens_not_averaged():
    batches = [make_batch(random_sequences([5])), make_batch(random_sequences([50], seed=1))]
    sums = [float(LOSS(tiny_model(), batch).metrics["loss"]) for batch in batches]
    metrics = train_step(tiny_state(tiny_model()), batches, LOSS)
    assert metrics["loss"] == pytest.approx(sum(sums) / (4 + 49), rel=1e-5)
    assert metrics["tokens"] == 53


@pytest.mark.parametrize("shares", [(0.1, 0.95), (0.5, 0.02)])
def test_losses_of_routers_and_indexers_do_not_depend_on_the_cut_where_masks_are_uneven(shares):
    """Two documents, of which different shares count: in one micro-batch, and in two."""
    sequences = random_sequences([60, 60])
    masks = [[int(0 < i <= 60 * share) for i in range(60)] for share in shares]
    indexer = IndexerConfig(num_heads=2, head_dim=16, topk=8)
    grads = []
    for cut in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        state = tiny_state(tiny_model(attention=replace(ATTENTION, indexer=indexer)), clip=0.0)
        batches = [make_batch(sequences[part], masks[part]) for part in cut]
        config = SupervisedConfig("unused", balance_weight=0.5, indexer_weight=1.0)
        train_step(state, batches, loss_for_step(config, state, batches))
        grads.append(
            {n: p.grad.clone() for n, p in state.model.named_parameters() if "gate.weight" in n or "indexer" in n}
        )
    assert any("indexer" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_a_denominator_replaces_the_token_count_in_the_gradient_but_not_in_the_metrics():
    batch = make_batch(random_sequences([9]))
    first = train_step(tiny_state(tiny_model(), clip=0.0), [batch], LOSS)
    second = train_step(tiny_state(tiny_model(), clip=0.0), [batch], LOSS, denominator=2.0)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"] * 8 / 2, rel=1e-5)
    assert second["loss"] == first["loss"]


def test_gradients_are_clipped_to_the_global_norm_and_the_norm_before_is_reported():
    state = tiny_state(tiny_model(), clip=0.01)
    metrics = train_step(state, [make_batch(random_sequences([30]))], LOSS)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in state.model.parameters()))
    assert metrics["grad_norm"] > 0.01
    assert norm == pytest.approx(0.01, rel=1e-4)


def test_biases_move_towards_experts_below_the_mean_load_and_max_vio_is_as_defined():
    model = tiny_model()
    batch = make_batch(random_sequences([64]))
    chosen: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda _, __, out: chosen.append(out.expert_ids)) for r in model.routers()]
    state = tiny_state(model)
    state.bias_update_speed = 0.25
    metrics = train_step(state, [batch], LOSS)
    for hook in hooks:
        hook.remove()
    violations = []
    for router, ids in zip(model.routers(), chosen, strict=True):
        load = [ids.flatten().tolist().count(expert) for expert in range(8)]
        mean = 64 * 2 / 8
        assert router.e_score_correction_bias.tolist() == [0.25 * ((c < mean) - (c > mean)) for c in load]
        violations.append((max(load) - mean) / mean)
    assert metrics["max_vio"] == pytest.approx(sum(violations) / 2)
    assert metrics["max_vio_worst"] == pytest.approx(max(violations))
    state.bias_update_speed = 0.0
    biases = [router.e_score_correction_bias.clone() for router in model.routers()]
    train_step(state, [batch], LOSS)
    assert all(torch.equal(r.e_score_correction_bias, b) for r, b in zip(model.routers(), biases, strict=True))


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_value_and_way_back():
    model = tiny_model()
    state = tiny_state(model)
    train_step(state, [make_batch(random_sequences([9]))], LOSS)
    state.last_checkpoint = Path("runs/x/checkpoints/step-000001")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [
        make_batch([[1]], [[0]]),
        make_batch(random_sequences([9])),
    ]  # nothing counts in the first: its loss is 0
    with pytest.raises(
        FloatingPointError, match=r"step 2: the loss of micro-batch 1 is nan.*step-000001.*optim.lr = 0.01"
    ):
        train_step(state, batches, LOSS)
    assert all(
        torch.equal(value, before[name]) or name == "lm_head.weight" for name, value in model.state_dict().items()
    )
    assert state.step == 1


def test_a_gradient_that_is_not_finite_names_the_parameter():
    def exploding(model, batch):
        weight = model.model.norm.weight
        return Loss((weight * 0.0).sqrt().sum() + weight.sum(), {})

    state = tiny_state(tiny_model())
    with pytest.raises(
        FloatingPointError, match=r"step 1: the gradient norm is .*first in model.norm.weight.*nothing is"
    ):
        train_step(state, [make_batch(random_sequences([9]))], exploding)


def test_a_step_without_a_token_that_counts_is_an_error():
    with pytest.raises(ValueError, match="step 1: none of its tokens counts"):
        train_step(tiny_state(tiny_model()), [make_batch([[1, 2]], [[0, 0]])], LOSS)


def test_repeated_steps_on_a_copy_task_learn_it_on_both_heads():
    model = tiny_model(num_layers=1)
    state = tiny_state(model, num_steps=80)
    words = random_sequences([6] * 12, vocab=48)
    batch = make_batch([word + word + word for word in words])
    for _ in range(80):
        metrics = train_step(state, [batch], LOSS)
    assert metrics["loss"] < 0.8
    assert metrics["mtp_loss_1"] < 1.2
