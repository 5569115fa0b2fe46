"""The engine gives the same tokens however the work is cut: chunked, preempted, cached, batched, drafted. The
reference is the model itself, run over the whole sequence for every token, without a cache."""

import functools

import numpy as np
import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import Completion, SamplingParams, derive_seed
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.ops.sample import counter_uniforms

MOE = MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=16, num_dense_layers=1)
CONFIGS = {
    "mla_moe_mtp": ModelConfig(
        vocab_size=61,
        dim=32,
        num_layers=3,
        ffn_dim=64,
        attention=MLAConfig(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        moe=MOE,
        num_mtp_layers=1,
        max_position=128,
        init_std=0.2,
    ),
    "mla_sparse_mtp": ModelConfig(
        vocab_size=61,
        dim=32,
        num_layers=2,
        ffn_dim=64,
        attention=MLAConfig(
            num_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            indexer=IndexerConfig(num_heads=1, head_dim=16, topk=7),
        ),
        moe=MOE,
        num_mtp_layers=1,
        max_position=128,
        init_std=0.2,
        eos_id=60,
    ),
    "gqa_dense": ModelConfig(
        vocab_size=61,
        dim=32,
        num_layers=2,
        ffn_dim=64,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True),
        moe=None,
        max_position=128,
        init_std=0.2,
    ),
}
PROMPTS = [[0, 5, 9, 11, 3], [0, 7], list(range(2, 40)), [0, 5, 9, 11, 3, 8, 8, 21, 4], [2] * 17, [0, 5, 9, 11, 4]]
CUTS = {
    "chunked": {"max_batch_tokens": 7},
    "one_token_per_step": {"max_batch_tokens": 1},
    "tiny_pool_preempts": {"num_blocks": 18},
    "few_rows": {"max_sequences": 2},
    "no_prefix_cache": {"prefix_cache": False},
    "other_block_size": {"block_size": 16},
    "overlapped": {"overlap": True},
    "overlapped_chunked_and_tiny": {"overlap": True, "max_batch_tokens": 9, "num_blocks": 20, "max_sequences": 3},
    "chunked_and_tiny": {"max_batch_tokens": 9, "num_blocks": 20, "max_sequences": 3},
}


def build(name: str) -> Transformer:
    """A random model whose logits lie far enough apart that rounding decides nothing."""
    model = build_model(CONFIGS[name], seed=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request) -> Transformer:
    return build(request.param)


@pytest.fixture(scope="module")
def mtp_model() -> Transformer:
    return build("mla_moe_mtp")


@functools.cache
def uncut(model: Transformer, temperature: float) -> list[list[Completion]]:
    """PROMPTS twice each, with everything in one batch and room for all."""
    return engine(model).generate(PROMPTS, params(temperature, n=2))


def engine(model: Transformer, **options) -> Engine:
    return Engine(model, None, EngineConfig(**{"block_size": 4, "num_blocks": 200, **options}))


def params(temperature: float, **options) -> SamplingParams:
    return SamplingParams(**{"temperature": temperature, "max_tokens": 20, "seed": 7, "logprobs": True, **options})


