"""Requests that use fewer or more routed experts than the model was trained with. The reference is the model itself,
run over the whole sequence for every token, without a cache, and experts as a loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import Completion, SamplingParams
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.moe import MoE
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.ops.moe import Activation

CONFIG = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=3,
    ffn_dim=64,
    attention=MLAConfig(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=3, expert_dim=16, num_dense_layers=1),
    num_mtp_layers=1,
    max_position=128,
    init_std=0.2,
)
PROMPT = [0, 5, 9, 11, 3, 8, 8, 21, 4, 17, 30, 2, 2, 6]
KINDS = [{}, {"active_experts": 1}, {"active_experts": 6}, {"expert_threshold": 0.7}]
KINDS += [{"active_experts": 5, "expert_threshold": 0.5}, {"active_experts": 8}]
CUTS = {
    "chunked": {"max_batch_tokens": 5},
    "preempted": {"num_blocks": 16},
    "few rows": {"max_sequences": 2},
    "overlapped": {"overlap": True},
    "one draft": {"num_draft_tokens": 1},
    "three drafts": {"num_draft_tokens": 3, "max_batch_tokens": 9},
    "no prefix cache": {"prefix_cache": False},
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Random, with logits far enough apart that rounding decides nothing."""
    model = build_model(CONFIG, seed=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def engine(model: Transformer, **options) -> Engine:
    return Engine(model, None, EngineConfig(**{"block_size": 4, "num_blocks": 200, **options}))


def params(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "logprobs": True, "ignore_eos": True, **options})


def activation_of(kind: dict, tokens: int) -> Activation:
    share = kind.get("expert_threshold")
    return Activation(kind.get("active_experts", 3), None, None if share is None else torch.full((tokens,), share))


