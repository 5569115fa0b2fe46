from functools import partial

import pytest
import torch
from torch import nn
from train.tiny import make_batch, random_sequences, tiny_model, tiny_state

from kogia.train.config import OptimConfig
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.muon import ITERATIONS, Muon, orthogonalised
from kogia.train.optim import build_optimizer
from kogia.train.step import train_step


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8), (5, 16, 12), (3, 2, 12, 16), (1, 7), (7, 1)])
def test_matrices_keep_their_singular_vectors_and_get_singular_values_near_one(shape):
    x = random_matrix(*shape)
    y = orthogonalised(x)
    assert y.shape == x.shape
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ vh.mT  # diagonal where the vectors are the same
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert ((values > 0.3) & (values < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=2e-4)


def test_each_matrix_of_a_stack_is_what_it_is_alone():
    stack = random_matrix(4, 2, 10, 6) * torch.tensor([1e-4, 1.0, 30.0, 1e4])[:, None, None, None]
    together = orthogonalised(stack)
    for i in range(4):
        for j in range(2):
            torch.testing.assert_close(together[i, j], orthogonalised(stack[i, j]), rtol=1e-4, atol=1e-5)


def test_a_matrix_without_gradient_does_not_move_and_is_not_nan():
    assert torch.equal(orthogonalised(torch.zeros(3, 4, 5)), torch.zeros(3, 4, 5))


def test_updates_are_those_of_torchs_own_muon_up_to_its_bfloat16():
    ours, theirs = (nn.Parameter(random_matrix(12, 20)) for _ in range(2))
    mine = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.3)
    peer = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(4):
        ours.grad = theirs.grad = random_matrix(12, 20, seed=seed + 1)
        mine.step()
        peer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.005)
    assert ITERATIONS == 5
    assert (ours - random_matrix(12, 20)).abs().mean() > 0.05, "they moved ten times further"


def test_updates_are_as_large_as_those_of_adamw():
    weight = nn.Parameter(torch.zeros(6, 64, 32))
    muon = Muon([weight], lr=1.0, momentum=0.95, weight_decay=0.0)
    weight.grad = random_matrix(6, 64, 32)
    muon.step()
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_muon_takes_the_matrices_of_layers_and_leaves_vocabulary_routers_and_norms():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, kind="muon"))
    adamw, muon = ({id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    left = {name for name, p in model.named_parameters() if id(p) in adamw}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj", "gate_up_proj", "eh_proj",
    }  # fmt: skip
    others = ("norm.weight", "mlp.gate.weight", "lm_head.weight", "embed_tokens.weight")
    assert all(name.endswith(others) for name in left)
    assert len(names) + len(left) == len(list(model.parameters()))


def test_a_tied_head_stays_with_adamw():
    model = tiny_model(tie_embeddings=True)
    _, muon = build_optimizer(model, OptimConfig(lr=1e-3, kind="muon")).parts
    assert all(p is not model.lm_head.weight for group in muon.param_groups for p in group["params"])


def test_muon_learns_a_copy_task_as_adamw_does():
    losses = {}
    words = random_sequences([6] * 12, vocab=48)
    batch = make_batch([word + word + word for word in words])
    loss = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-3))
    for kind in ("adamw", "muon"):
        state = tiny_state(tiny_model(num_layers=1), num_steps=60, kind=kind)
        for _ in range(60):
            losses[kind] = train_step(state, [batch], loss)["loss"]
    assert losses["muon"] < 1.0
    assert losses["muon"] < 1.3 * losses["adamw"]
