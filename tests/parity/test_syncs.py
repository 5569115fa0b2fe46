"""How often a step makes the host wait for the device, and how often it sends it something.

On a CPU neither shows, so they are counted where they would happen on a GPU (tests/crossings.py).
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from crossings import Crossings, counting
from torch.utils.checkpoint import checkpoint
from train.tiny import make_batch, random_sequences, tiny_model, tiny_state

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.packed import pack
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer, build_model
from kogia.rl.config import RLConfig
from kogia.rl.grpo import grpo_loss
from kogia.rl.loss import PolicyBatch
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.step import train_step

MLA = MLAConfig(num_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
CONFIG = ModelConfig(
    vocab_size=61, dim=32, num_layers=3, ffn_dim=64, attention=MLA, num_mtp_layers=1, max_position=256, init_std=0.2,
    moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=16, num_groups=4, topk_groups=2),
)  # fmt: skip
MODELS = {
    "mla": CONFIG,
    "sparse": replace(CONFIG, attention=replace(MLA, indexer=IndexerConfig(num_heads=4, head_dim=16, topk=6))),
    "gqa": replace(CONFIG, attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8), moe=None),
}
PARAMS = SamplingParams(temperature=0.8, top_p=0.9, min_p=0.01, max_tokens=60, seed=7, ignore_eos=True)


def running_engine(model: Transformer, **options) -> Engine:
    """Three sequences that decode, one of them greedily, in steps that are not recorded."""
    engine = Engine(model, None, EngineConfig(block_size=4, num_blocks=200, graphs=False, **options))
    for prompt, params in (([0, 5, 9], PARAMS), ([7] * 17, PARAMS), ([3, 4], replace(PARAMS, temperature=0.0))):
        engine.add(prompt, params, stream=True)
    for _ in range(4):
        engine.step()
    return engine


def assert_one_of_each(found: Crossings) -> None:
    assert found.syncs.total() == 1, found.syncs
    assert found.uploads.total() == 1, found.uploads


@pytest.mark.parametrize("drafts", [0, 1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_sends_once_and_waits_once(name, drafts):
    engine = running_engine(build_model(MODELS[name]), num_draft_tokens=drafts)
    with counting() as decode:
        engine.step()
    engine.add(list(range(2, 40)), PARAMS)  # a mixed step: lengths of 1 and 38
    with counting() as mixed:
        engine.step()
    for found in (decode, mixed):
        assert_one_of_each(found)


RULED = SamplingParams(
    presence_penalty=0.5, repetition_penalty=1.2, logit_bias={5: 1.0}, allowed_token_ids=tuple(range(50)),
    min_tokens=50, stop_token_ids=(7,), logprobs=5, prompt_logprobs=2, max_tokens=60, seed=7,
)  # fmt: skip


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_step_with_rules_and_scores_sends_once_and_waits_once(drafts):
    engine = running_engine(build_model(CONFIG), num_draft_tokens=drafts)
    engine.add([3, 4], RULED)
    engine.step()
    with counting() as decode:
        engine.step()
    engine.add(list(range(2, 40)), RULED)
    with counting() as mixed:
        engine.step()
    for found in (decode, mixed):
        assert_one_of_each(found)


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_chunk_of_a_prefill_sends_once_and_waits_once(drafts):
    engine = Engine(build_model(CONFIG), None, EngineConfig(max_batch_tokens=8, num_draft_tokens=drafts, graphs=False))
    engine.add(list(range(2, 40)), PARAMS)
    engine.step()
    with counting() as found:  # nothing is sampled; what it waits for is only the end of the step
        engine.step()
    assert_one_of_each(found)


def test_launching_waits_for_nothing_and_a_second_step_may_be_launched_before_the_first_has_landed():
    engine = running_engine(build_model(CONFIG))
    first = engine.scheduler.plan()
    with counting() as launching:
        flight = engine.runner.launch(first)
    second = engine.scheduler.plan()
    assert second is not None
    assert second.is_pending.all()
    with counting() as ahead:
        later = engine.runner.launch(second)
    for found in (launching, ahead):
        assert found.syncs.total() == 0, found.syncs
        assert found.uploads.total() == 1, found.uploads
    with counting() as landing:
        tokens = [flight.wait().tokens, later.wait().tokens]
    assert landing.syncs.total() == 2
    outcomes = [engine.scheduler.settle(plan, f.wait())[0] for plan, f in ((first, flight), (second, later))]
    assert [[o.token_ids[0] for o in step] for step in outcomes] == [t.tolist() for t in tokens]
    expected = running_engine(engine.model)
    assert [[e.token_ids[0] for e in expected.step()] for _ in range(2)] == [t.tolist() for t in tokens]


def policy_batch() -> PolicyBatch:
    tokens = pack(random_sequences([12, 7, 9]))
    mask = tokens.positions >= 3
    values = torch.linspace(-1, 1, tokens.num_tokens)
    return PolicyBatch(tokens, mask, values, -values.abs(), torch.full((3,), 0.1), int(mask.sum()))


def rl_loss(model: Transformer, batch: PolicyBatch):
    config = RLConfig(init="x", out="y", tasks=("countdown",))
    return grpo_loss(model, batch, config=config, weights=LossWeights(mtp=0.3, balance=1e-3, indexer=1.0))


@pytest.mark.parametrize("indexer", [None, IndexerConfig(num_heads=2, head_dim=16, topk=6)], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", ["supervised", "policy"])
def test_a_training_step_waits_once_whatever_the_number_of_micro_batches(kind, indexer):
    model = tiny_model(attention=replace(MLA, indexer=indexer))
    state = tiny_state(model)
    if kind == "supervised":
        batches = [make_batch(random_sequences(lengths)) for lengths in ([12, 20, 3], [70, 1, 2])]
        loss = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-3, indexer=1.0))
    else:
        batches, loss = [policy_batch(), policy_batch()], rl_loss
    train_step(state, batches, loss)
    with counting() as found:
        metrics = train_step(state, batches, loss)
    assert found.syncs.total() == 1, found.syncs
    assert np.isfinite(list(metrics.values())).all()


def layer_by_layer(model: Transformer, batch, routing: Routing, *, recompute: bool) -> torch.Tensor:
    step = model.step(batch, routing=routing)
    x = model.model.embed_tokens(batch.token_ids)
    for layer in model.model.layers[: model.config.num_layers]:
        x = checkpoint(layer, x, step, use_reentrant=False) if recompute else layer(x, step)
    return x


def test_activation_checkpointing_changes_no_load_no_loss_and_no_gradient():
    model, batch = tiny_model(num_layers=3), pack(random_sequences([40, 60, 24]))
    found = []
    for recompute in (False, True):
        routing = Routing(losses=True)
        hidden = layer_by_layer(model, batch, routing, recompute=recompute)
        loss = hidden.square().sum() + 0.1 * routing.balance_loss()
        model.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((routing.loads(3), routing.balance_loss().detach(), routing.chosen, grads))
    (loads, balance, chosen, grads), (loads_again, balance_again, chosen_again, grads_again) = found
    assert loads.sum(1).tolist() == [2 * 124] * 2 + [0]  # each token copy once, and no MTP module ran
    assert loads_again.equal(loads)
    assert balance_again == balance
    assert all(chosen[i].equal(chosen_again[i]) for i in range(2))
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=0, atol=0)


def test_a_recomputed_forward_repeats_its_choice_even_when_the_bias_has_moved():
    model, batch = tiny_model(num_layers=2), pack(random_sequences([30]))
    routing = Routing(losses=True)
    hidden = layer_by_layer(model, batch, routing, recompute=True)
    chosen = routing.chosen[0].clone()
    with torch.no_grad():
        model.routers()[0].e_score_correction_bias[:] = torch.randn(8) * 10
    hidden.square().sum().backward()
    assert routing.chosen[0].equal(chosen)
    assert routing.loads(2).sum(1).tolist() == [60, 0]