@torch.no_grad()
def naive(model: Transformer, prompt: list[int], kind: dict, count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        batch = pack([ids])
        hidden = model(batch, step=model.step(batch, activation=activation_of(kind, len(ids))))
        ids.append(int(model.logits(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


def assert_same(got: Completion, want: Completion) -> None:
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def of_each_kind(engine: Engine) -> list[Completion]:
    return [group[0] for group in engine.generate([PROMPT] * len(KINDS), [params(**kind) for kind in KINDS])]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_request_gets_the_tokens_of_the_model_at_its_number_of_experts(model, kind):
    got = engine(model).generate([PROMPT], params(**kind))[0][0]
    assert got.token_ids == naive(model, PROMPT, kind, 16)


def test_numbers_of_experts_change_what_is_said(model):
    assert len({tuple(each.token_ids) for each in of_each_kind(engine(model))}) > 2


@torch.no_grad()
def test_a_mixture_sums_the_experts_that_are_left_and_the_shared_one_always(model):
    torch.manual_seed(0)
    mixture = next(module for module in model.modules() if isinstance(module, MoE))
    assert mixture.shared_experts is not None
    x = torch.randn(4, CONFIG.dim)
    step = replace(model.step(pack([[1, 2, 3, 4]])), activation=Activation(5, torch.tensor([1, 5, 3, 2])))
    got = mixture(x, step)
    gate_up, down = mixture.experts.gate_up_proj.weight, mixture.experts.down_proj.weight
    for t, limit in enumerate([1, 5, 3, 2]):
        scores = (mixture.gate.weight @ x[t]).sigmoid()
        order = (scores + mixture.gate.e_score_correction_bias).argsort(descending=True).tolist()
        chosen = order[:limit]
        want = mixture.shared_experts(x[t : t + 1], step)[0]
        for e in chosen:
            inner = torch.nn.functional.silu(gate_up[e, 0] @ x[t]) * (gate_up[e, 1] @ x[t])
            want = want + scores[e] / scores[order[:3]].sum() * (down[e] @ inner)
        torch.testing.assert_close(got[t], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_requests_of_one_batch_differ_and_do_not_disturb_each_other(model, cut):
    together = engine(model, **CUTS[cut])
    for got, kind in zip(of_each_kind(together), KINDS, strict=True):
        assert_same(got, engine(model).generate([PROMPT], params(**kind))[0][0])
    if cut == "preempted":
        assert together.stats.num_preemptions > 0


def test_a_cached_prefix_is_found_by_requests_of_the_same_activation_alone(model):
    warm = engine(model)
    first = of_each_kind(warm)
    assert [each.num_cached_tokens for each in first] == [0] * len(KINDS)
    again = of_each_kind(warm)
    assert [each.num_cached_tokens for each in again] == [12] * len(KINDS)
    for got, want in zip(again, first, strict=True):
        assert_same(got, want)


def test_to_ask_for_what_the_engine_does_anyway_is_to_share_its_prefixes(model):
    warm = engine(model)
    warm.generate([PROMPT], params())
    assert warm.generate([PROMPT], params(active_experts=3, expert_threshold=0.0))[0][0].num_cached_tokens == 12


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_the_engines_own_setting_holds_for_requests_that_say_nothing(model, kind):
    own = engine(model, **kind)
    assert_same(own.generate([PROMPT], params())[0][0], engine(model).generate([PROMPT], params(**kind))[0][0])
    trained = own.generate([PROMPT], params(active_experts=3, expert_threshold=0.0))[0][0]
    assert_same(trained, engine(model).generate([PROMPT], params())[0][0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_drafts_are_those_of_the_mtp_module_at_the_same_number_of_experts(model, kind):
    speculative = engine(model, num_draft_tokens=1, max_batch_tokens=11)
    speculative.add(PROMPT, params(**kind), stream=True)
    drafts: dict[int, int] = {}
    table = speculative.scheduler.table
    completion = None
    while completion is None:
        events = speculative.step()
        for row in speculative.scheduler.running.tolist():
            if table.num_drafts[row]:
                drafts[int(table.num_known[row])] = int(table.token_ids[row, table.num_known[row]])
        completion = events[-1].completion if events else None
    ids = [*PROMPT, *completion.token_ids]
    batch = pack([ids])
    step = model.step(batch, activation=activation_of(kind, len(ids)))
    with torch.no_grad():
        hidden = model.mtp_hidden(0, model(batch, step=step), torch.tensor([*ids[1:], 0]), step)
        predicted = model.mtp_logits(0, hidden).argmax(-1).tolist()
    assert len(drafts) > 5
    assert all(draft == predicted[position - 2] for position, draft in drafts.items())


@pytest.mark.parametrize("number", [0, -1, True])
def test_a_number_of_experts_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match=r"^active_experts = .*: must be a whole number from 1 to the routed experts"):
        SamplingParams(active_experts=number)
    with pytest.raises(ValueError, match=r"^engine.active_experts = .*: must be a whole number from 1"):
        EngineConfig(active_experts=number)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), True])
def test_a_threshold_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=r"^expert_threshold = .*: must be in \[0, 1\]"):
        SamplingParams(expert_threshold=share)
    with pytest.raises(ValueError, match=r"^engine.expert_threshold = .*: must be in \[0, 1\]"):
        EngineConfig(expert_threshold=share)


def test_more_experts_than_there_are_is_refused_before_anything_is_queued(model):
    known = r"active_experts = 9: this model has 8 routed experts; give 1 to 8, or leave it out for the 3 that it was"
    with pytest.raises(ValueError, match=rf"engine\.{known}"):
        engine(model, active_experts=9)
    one = engine(model)
    with pytest.raises(ValueError, match=f"^{known}"):
        one.generate([PROMPT, PROMPT], [params(), params(active_experts=9)])
    assert one.num_unfinished == 0


def test_experts_of_closed_groups_do_not_count():
    moe = MoEConfig(num_experts=8, num_groups=4, topk_groups=2, topk=2, expert_dim=16)
    grouped = build_model(replace(CONFIG, moe=moe))
    with pytest.raises(ValueError, match="8 routed experts, of which a token may use 4; give 1 to 4"):
        engine(grouped, active_experts=5)
    engine(grouped, active_experts=4).generate([PROMPT], params(max_tokens=2))


@pytest.mark.parametrize("option", [{"active_experts": 2}, {"expert_threshold": 0.5}])
def test_a_model_without_experts_has_none_to_activate(option):
    config = ModelConfig(vocab_size=61, dim=16, num_layers=1, ffn_dim=16, attention=GQAConfig(num_heads=2), moe=None)
    dense = build_model(config)
    with pytest.raises(ValueError, match=r"engine\.\w+ = .*: this model has no routed experts; leave it out"):
        engine(dense, **option)
    with pytest.raises(ValueError, match=r"^\w+ = .*: this model has no routed experts; leave it out"):
        engine(dense).generate([[1, 2]], params(**option))
    engine(dense).generate([[1, 2]], params(expert_threshold=0.0, max_tokens=1))
