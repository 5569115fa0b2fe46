"""Batch-invariant steps: the same tokens and log-probabilities, bit for bit, whatever else the engine does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kogia.engine.config import EngineConfig, PruneConfig
from kogia.engine.engine import Engine
from kogia.engine.request import Completion, SamplingParams
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.presets import preset
from kogia.model.transformer import Transformer, build_model

LATENT = ModelConfig(
    vocab_size=61,
    dim=40,
    num_layers=3,
    ffn_dim=56,
    attention=MLAConfig(num_heads=3, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12),
    moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=3, expert_dim=24, num_dense_layers=1),
    num_mtp_layers=1,
    max_position=400,
    init_std=0.2,
)
MODELS = {
    "latent": LATENT,
    "softmax routers in groups": replace(
        LATENT, moe=MoEConfig(num_experts=8, topk=2, expert_dim=24, score="softmax", num_groups=4, topk_groups=2)
    ),
    "heads": replace(LATENT, attention=GQAConfig(num_heads=6, num_kv_heads=2, head_dim=10), moe=None, num_mtp_layers=0),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
PROMPT = [0, 5, 9, 11, 3, 8, 8, 21, 4, 17, 30, 2, 2, 6, 7, 7, 41, 42, 13, 5, 9]
PARAMS = SamplingParams(temperature=0.8, max_tokens=24, seed=3, logprobs=True, ignore_eos=True, top_p=0.95)


def engine(model: Transformer, **options) -> Engine:
    return Engine(model, None, EngineConfig(**{"block_size": 4, "num_blocks": 600, "deterministic": True, **options}))


def bits(completion: Completion) -> tuple[list[int], list[float]]:
    assert completion.logprobs is not None
    return completion.token_ids, completion.logprobs


def models(device: str, dtype: torch.dtype) -> dict[str, Transformer]:
    return {name: build_model(config, seed=2, dtype=dtype, device=device) for name, config in MODELS.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_request_gives_the_same_bits_in_any_company_and_cut_in_any_way(device, dtype):
    alone: dict[str, tuple[list[int], list[float]]] = {}
    built = models(device, dtype)
    for name, model in built.items():
        alone[name] = bits(engine(model).generate([PROMPT], PARAMS)[0][0])

    @settings(max_examples=8, deadline=None)
    @given(
        name=st.sampled_from(sorted(MODELS)),
        company=st.lists(st.integers(1, 150), max_size=12),
        place=st.integers(0, 12),
        chunk=st.integers(1, 300),
        rows=st.integers(1, 30),
        blocks=st.integers(110, 600),
        block_size=st.sampled_from([4, 8, 24]),
        drafts=st.integers(0, 2),
        twice=st.booleans(),
        seed=st.integers(0, 99),
    )
    def check(name, company, place, chunk, rows, blocks, block_size, drafts, twice, seed):
        torch.manual_seed(seed)
        prompts = [torch.randint(0, 61, (length,)).tolist() for length in company]
        params = [replace(PARAMS, max_tokens=1 + seed % 7, seed=seed, temperature=seed % 3 / 2) for _ in prompts]
        place = min(place, len(prompts))
        prompts.insert(place, PROMPT)
        params.insert(place, PARAMS)
        if not MODELS[name].num_mtp_layers:
            drafts = 0
        busy = engine(
            built[name],
            max_batch_tokens=chunk,
            max_sequences=rows,
            num_blocks=blocks,
            block_size=block_size,
            num_draft_tokens=drafts,
        )
        assert bits(busy.generate(prompts, params)[place][0]) == alone[name]
        if twice:
            again = busy.generate([PROMPT], PARAMS)[0][0]
            assert again.num_cached_tokens > 0 or block_size > 20
            assert bits(again) == alone[name]

    check()


@pytest.mark.parametrize("chunk", [7, 200])
def test_likeliest_tokens_prompts_and_penalties_have_the_same_bits_too(chunk):
    model = build_model(LATENT, seed=2)
    asked = replace(PARAMS, logprobs=3, prompt_logprobs=3, presence_penalty=0.5, repetition_penalty=1.2)
    alone = engine(model).generate([PROMPT], asked)[0][0]
    busy = engine(model, max_batch_tokens=chunk)
    found = busy.generate([[1] * 130, PROMPT, [2, 3]], [PARAMS, asked, PARAMS])[1][0]
    for name in ("token_ids", "logprobs", "prompt_logprobs", "top_logprobs", "prompt_top_logprobs"):
        assert getattr(alone, name) is not None and getattr(found, name) == getattr(alone, name)


def test_without_it_company_does_change_bits():
    model, prompts = build_model(LATENT, seed=2), [PROMPT * 7]  # more rows than a CPU's kernels keep in one order
    plain = [engine(model, deterministic=False, max_batch_tokens=n).generate(prompts, PARAMS)[0][0] for n in (1, 300)]
    assert bits(plain[0])[1] != bits(plain[1])[1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"active_experts": 2}, {"cache_dtype": "fp8"}])
def test_what_is_computed_is_what_the_engine_computes_otherwise(name, options):
    if options and name == "heads":
        pytest.skip("no experts and no latents")
    model = build_model(MODELS[name], seed=2)
    params = replace(PARAMS, temperature=0.0)
    got = engine(model, **options).generate([PROMPT], params)[0][0]
    want = engine(model, deterministic=False, **options).generate([PROMPT], params)[0][0]
    assert got.token_ids == want.token_ids
    near = 2e-3 if "cache_dtype" in options else 1e-4  # a number next to an edge of FP8 is rounded to either side
    torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(want.logprobs), rtol=near, atol=near)


def test_what_has_no_invariant_form_is_refused_before_anything_is_built():
    attention = MLAConfig(
        num_heads=2,
        q_lora_rank=8,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        indexer=IndexerConfig(num_heads=1, head_dim=16, topk=7),
    )
    sparse = build_model(replace(LATENT, attention=attention))
    with pytest.raises(ValueError, match=r"engine.deterministic = true: this model's sparse attention has no"):
        engine(sparse)
    with pytest.raises(ValueError, match="engine.deterministic with engine.prune"):
        EngineConfig(deterministic=True, prefix_cache=False, prune=PruneConfig(64, 64))


def test_steps_are_not_recorded():
    with pytest.raises(ValueError, match="engine.graphs = true: deterministic steps are not recorded"):
        engine(build_model(LATENT), graphs=True)


def test_threads_are_as_before_when_a_step_is_over():
    before = torch.get_num_threads()
    engine(build_model(LATENT)).generate([PROMPT], replace(PARAMS, max_tokens=2))
    assert torch.get_num_threads() == before


def test_a_measurement_is_deterministic_where_that_was_left_open():
    model = build_model(LATENT, seed=2)
    open_engine = engine(model, deterministic=None)
    open_engine.generate([PROMPT], PARAMS)
    with open_engine.deterministic():
        assert open_engine.is_deterministic
        measured = open_engine.generate([PROMPT], PARAMS)[0][0]
    assert measured.num_cached_tokens == 0, "what was cached before had other bits"
    assert bits(measured) == bits(engine(model).generate([PROMPT], PARAMS)[0][0])
    assert not open_engine.is_deterministic
    assert open_engine.generate([PROMPT], PARAMS)[0][0].num_cached_tokens == 20
    with open_engine.deterministic():
        assert open_engine.generate([PROMPT], PARAMS)[0][0].num_cached_tokens == 20
    open_engine.add(PROMPT, PARAMS)
    with pytest.raises(ValueError, match="when the engine is idle: 1 requests are not done"):
        open_engine.deterministic().__enter__()
    while open_engine.num_unfinished:
        open_engine.step()
    with pytest.raises(KeyboardInterrupt), open_engine.deterministic():
        raise KeyboardInterrupt
    assert not open_engine.is_deterministic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drafts", [0, 1])
def test_a_measurement_replays_no_recorded_step_and_steps_are_recorded_again_after_it(dtype, drafts):
    model = build_model(replace(preset("kogia-demo"), init_std=0.2), seed=2, dtype=dtype)
    options = {"num_draft_tokens": drafts, "prefix_cache": False}
    prompts = [PROMPT[i:] for i in range(20)]
    open_engine = engine(model, deterministic=None, **options)
    graphs = open_engine.runner.graphs
    if graphs is None:
        pytest.skip("steps are not recorded on this machine")
    before = open_engine.generate(prompts, PARAMS)
    with open_engine.deterministic():
        measured = open_engine.generate(prompts, PARAMS)
    alone = engine(model, **options).generate(prompts, PARAMS)
    assert [bits(each) for (each,) in measured] == [bits(each) for (each,) in alone]
    after = open_engine.generate(prompts, PARAMS)
    assert open_engine.runner.graphs is graphs
    assert [each.token_ids for (each,) in after] == [each.token_ids for (each,) in before]


@pytest.mark.parametrize("said", [True, False])
def test_what_the_settings_say_holds_in_a_measurement_too(said):
    decided = engine(build_model(LATENT), deterministic=said)
    decided.generate([PROMPT], PARAMS)
    with decided.deterministic():
        assert decided.is_deterministic is said
        assert decided.generate([PROMPT], PARAMS)[0][0].num_cached_tokens == 20
    assert decided.is_deterministic is said
