import math

import pytest
import torch
from train.tiny import make_batch, random_sequences, tiny_model

from kogia.model.packed import pack
from kogia.model.routing import Routing
from kogia.train.loss import LossWeights, mtp_targets, supervised_loss, validation_loss


def counted_targets(tokens, wanted: list[int], depth: int) -> tuple[list[int], list[int]]:
    rows, targets, counted = mtp_targets(tokens, torch.tensor(wanted).nonzero().flatten(), depth)
    return rows[counted].tolist(), targets[counted].tolist()


def test_mtp_rows_and_targets_of_two_documents_are_those_worked_out_by_hand():
    #                  row 0  1  2  3 | 4  5  6
    tokens = pack([[10, 11, 12, 13], [20, 21, 22]])
    everything = [0, 1, 1, 1, 0, 1, 1]
    # depth 0 predicts two places on: row 0 -> 12, row 1 -> 13, row 4 -> 22; rows 2, 3, 5, 6 would cross a boundary
    assert counted_targets(tokens, everything, 0) == ([0, 1, 4], [12, 13, 22])
    # depth 1 predicts three places on
    assert counted_targets(tokens, everything, 1) == ([0], [13])
    # only the completion of the first document counts: its last token, which row 1 predicts
    assert counted_targets(tokens, [0, 0, 0, 1, 0, 0, 0], 0) == ([1], [13])


def test_the_loss_is_the_sum_over_documents_computed_one_by_one_from_full_logits():
    model = tiny_model(num_mtp_layers=2)
    sequences = random_sequences([7, 2, 12, 1, 5])
    masks = [[0, 0, 0, 1, 1, 1, 1], [0, 1], [0] + [1] * 11, [0], [0, 0, 0, 0, 0]]
    batch = make_batch(sequences, masks)
    share = batch.num_loss_tokens / batch.tokens.num_tokens
    loss = supervised_loss(model, batch, LossWeights(mtp=0.3, balance=0.01, share=share))
    metrics = loss.metrics

    def nll(logits, targets, wanted):
        logprobs = logits.double().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return -float((logprobs * wanted).sum().detach())

    main, mtp, balance = 0.0, [0.0, 0.0], 0.0
    for ids, on in zip(sequences, masks, strict=True):
        one, t, wanted = pack([ids]), torch.tensor(ids), torch.tensor(on)
        routing = Routing(losses=True)
        hidden = model(one, step=model.step(one, routing=routing))
        main += nll(model.logits(hidden)[:-1], t[1:], wanted[1:])
        balance += float(routing.balance_loss().detach())
        for depth in (0, 1):
            shifted = torch.cat((t[depth + 1 :], torch.zeros(min(depth + 1, len(t)), dtype=torch.long)))
            hidden = model.mtp_hidden(depth, hidden, shifted, model.step(one))
            if (valid := len(ids) - depth - 2) > 0:
                mtp[depth] += nll(model.mtp_logits(depth, hidden)[:valid], t[depth + 2 :], wanted[depth + 2 :])
    assert float(metrics["loss"]) == pytest.approx(main, rel=1e-5)
    assert float(metrics["mtp_loss_1"]) == pytest.approx(mtp[0], rel=1e-5)
    assert float(metrics["mtp_loss_2"]) == pytest.approx(mtp[1], rel=1e-5)
    own = 0.01 * 3 * float(metrics["balance"])  # a mean over the three routers
    assert float(loss.total.detach()) == pytest.approx(main + 0.3 / 2 * sum(mtp) + own, rel=1e-5)


@pytest.mark.parametrize(("num_mtp_layers", "mtp"), [(0, 0.0), (1, 0.0), (2, 0.3)])
def test_the_balance_term_is_one_per_token_and_layer_at_perfect_balance(num_mtp_layers, mtp):
    """Also where prediction modules are there and are not trained: they run no router."""
    model = tiny_model(num_mtp_layers=num_mtp_layers)
    with torch.no_grad():
        for router in model.routers():
            router.weight.zero_()  # equal affinities: P_i = 1/8, so sum f_i P_i = 1 whatever is selected
    batch = make_batch(random_sequences([6, 9]), [[0, 0, 0, 1, 1, 1], [0] * 5 + [1] * 4])
    share = batch.num_loss_tokens / batch.tokens.num_tokens
    metrics = supervised_loss(model, batch, LossWeights(mtp=mtp, balance=0.5, share=share)).metrics
    assert float(metrics["balance"]) == pytest.approx(batch.num_loss_tokens, rel=1e-6)


def test_tokens_outside_the_mask_carry_no_gradient_from_the_loss():
    model = tiny_model(num_mtp_layers=0, moe=None)
    batch = make_batch([[5, 6, 7, 8]], [[0, 0, 1, 0]])
    supervised_loss(model, batch, LossWeights(mtp=0.0, balance=0.0)).total.backward()
    touched = model.model.embed_tokens.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert touched == [5, 6], "only the tokens before the masked one can influence its prediction"


def test_an_untrained_model_starts_near_the_uniform_loss_and_validation_measures_the_same():
    model = tiny_model(init_std=0.01)
    batches = [make_batch(random_sequences([30, 20], seed)) for seed in (1, 2)]
    values = validation_loss(model, batches)
    assert values["val_loss"] == pytest.approx(math.log(48), abs=0.05)
    assert set(values) == {"val_loss", "val_mtp_loss_1", "val_max_vio"}
    training = supervised_loss(model, batches[0], LossWeights(mtp=0.0, balance=0.0)).total
    assert float(training.detach()) / 48 == pytest.approx(validation_loss(model, batches[:1])["val_loss"], rel=1e-5)