def assert_same(got: list[list[Completion]], want: list[list[Completion]]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.token_ids == b.token_ids
            assert a.finish_reason == b.finish_reason
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@torch.no_grad()
def next_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    return model.logits(model(pack([ids]))[-1:])[0].double()


def naive(model: Transformer, prompt: list[int], temperature: float, seed: int, max_tokens: int) -> list[int]:
    """Sample by the definition: whole sequence through the model, one uniform number per position."""
    ids = list(prompt)
    derived = derive_seed(seed, prompt, 0)
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] != model.config.eos_id):
        logits = next_logits(model, ids)
        if temperature == 0:
            ids.append(int(logits.argmax()))
            continue
        u = counter_uniforms(torch.tensor([derived]), torch.tensor([len(ids)])).item()
        cumulative = np.cumsum(torch.softmax(logits / temperature, -1).numpy())
        ids.append(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")))
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_samples_what_the_model_defines(model, temperature):
    got = engine(model).generate(PROMPTS, params(temperature))
    for prompt, (completion,) in zip(PROMPTS, got, strict=True):
        assert completion.token_ids == naive(model, prompt, temperature, 7, 20)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cut", sorted(CUTS))
def test_tokens_do_not_depend_on_how_the_work_is_cut(model, cut, temperature):
    other = engine(model, **CUTS[cut])
    assert_same(other.generate(PROMPTS, params(temperature, n=2)), uncut(model, temperature))
    if "tiny" in cut:
        assert other.stats.num_preemptions > 0


def test_tokens_do_not_depend_on_the_company_in_the_batch(model):
    alone = [engine(model).generate([prompt], params(1.0))[0] for prompt in PROMPTS]
    mixed = [params(t, top_k=k, seed=s) for t, k, s in [(1.0, 0, 7), (0.0, 0, 1), (1.0, 0, 7), (0.5, 3, 2)]]
    together = engine(model).generate(PROMPTS, params(1.0))
    assert_same(together, alone)
    company = engine(model).generate(PROMPTS[:4], mixed)
    assert_same([company[0], company[2]], [alone[0], alone[2]])


def test_a_prefix_hit_changes_nothing(model):
    shared = list(range(2, 30))
    prompts = [[*shared, tail] for tail in (31, 32, 33)]
    warm = engine(model)
    warm.generate([prompts[0]], params(1.0))
    got = warm.generate(prompts, params(1.0))
    assert [group[0].num_cached_tokens for group in got] == [28, 28, 28]
    assert_same(got, [engine(model, prefix_cache=False).generate([p], params(1.0))[0] for p in prompts])


def test_a_multi_turn_prompt_reuses_the_blocks_of_its_own_completion(model):
    warm = engine(model)
    first = warm.generate([PROMPTS[2]], params(1.0, ignore_eos=True))[0][0]
    longer = [*PROMPTS[2], *first.token_ids, 5]
    got = warm.generate([longer], params(1.0))
    assert got[0][0].num_cached_tokens == (len(longer) - 2) // 4 * 4
    assert_same(got, engine(model).generate([longer], params(1.0)))


def test_siblings_share_the_prompt_in_the_step_that_computes_it(model):
    prompt = list(range(2, 40))
    together = engine(model)
    (group,) = together.generate([prompt], params(1.0, n=4))
    assert [c.num_cached_tokens for c in group] == [0, 36, 36, 36]
    assert len({tuple(c.token_ids) for c in group}) == 4
    (separate,) = engine(model, prefix_cache=False).generate([prompt], params(1.0, n=4))
    assert_same([group], [separate])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logprobs_are_those_of_the_model(name):
    model = build_model(CONFIGS[name], seed=1)
    for temperature in (1.0, 0.7):
        got = engine(model, max_batch_tokens=16).generate(PROMPTS, params(temperature, n=2, top_p=0.9))
        for prompt, group in zip(PROMPTS, got, strict=True):
            for completion in group:
                with torch.no_grad():
                    expected = model.logprobs(pack([[*prompt, *completion.token_ids]]), temperature)[len(prompt) :]
                np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("cut, temperature", [("", 0.0), ("", 1.0), *((cut, 1.0) for cut in CUTS)])
def test_speculative_decoding_is_lossless(mtp_model, num_drafts, temperature, cut):
    drafting = engine(mtp_model, num_draft_tokens=num_drafts, **CUTS.get(cut, {}))
    assert_same(drafting.generate(PROMPTS, params(temperature, n=2)), uncut(mtp_model, temperature))
    if not cut:
        assert drafting.stats.num_drafted > 50


def test_drafts_are_the_predictions_of_the_mtp_module_over_the_whole_sequence(mtp_model):
    """Drafts come from cached rows; here the module runs over the finished sequence at once."""
    model, prompt = mtp_model, PROMPTS[2]
    speculative = engine(model, num_draft_tokens=1, max_batch_tokens=11)
    (request_id,) = speculative.add(prompt, params(1.0, ignore_eos=True), stream=True)
    drafts: dict[int, int] = {}
    table = speculative.scheduler.table
    while True:
        events = speculative.step()
        for row in speculative.scheduler.running.tolist():
            if table.num_drafts[row]:
                drafts[int(table.num_known[row])] = int(table.token_ids[row, table.num_known[row]])
        if events and events[-1].completion is not None:
            completion = events[-1].completion
            break
    assert request_id == 0
    ids = [*prompt, *completion.token_ids]
    with torch.no_grad():
        batch = pack([ids])
        hidden = model.mtp_hidden(0, model(batch), torch.tensor([*ids[1:], 0]), model.step(batch))
        predicted = model.mtp_logits(0, hidden).argmax(-1).tolist()
    assert len(drafts) > 10
    for position, draft in drafts.items():
        assert draft == predicted[position - 2]


def test_a_perfect_drafter_is_accepted_every_time(mtp_model):
    """A model that repeats its last token, with an MTP module that does the same."""
    model = build("mla_moe_mtp")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()  # the residual stream is the embedding of the last token
        model.model.embed_tokens.weight.copy_(torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1))
        model.lm_head.weight.copy_(50 * model.model.embed_tokens.weight)
        mtp = model.model.layers[model.config.num_layers]
        mtp.eh_proj.weight.copy_(torch.cat((torch.eye(32), torch.zeros(32, 32)), 1))  # next token's embedding
    drafting = engine(model, num_draft_tokens=3)
    (completion,) = drafting.generate([[0, 9, 9]], params(1.0, max_tokens=21))[0]
    assert completion.token_ids == [9] * 21
    assert completion.num_drafted == completion.num_accepted == 15
    assert drafting.stats.acceptance == 1.0
    assert drafting.stats.num_steps == 6  # prefill, then 4 tokens a step
