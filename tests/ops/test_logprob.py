import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kogia.ops import logprob
from kogia.ops.logprob import linear_logprob, linear_loss


def plain(hidden, weight, targets, temperature):
    logp = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def example(rows: int, dim: int, vocab: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


@given(rows=st.integers(0, 9), chunk=st.integers(1, 40), temperature=st.sampled_from([0.25, 1.0, 3.0]))
def test_values_and_gradients_do_not_depend_on_the_chunks(rows, chunk, temperature):
    hidden, weight, targets = example(rows, 5, 11, seed=rows)
    upstream = torch.linspace(-1, 2, rows, dtype=torch.float64)
    want, want_entropy = plain(hidden, weight, targets, temperature)
    want_grads = torch.autograd.grad(want, (hidden, weight), upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob, "chunk_rows", lambda *_: max(1, chunk // 11))
        got, entropy = linear_logprob(hidden, weight, targets, temperature)
        got_grads = torch.autograd.grad(got, (hidden, weight), upstream)
    torch.testing.assert_close((got, entropy), (want, want_entropy), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-10, atol=1e-10)


def test_numerical_differentiation_agrees(monkeypatch):
    monkeypatch.setattr(logprob, "chunk_rows", lambda *_: 2)
    hidden, weight, targets = example(3, 4, 7)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets, 0.7)[0], (hidden, weight))


def test_entropy_is_that_of_a_uniform_and_of_a_certain_prediction_and_has_no_gradient():
    hidden = torch.tensor([[0.0], [1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    values, entropy = linear_logprob(hidden, weight, torch.tensor([2, 0]))
    torch.testing.assert_close(entropy, torch.tensor([4.0, 1.0]).log())
    torch.testing.assert_close(values, torch.tensor([0.25, 1.0]).log())
    assert not entropy.requires_grad


@pytest.mark.parametrize("chunk", [20, 2])
def test_bfloat16_inputs_give_float32_logprobs_and_bfloat16_gradients(monkeypatch, chunk):
    monkeypatch.setattr(logprob, "chunk_rows", lambda *_: chunk)
    hidden, weight, targets = example(12, 16, 32, torch.bfloat16)
    values, entropy = linear_logprob(hidden, weight, targets)
    values.sum().backward()
    assert (values.dtype, entropy.dtype) == (torch.float32, torch.float32)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    want, want_entropy = plain(wide_hidden, wide_weight, targets, 1.0)
    want.sum().backward()
    torch.testing.assert_close(values.double(), want, rtol=0.02, atol=0.06)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0.05, atol=0.06)
    torch.testing.assert_close(hidden.grad.double(), wide_hidden.grad, rtol=0.05, atol=0.1)
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=0.05, atol=0.1)


def test_huge_logits_stay_finite():
    hidden, weight, targets = example(4, 3, 6, torch.float32)
    values, entropy = linear_logprob(hidden * 1e6, weight, targets)
    values.sum().backward()
    for tensor in (values, entropy, hidden.grad, weight.grad):
        assert tensor.isfinite().all()


@given(rows=st.integers(0, 9), chunk=st.integers(1, 4), masked=st.booleans())
def test_the_summed_loss_and_its_gradient_are_the_plain_formula(rows, chunk, masked):
    hidden, weight, targets = example(rows, 5, 11, seed=rows)
    counted = torch.arange(rows) % 3 != 1 if masked else None
    logprobs, want_entropy = plain(hidden, weight, targets, 1.0)
    want = -(logprobs if counted is None else logprobs[counted]).sum()
    want_grads = torch.autograd.grad(0.3 * want, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob, "chunk_rows", lambda *_: chunk)
        loss, values, entropy = linear_loss(hidden, weight, targets, counted)
        got_grads = torch.autograd.grad(0.3 * loss, (hidden, weight))
        with torch.no_grad():
            assert torch.allclose(linear_loss(hidden, weight, targets, counted)[0], want, rtol=1e-11)
    torch.testing.assert_close((loss, values, entropy), (want, logprobs, want_entropy), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-10, atol=1e-10)
    assert not values.requires_grad
    assert not entropy.requires_grad


def test_numerical_differentiation_agrees_with_the_summed_loss(monkeypatch):
    monkeypatch.setattr(logprob, "chunk_rows", lambda *_: 2)
    hidden, weight, targets = example(3, 4, 7)
    counted = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda h, w: linear_loss(h, w, targets, counted)[0], (hidden, weight))


def test_the_bfloat16_loss_is_as_near_to_float64_as_its_inputs_allow(monkeypatch):
    monkeypatch.setattr(logprob, "chunk_rows", lambda *_: 5)
    hidden, weight, targets = example(12, 16, 32, torch.bfloat16)
    loss, _, _ = linear_loss(hidden, weight, targets)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = -plain(*wide, targets, 1.0)[0].sum()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=0.01, atol=0.1)
    for ours, theirs in zip((hidden, weight), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0.05, atol=0.1)


def test_chunks_keep_products_large_at_a_large_vocabulary():
    assert logprob.chunk_rows(129280, torch.empty(0)) == 256
    assert logprob.chunk_rows(512, torch.empty(0)) == 256
    assert logprob.chunk_rows(16, torch.empty(0)) == 8192


@pytest.mark.parametrize(("rows", "most", "want"), [
    (0, 512, []), (1, 512, [1]), (512, 512, [512]), (513, 512, [512, 1]), (1100, 1024, [768, 332]),
    (32768, 10752, [8192, 8192, 8192, 8192]), (33000, 10752, [8448, 8448, 8448, 7656]),
])  # fmt: skip
def test_chunks_are_as_few_as_may_be_and_of_nearly_one_size(rows, most, want, monkeypatch):
    monkeypatch.setattr(logprob, "chunk_rows", lambda *_: most)
    hidden = torch.empty(rows, 1)
    parts = logprob._chunks(hidden, torch.empty(3, 1))
    assert [len(hidden[part]) for part in parts] == want
