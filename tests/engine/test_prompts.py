"""Prompts as recorded steps on a CPU: the tokens, bit for bit, of steps that are not recorded, within a budget."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kogia.engine import prompts
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.prompts import prompt_sizes
from kogia.engine.request import SamplingParams
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.quantised import packable
from kogia.model.transformer import Transformer, build_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=True)
SAMPLED = replace(GREEDY, temperature=1.0, seed=3)
FILTERED = replace(SAMPLED, top_p=0.9, top_k=20, min_p=0.01)
LATENT = MLAConfig(
    num_heads=4, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=16
)
HEADS = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=32)


def tiny(dtype: torch.dtype = torch.float32, seed: int = 1, attention: Any = LATENT, vocab: int = 61) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab, dim=64, num_layers=2, ffn_dim=64, attention=attention, max_position=256, init_std=0.2,
        moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=64), num_mtp_layers=1,
    )  # fmt: skip
    return build_model(config, dtype=dtype, seed=seed)


def engine_of(model: Transformer, **options: Any) -> Engine:
    settings = {"block_size": 4, "num_blocks": 300, "max_sequences": 8, "prefix_cache": False, "adaptive_drafts": False}
    engine = Engine(model, None, EngineConfig(**{**settings, **options}))
    if engine.runner.prompts is None and options.get("graphs") is None:
        pytest.skip("no kernels here")
    return engine


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(2, 61, length).tolist()


def alone(engine: Engine, params: SamplingParams, given: list[list[int]]) -> list[tuple[list[int], Any]]:
    """Tokens and log-probabilities of prompts that come one after the other."""
    return [(c.token_ids, c.logprobs) for each in given for c in engine.generate([each], params)[0]]


def recorded(engine: Engine) -> list[int]:
    """Sizes of the recordings, those used longest ago first."""
    assert engine.runner.prompts is not None
    return [size for size, _ in engine.runner.prompts._recorded]


def test_sizes_lie_close_together_and_end_where_vocabularies_are_large():
    sizes = prompt_sizes(500)
    assert sizes == [*range(4, 33, 4), *range(40, 65, 8), *range(80, 129, 16)]
    assert prompt_sizes(8192) == [*range(4, 33, 4), *range(40, 65, 8)] and prompt_sizes(129280) == [4, 8, 12, 16]


@pytest.mark.parametrize(
    ("dtype", "format", "params", "drafts"),
    [
        (torch.float32, None, GREEDY, 0),
        (torch.float32, None, SAMPLED, 2),
        (torch.bfloat16, None, FILTERED, 1),
        (torch.bfloat16, "int8", SAMPLED, 1),
        (torch.bfloat16, "int4", GREEDY, 2),
    ],
)
@torch.no_grad()
def test_recorded_prompts_of_every_size_give_the_tokens_of_others(dtype, format, params, drafts):
    model = tiny(dtype)
    for _, layer in packable(model, format) if format else ():
        layer.pack(format)
    model.absorb()
    given = [prompt(length) for length in (2, 5, 26, 31, 33, 64, 65, 128, 129)] * 3
    want = alone(engine_of(model, graphs=False), params, given)
    engine = engine_of(model, num_draft_tokens=drafts)
    assert alone(engine, params, given) == want
    assert recorded(engine) == [4, 8, 28, 32, 40, 64, 80, 128]


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize(
    "options",
    [{"max_batch_tokens": 7}, {"max_batch_tokens": 23}, {"prefix_cache": True}, {"active_experts": 1}],
    ids=str,
)
def test_prompts_in_chunks_and_behind_cached_prefixes_are_recorded(options, drafts):
    model, given = tiny(), [prompt(30)[:12] + prompt(length, 1) for length in (17, 17, 18, 19, 17, 5, 5)]
    want = alone(engine_of(model, graphs=False, **options), SAMPLED, given)
    engine = engine_of(model, num_draft_tokens=drafts, **options)
    assert alone(engine, SAMPLED, given) == want
    assert recorded(engine)
    assert (engine.stats.num_prefix_hit_tokens > 0) == ("prefix_cache" in options)


def test_sequences_that_were_preempted_come_back_by_recorded_steps():
    """In an engine whose cache holds hardly two."""
    model, params = tiny(), [replace(SAMPLED, max_tokens=24, seed=seed) for seed in range(5)]
    given = [prompt(20 + index) for index in range(5)]
    want = [c[0].token_ids for c in engine_of(model, graphs=False).generate(given, params)]
    engine = engine_of(model, num_blocks=18, max_sequences=3, num_draft_tokens=1)
    for _ in range(2):
        assert [c[0].token_ids for c in engine.generate(given, params)] == want
    assert engine.stats.num_preemptions and recorded(engine)


def test_models_with_key_and_value_heads_record_prompts():
    model, given = tiny(attention=HEADS), [prompt(length) for length in (9, 9, 10, 50, 55)]
    want = alone(engine_of(model, graphs=False), GREEDY, given * 2)
    engine = engine_of(model, num_draft_tokens=1)
    assert alone(engine, GREEDY, given * 2) == want
    assert recorded(engine)


def test_recorded_prompts_outlive_new_weights():
    model, other, given = tiny(), tiny(seed=2), [prompt(length) for length in (9, 9, 9, 40, 40)]
    engine = engine_of(model, num_draft_tokens=1)
    before = alone(engine, GREEDY, given)
    engine.update_weights(other)
    assert alone(engine, GREEDY, given) == alone(engine_of(other, graphs=False), GREEDY, given) != before


def test_the_first_prompt_of_a_size_is_not_recorded_and_what_asks_for_more_never_is():
    engine = engine_of(tiny())
    alone(engine, GREEDY, [prompt(9), prompt(20)])
    assert recorded(engine) == []
    alone(engine, GREEDY, [prompt(10)])
    assert recorded(engine) == [12]
    for more in (
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"active_experts": 1},
        {"min_tokens": 2, "ignore_eos": False},
    ):
        alone(engine, replace(GREEDY, **more), [prompt(20)] * 3)
        assert recorded(engine) == [12], more
    engine.generate([prompt(20), prompt(20)], GREEDY)
    assert recorded(engine) == [12]
    with engine.deterministic():
        alone(engine, GREEDY, [prompt(20)] * 3)
    assert recorded(engine) == [12]


def test_recordings_keep_within_their_memory_and_those_used_longest_ago_go(monkeypatch):
    model, given = tiny(), [prompt(length) for length in (8, 8, 12, 12, 8, 16, 16, 20, 20)]
    want = alone(engine_of(model, graphs=False), GREEDY, given)
    engine = engine_of(model)
    assert alone(engine, GREEDY, given) == want
    whole = engine.runner.prompts.num_bytes
    assert recorded(engine) == [12, 8, 16, 20]
    monkeypatch.setattr(prompts, "MEMORY", 9 * whole // 10)
    engine = engine_of(model)
    assert alone(engine, GREEDY, given) == want
    assert recorded(engine) == [8, 16, 20] and engine.runner.prompts.num_bytes <= prompts.MEMORY
    monkeypatch.setattr(prompts, "MEMORY", whole // 5)
    engine = engine_of(model)
    assert alone(engine, GREEDY, [*given, *given]) == [*want, *want]
    assert recorded(engine) == [8] and engine.runner.prompts.num_bytes <= prompts.MEMORY
    assert engine.runner.prompts.sizes == [4, 8], "what was too large by itself is not tried again"


def test_the_memory_of_a_recording_is_that_of_all_tensors_it_keeps():
    engine = engine_of(tiny(), num_draft_tokens=2)
    alone(engine, GREEDY, [prompt(30)] * 2)
    (step,) = engine.runner.prompts._recorded.values()
    others = [*engine.model.parameters(), *engine.model.buffers(), engine.runner.cache.rows, engine.runner._newest]
    others += [each for each in vars(step).values() if isinstance(each, Tensor)]
    known = {each.untyped_storage().data_ptr() for each in others}
    made = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors(step.recording._kept)
    }
    assert sum(size for at, size in made.items() if at not in known) == pytest.approx(step.num_bytes, rel=0.01)


def tensors(kept: Any) -> Iterator[Tensor]:
    if isinstance(kept, Tensor):
        yield kept
    for each in kept.values() if isinstance(kept, dict) else kept if isinstance(kept, list | tuple) else ():
        yield from tensors(each)


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_a_prompt_whose_logits_are_not_numbers_leaves_nothing_to_the_next(drafts):
    """Nor does a draft, as the token without an embedding is behind the first prompt."""
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    given = [[4, 5, 6, 7, 8], [9, 8, 7, 6], [4, 60, 5, 5, 5], [4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]]
    want = alone(engine_of(model, graphs=False), GREEDY, given)
    engine = engine_of(model, num_draft_tokens=drafts)
    for _ in range(2):
        found = alone(engine, GREEDY, given)
        assert [each for index, each in enumerate(found) if index != 2] == [*want[:2], *want[3:]]
    assert engine.generate([given[2]], GREEDY)[0][0].finish_reason == "error"
    assert recorded(engine)


def test_engines_of_several_threads_record_one_after_the_other():
    given = [prompt(length) for length in range(3, 60, 5) for _ in range(2)]
    models = [tiny(seed=seed) for seed in range(3)]
    want = [alone(engine_of(model, graphs=False), GREEDY, given) for model in models]
    found: list[Any] = [None] * 3

    def run(index: int) -> None:
        found[index] = alone(engine_of(models[index], num_draft_tokens=1), GREEDY, given)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == want
