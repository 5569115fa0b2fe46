"""Who goes first and who shares: priorities, cache salts, and the experts that tokens were sent to."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.packed import pack
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer, build_model

CONFIG = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=3,
    ffn_dim=64,
    attention=MLAConfig(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=16, num_dense_layers=1),
    num_mtp_layers=1,
    max_position=128,
    init_std=0.2,
)
PROMPTS = [[0, 5, 9, 11, 3], [0, 7], list(range(2, 40)), [2] * 17]
CUTS = [
    {},
    {"num_draft_tokens": 2},
    {"max_batch_tokens": 7, "num_draft_tokens": 1},
    {"num_blocks": 18},
    {"overlap": True},
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = build_model(CONFIG, seed=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def engine(model: Transformer, **options) -> Engine:
    return Engine(model, None, EngineConfig(**{"block_size": 4, "num_blocks": 200, **options}))


def ends(running: Engine) -> list[int]:
    """Ids in the order in which they end."""
    order = []
    while running.num_unfinished:
        order += [event.request_id for event in running.step() if event.completion is not None]
    return order


def test_lower_priorities_start_first_and_equals_in_order_of_arrival(model):
    one_by_one = engine(model, max_sequences=1)
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    for priority in (0, 5, -1, 0, -1, 5):
        one_by_one.add([5, 6], replace(params, priority=priority))
    one_by_one.step()
    assert [request.id for request in one_by_one.scheduler.waiting] == [4, 0, 3, 1, 5]
    one_by_one.add([5, 6], replace(params, priority=-7))
    assert ends(one_by_one) == [6, 2, 4, 0, 3, 1, 5]


OVERTAKEN = {
    "no_row": {"max_sequences": 2},
    "no_blocks": {"num_blocks": 20},
    "no_row_overlapped": {"max_sequences": 2, "overlap": True},
    "no_blocks_with_drafts": {"num_blocks": 20, "num_draft_tokens": 2},
    "no_row_chunked_with_a_draft": {"max_sequences": 2, "max_batch_tokens": 9, "num_draft_tokens": 1},
}


@pytest.mark.parametrize("options", OVERTAKEN.values(), ids=OVERTAKEN)
def test_who_finds_no_room_takes_the_place_of_a_higher_number_and_all_get_their_tokens(model, options):
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    expected = [group[0].token_ids for group in engine(model).generate(PROMPTS, params)]
    full = engine(model, **options)
    ids = [full.add(prompt, replace(params, priority=each))[0] for prompt, each in zip(PROMPTS[:3], (4, 3, 5))]
    done = {}
    for _ in range(6):
        done |= {event.request_id: event.completion for event in full.step()}
    before = full.stats.num_preemptions
    ids += full.add(PROMPTS[3], params)
    done |= {event.request_id: event.completion for _ in range(2) for event in full.step()}
    assert ids[3] in {request.id for request in full.scheduler.table.requests if request is not None}
    assert full.stats.num_preemptions > before
    while full.num_unfinished:
        done |= {event.request_id: event.completion for event in full.step()}
    assert list(done)[-1] == ids[2]
    assert [done[request_id].token_ids for request_id in ids] == expected


def steps_until_first_token(running: Engine, request_id: int) -> int:
    for count in range(1, 100):
        if any(event.request_id == request_id for event in running.step()):
            return count
    raise AssertionError("it never started")


@pytest.mark.parametrize("priority, steps", [(0, 3), (1, 1)])
def test_a_long_prompt_of_a_higher_number_leaves_tokens_to_who_arrives_in_its_midst(model, priority, steps):
    small = engine(model, max_batch_tokens=8)
    params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
    small.add(PROMPTS[2][:24], replace(params, priority=priority))
    small.step()
    (late,) = small.add([5, 6, 7], params, stream=True)
    assert steps_until_first_token(small, late) == steps


def test_nobody_gives_way_to_an_equal_or_for_one_that_could_not_start(model):
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    equal = engine(model, max_sequences=1)
    equal.add([5], params)
    equal.step()
    equal.add([6], params)
    assert ends(equal) == [0, 1]
    assert equal.stats.num_preemptions == 0
    tight = engine(model, num_blocks=18)
    tight.add(PROMPTS[2], replace(params, priority=-1, max_tokens=20))  # 10 blocks, soon 14
    tight.add([5], replace(params, priority=1, max_tokens=6))
    tight.step()
    tight.add(list(range(40)), params)  # 10 blocks, which are not there beside the first
    for _ in range(3):
        tight.step()
    assert len(tight.scheduler.running) == 2
    assert tight.stats.num_preemptions == 0
    assert ends(tight) == [1, 0, 2]


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"num_draft_tokens": 1}], ids=str)
def test_the_highest_number_gives_way_first_and_tokens_stay_the_same(model, options):
    tight = engine(model, num_blocks=16, **options)
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    each = [replace(params, priority=priority) for priority in (3, 0, 2)]
    prompts = [*PROMPTS[:2], [4, 4, 4]]
    expected = [group[0].token_ids for group in engine(model).generate(prompts, params)]
    ids = [request_id for prompt, own in zip(prompts, each) for request_id in tight.add(prompt, own)]
    done, order = {}, []
    while tight.num_unfinished:
        for event in tight.step():
            done[event.request_id] = event.completion
            order.append(event.request_id)
    assert tight.stats.num_preemptions > 0
    assert order[-1] == ids[0]
    assert [done[request_id].token_ids for request_id in ids] == expected


def test_budget_goes_to_the_lowest_number_first(model):
    small = engine(model, max_batch_tokens=1)
    params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
    small.add([5], params)
    small.step()
    small.add([5], replace(params, priority=-1))
    assert ends(small) == [1, 0]
    small = engine(model, max_batch_tokens=2)
    small.add([5], params)
    small.add([6], replace(params, priority=-1))
    small.step()
    assert small.scheduler.table.priority[small.scheduler.running].tolist() == [-1, 0]


@pytest.mark.parametrize("drafts", [0, 1])
def test_prefixes_are_shared_with_the_same_salt_alone(model, drafts):
    warm = engine(model, num_draft_tokens=drafts)
    params = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    first = {}
    for salt in (None, "a", "b"):
        (group,) = warm.generate([PROMPTS[2]], replace(params, cache_salt=salt))
        assert group[0].num_cached_tokens == 0
        first[salt] = group[0].token_ids
    for salt in ("b", None, "a"):
        (group,) = warm.generate([PROMPTS[2]], replace(params, cache_salt=salt))
        assert group[0].num_cached_tokens == 36
    assert first[None] == first["a"] == first["b"]
    fewer = warm.generate([PROMPTS[2]], replace(params, cache_salt="a", active_experts=1))
    assert fewer[0][0].num_cached_tokens == 0


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_experts_are_those_of_a_pass_over_the_whole_sequence(model, options):
    params = SamplingParams(max_tokens=20, seed=7, return_routed_experts=True, n=2)
    tracing = engine(model, **options)
    plain = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    got = tracing.generate([*PROMPTS, PROMPTS[0]], [params] * len(PROMPTS) + [plain])
    assert got[-1][0].routed_experts is None
    for prompt, group in zip(PROMPTS, got):
        for completion in group:
            ids = [*prompt, *completion.token_ids][:-1]
            routing, batch = Routing(), pack([ids])
            with torch.no_grad():
                model(batch, step=model.step(batch, routing=routing))
            expected = torch.stack([routing.chosen[mixture] for mixture in (0, 1)], 1).sort(-1).values
            assert completion.routed_experts.shape == (len(ids), 2, 2)
            assert np.sort(completion.routed_experts, -1).tolist() == expected.tolist()


def test_a_request_given_up_has_the_experts_of_what_has_run(model):
    chunked = engine(model, max_batch_tokens=4)
    params = SamplingParams(return_routed_experts=True)
    first, unstarted = chunked.add([5] * 10, params) + chunked.add([5] * 10, params)
    chunked.step()
    found = chunked.abort(first).routed_experts
    assert (found >= 0).all(axis=(1, 2)).tolist() == [True] * 4 + [False] * 5
    assert chunked.abort(unstarted).routed_experts.shape[0] == 0


def test_a_model_without_experts_has_none_to_return():
    dense = ModelConfig(vocab_size=20, dim=16, num_layers=1, ffn_dim=16, attention=GQAConfig(num_heads=2), moe=None)
    with pytest.raises(ValueError, match="return_routed_experts = True: the model has no experts; leave it out"):
        engine(build_model(dense)).add([5], SamplingParams(return_routed_experts=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"priority": 2**31}, "priority = 2147483648: must be a whole number; lower ones come first"),
        ({"cache_salt": ""}, "cache_salt = '': must be a text that is not empty"),
    ],
)
def test_a_value_that_will_not_do_is_named_with_its_rule(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
