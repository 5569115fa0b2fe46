import pytest
import torch
from train.tiny import make_batch, random_sequences, tiny_model, tiny_state

from kogia.train.config import OptimConfig
from kogia.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from kogia.train.step import Loss, train_step


def quadratic(model, batch):
    return Loss(sum((p**2).sum() for p in model.parameters()) / 2, {})


def test_one_step_is_adamw_as_written_down_with_decay_on_matrices_only():
    model = tiny_model()
    state = tiny_state(model, weight_decay=0.5, clip=0.0, eps=1e-8)
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
    model = tiny_model(tie_embeddings=True)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decayed, plain = (set(map(id, group["params"])) for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, p in model.named_parameters():
        assert (id(p) in plain) == name.endswith("norm.weight"), name
    assert len(decayed) + len(plain) == len(list(model.parameters()))
    assert not decayed & plain


def test_optimiser_state_goes_through_tensors_by_name_and_continues_identically():
    batches = [make_batch(random_sequences([9, 4], seed)) for seed in range(4)]
    first, second = tiny_state(tiny_model()), tiny_state(tiny_model())
    for batch in batches[:2]:
        train_step(first, [batch], quadratic)
    tensors = {name: value.clone() for name, value in optimizer_tensors(first.model, first.optimizer).items()}
    second.model.load_state_dict(first.model.state_dict())
    load_optimizer_tensors(second.model, second.optimizer, tensors)
    for state in (first, second):
        for batch in batches[2:]:
            train_step(state, [batch], quadratic)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    del tensors["model.norm.weight/exp_avg"]
    with pytest.raises(ValueError, match=r"model.norm.weight: found .*another model"):
        load_optimizer_tensors(second.model, second.optimizer, tensors)
