from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from train.tiny import ATTENTION, make_batch, random_sequences, tiny_model, tiny_state

from kogia.model.config import IndexerConfig
from kogia.model.moe import Router
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.step import Loss, train_step

WEIGHTS = LossWeights(mtp=0.3, balance=0.5)
PARTS = ("none", "attention", "feed_forward", "layer")
INDEXED = replace(ATTENTION, indexer=IndexerConfig(num_heads=2, head_dim=16, topk=8))


def loss_and_grads(recompute: str, **fields) -> tuple[Loss, dict[str, torch.Tensor]]:
    model = tiny_model(**{"num_layers": 3, "num_mtp_layers": 2, **fields})
    batch = make_batch(random_sequences([30, 41, 7]))
    loss = supervised_loss(model, batch, WEIGHTS, recompute=recompute)
    loss.total.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fields", [{}, {"attention": INDEXED}], ids=["dense attention", "indexer"])
@pytest.mark.parametrize("recompute", PARTS[1:])
def test_loads_losses_and_gradients_are_those_of_a_pass_that_kept_everything(recompute, fields):
    kept, kept_grads = loss_and_grads("none", **fields)
    again, grads = loss_and_grads(recompute, **fields)
    assert torch.equal(again.loads, kept.loads)
    for name, value in kept.metrics.items():
        assert torch.equal(again.metrics[name], value), name
    assert torch.equal(again.total, kept.total)
    assert grads.keys() == kept_grads.keys()
    for name, grad in kept_grads.items():
        assert torch.equal(grads[name], grad), name


def test_each_part_keeps_less_for_the_backward_pass_and_a_layer_least():
    kept = {}
    for recompute in PARTS:
        numbers = 0

        def pack(tensor):
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        model = tiny_model(num_layers=4, num_mtp_layers=0)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            supervised_loss(model, make_batch(random_sequences([64] * 8)), WEIGHTS, recompute=recompute)
        kept[recompute] = numbers
    assert kept["layer"] < min(kept["attention"], kept["feed_forward"])
    assert max(kept["attention"], kept["feed_forward"]) < kept["none"]
    assert kept["layer"] < kept["none"] / 3


def test_routers_run_twice_and_biases_move_once():
    steps = []
    for recompute in ("none", "layer"):
        model, runs = tiny_model(), []
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        state = tiny_state(model)
        batches = [make_batch(random_sequences([50], seed)) for seed in range(2)]
        metrics = train_step(state, batches, lambda m, b, r=recompute: supervised_loss(m, b, WEIGHTS, recompute=r))
        steps.append((metrics, [router.e_score_correction_bias.clone() for router in model.routers()], len(runs)))
    (first, biases, once), (second, again, twice) = steps
    assert first == second
    assert all(map(torch.equal, biases, again))
    assert twice == 2 * once == 2 * 2 * 2, "two routers, two micro-batches"
