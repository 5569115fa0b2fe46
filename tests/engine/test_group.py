"""Engines side by side over one model: the same answers as of one, in an order that is the requests' alone."""

from dataclasses import replace

import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.group import EngineGroup, build_engine
from kogia.engine.request import SamplingParams
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import Transformer, build_model

CONFIG = ModelConfig(
    vocab_size=64, dim=32, num_layers=2, ffn_dim=64, max_position=128, init_std=0.2, num_mtp_layers=1,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
)  # fmt: skip
ENGINE = EngineConfig(block_size=4, num_blocks=200, max_sequences=6)
PROMPTS = [[n, n + 1] for n in range(13)]
PARAMS = [SamplingParams(max_tokens=3 + n % 5, seed=1, ignore_eos=True, n=2, logprobs=True) for n in range(13)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(CONFIG, seed=3)


def group(model: Transformer, number: int = 2, **changes) -> EngineGroup:
    made = build_engine(model, None, replace(ENGINE, **changes), number)
    assert isinstance(made, EngineGroup)
    return made


def tokens(engine: Engine) -> list[list[list[int]]]:
    return [[c.token_ids for c in each] for each in engine.generate(PROMPTS, PARAMS)]


def assert_idle(made: EngineGroup) -> None:
    for engine in made.engines:
        assert engine.num_unfinished == engine.loop.num_unfinished == 0
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("drafts", [0, 1])
def test_several_engines_give_the_tokens_of_one_and_share_what_it_may_take(model, number, drafts):
    made = group(model, number, num_draft_tokens=drafts)
    assert [(e.config.max_sequences, e.config.num_blocks) for e in made.engines] == [
        (6 // number, 200 // number)
    ] * number
    assert tokens(made) == tokens(Engine(model, None, ENGINE))
    assert all(engine.stats.num_generated_tokens > 0 for engine in made.engines), "each had a part"
    assert made.totals().num_generated_tokens == sum(2 * each.max_tokens for each in PARAMS)
    assert_idle(made)


def test_results_come_in_the_same_order_every_time_and_requests_are_taken_as_they_are_needed(model):
    def order() -> list[int]:
        taken = []

        def requests():
            for item in zip(PROMPTS, PARAMS, strict=True):
                taken.append(item)
                yield item

        made, places, counts = group(model), [], []
        for place, completions in made.complete(requests(), ahead=2, on_step=counts.append):
            assert [len(c.token_ids) for c in completions] == [3 + place % 5] * 2
            places.append(place)
        assert counts == [2 * n for n in range(1, 14)]
        return places

    first = order()
    assert sorted(first) == list(range(13)) and all(order() == first for _ in range(3))


def test_an_iterator_that_is_closed_leaves_nothing_behind_in_any_of_them(model):
    made = group(model)
    iterator = made.complete((([n], SamplingParams(max_tokens=100, ignore_eos=True)) for n in range(9)), ahead=2)
    next(iterator)
    iterator.close()
    assert_idle(made)
    assert tokens(made) == tokens(Engine(model, None, ENGINE)), "and all go on"


@pytest.mark.parametrize("bad", [3, 4])
def test_a_request_that_cannot_be_is_whoever_asks_to_hear_and_ends_all_of_them(model, bad):
    made = group(model)
    prompts = [[99] if n == bad else [n] for n in range(8)]
    with pytest.raises(ValueError, match=r"span 99\.\.99"):
        made.generate(prompts, PARAMS[0])
    assert_idle(made)


def test_new_weights_and_determinism_are_of_all(model):
    ours, new = build_model(CONFIG, seed=3), build_model(CONFIG, seed=4)
    made = group(ours)
    before = tokens(made)
    made.update_weights(new)
    assert {engine.weights_version for engine in made.engines} == {1}
    assert tokens(made) == tokens(Engine(new, None, ENGINE)) != before
    with made.deterministic():
        assert all(engine.is_deterministic for engine in made.engines)
        exact = made.generate(PROMPTS, PARAMS)
    assert not any(engine.is_deterministic for engine in made.engines)
    with (one := Engine(new, None, ENGINE)).deterministic():
        assert [[c.logprobs for c in each] for each in one.generate(PROMPTS, PARAMS)] == [
            [c.logprobs for c in each] for each in exact
        ]


def test_threads_are_shared_and_the_callers_stay(model):
    before = torch.get_num_threads()
    tokens(group(model))
    assert torch.get_num_threads() == before


def test_a_gpu_is_for_one(model):
    with pytest.raises(ValueError, match="engines = 2: several are for a CPU; on meta one takes the whole"):
        build_engine(build_model(CONFIG).to("meta"), None, ENGINE, 2)
