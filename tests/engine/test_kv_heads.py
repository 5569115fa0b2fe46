"""Models with key/value heads in the engine: prompts laid out side by side, and on a GPU recorded steps."""

from dataclasses import replace

import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.graphs import why_not
from kogia.engine.request import SamplingParams
from kogia.engine.views import WholeCache
from kogia.model.config import GQAConfig, ModelConfig
from kogia.model.transformer import Transformer, build_model

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [[5, 9, 11, 3], [7, 2], list(range(2, 40)), [2] * 17, [12], list(range(40, 2, -1)), [9, 9, 8]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=True)


def student(device: str, dtype: torch.dtype, **attention) -> Transformer:
    config = ModelConfig(
        vocab_size=61,
        dim=64,
        num_layers=3,
        ffn_dim=64,
        attention=GQAConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "qkv_bias": True, **attention}),
        moe=None,
        max_position=256,
        init_std=0.2,
    )
    model = build_model(config, device=device, dtype=dtype, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def engine_of(model: Transformer, **options) -> Engine:
    settings = {"block_size": 4, "num_blocks": 300, "max_sequences": 16, "prefix_cache": False}
    return Engine(model, None, EngineConfig(**{**settings, **options}))


def outputs(engine: Engine) -> list[tuple[list[int], list[float]]]:
    return [(c[0].token_ids, c[0].logprobs or []) for c in engine.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 7}, {"max_batch_tokens": 23}, {"prefix_cache": True}])
@pytest.mark.parametrize("attention", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4, "qk_norm": True}])
def test_prompts_laid_out_from_the_cache_give_the_tokens_of_paged_ones(options, attention):
    model = student("cpu", torch.float32, **attention)
    want, engine = outputs(engine_of(model, **options)), engine_of(model, **options)
    view = engine.runner.view
    assert isinstance(view, WholeCache) and not view.cache.expands
    view.cache = replace(view.cache, expands=True)
    found = outputs(engine)
    assert [ids for ids, _ in found] == [ids for ids, _ in want]
    for (_, got), (_, expected) in zip(found, want, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=1e-3)


@gpu
@pytest.mark.parametrize("attention", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4, "qk_norm": True}])
def test_recorded_steps_give_the_tokens_of_steps_that_are_not(attention, monkeypatch):
    from kogia.ops.triton import kv

    monkeypatch.setattr(kv, "num_parts", lambda *_: 3)  # parts decide how sums are rounded
    model = student("cuda", torch.bfloat16, **attention)
    recorded = engine_of(model)
    assert recorded.runner.graphs is not None and why_not(model, recorded.runner.cache) is None
    assert outputs(recorded) == outputs(engine_of(model, graphs=False))


@gpu
def test_log_probabilities_of_a_step_are_near_those_of_the_reference():
    model = student("cuda", torch.bfloat16)
    found = outputs(engine_of(model))
    wide = model.float()
    from kogia.model.packed import pack

    for prompt, (ids, logprobs) in zip(PROMPTS, found, strict=True):
        want = wide.logprobs(pack([prompt + ids]).to("cuda"))[len(prompt) :]
        torch.testing.assert_close(torch.tensor(logprobs), want.detach().cpu(), rtol=0.1, atol=0.2)
