"""Recorded decode steps: the tokens of steps that are not, whatever happens in between. Most of it needs a GPU."""

import copy
from dataclasses import replace

import pytest
import torch

from kogia.engine import graphs
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.graphs import SIZES, experts_refusal, recorded_sizes
from kogia.engine.request import SamplingParams
from kogia.engine.views import WholeCache
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.linear import Linear
from kogia.model.mla import MLA
from kogia.model.moe import MoE
from kogia.model.packed import pack
from kogia.model.quantised import packable
from kogia.model.transformer import Transformer, build_model
from kogia.ops.dispatch import use_backend
from kogia.ops.packed import FORMATS

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [[5, 9, 11, 3], [7, 2], list(range(2, 40)), [2] * 17, [12], list(range(40, 2, -1)), [9, 9, 8]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=20, seed=3, ignore_eos=True, logprobs=True)


@pytest.fixture(autouse=True)
def equal_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is split by the shape of a step, which decides how sums are rounded: here always alike, to compare
    tokens exactly."""
    if torch.cuda.is_available():
        from kogia.ops.triton import attention

        monkeypatch.setattr(attention, "num_parts", lambda *_: 3)


def tiny(device: str = "cuda", seed: int = 1, dtype: torch.dtype = torch.bfloat16, expert_dim: int = 32) -> Transformer:
    mla = MLAConfig(
        num_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
    )
    config = ModelConfig(
        vocab_size=61,
        dim=64,
        num_layers=3,
        ffn_dim=64,
        attention=mla,
        max_position=256,
        init_std=0.2,
        moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=expert_dim),
    )
    model = build_model(config, device=device, dtype=dtype, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def wide(seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """A model of widths that a CPU's kernels take, with a module for drafts."""
    mla = MLAConfig(
        num_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=16
    )
    moe = MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=64)
    config = ModelConfig(
        vocab_size=61, dim=64, num_layers=3, ffn_dim=64, attention=mla, max_position=256, init_std=0.2, moe=moe,
        num_mtp_layers=1,
    )  # fmt: skip
    return build_model(config, dtype=dtype, seed=seed)


def narrow(rope: int, dim: int, latent: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """A model of the demonstration's widths, and of others that fill no register."""
    mla = MLAConfig(
        num_heads=4, q_lora_rank=None, kv_lora_rank=latent, qk_nope_head_dim=16, qk_rope_head_dim=rope, v_head_dim=32
    )
    moe = MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=dim // 3)
    config = ModelConfig(
        vocab_size=61, dim=dim, num_layers=2, ffn_dim=4 * dim, attention=mla, max_position=256, init_std=0.1, moe=moe,
        num_mtp_layers=1,
    )  # fmt: skip
    return build_model(config, dtype=dtype, seed=seed)


def packed(model: Transformer, format: str) -> Transformer:
    """The model itself, with all weights packed that the format is for."""
    for _, layer in packable(model, format):
        if layer.format is None:
            layer.pack(format)
    model.absorb()
    return model


def engine_of(model: Transformer, **options) -> Engine:
    settings = {"block_size": 4, "num_blocks": 300, "max_sequences": 16, "prefix_cache": False}
    return Engine(model, None, EngineConfig(**{**settings, **options}))


def outputs(engine: Engine, params: SamplingParams, prompts=PROMPTS) -> list[tuple[list[int], list[float]]]:
    return [(c[0].token_ids, c[0].logprobs or []) for c in engine.generate(prompts, params)]


def test_graphs_asked_for_where_there_can_be_none_are_refused():
    with pytest.raises(ValueError, match=r"engine.graphs = true: .*; leave it out, or set it to false"):
        engine_of(tiny("cpu"), graphs=True, deterministic=True)
    assert engine_of(tiny("cpu"), deterministic=True).runner.graphs is None


def test_experts_without_a_kernel_are_no_reason_to_fail_but_for_steps_that_are_not_recorded():
    model = wide()
    if engine_of(model).runner.graphs is None:
        pytest.skip("no kernels here")
    assert experts_refusal(model) is None
    for mixture in (module for module in model.modules() if isinstance(module, MoE)):
        mixture.experts.gate_up_proj.pack("fp8")
        mixture.experts.down_proj.pack("fp8")
    assert "dense" in str(experts_refusal(model))


def test_no_step_of_more_sequences_than_the_kernels_take_is_recorded():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for most, sizes in ((1, [1]), (5, [1, 2, 3, 4, 5]), (600, [*SIZES])):
        assert recorded_sizes(most, gpu, 129280) == sizes
    assert recorded_sizes(600, gpu, 129280, 3)[-2:] == [160, 170]
    assert recorded_sizes(5, cpu, 129280) == [*range(1, 6)] and recorded_sizes(600, cpu, 129280) == [*range(1, 17)]
    assert recorded_sizes(600, cpu, 129280, 3) == [1, 2, 3, 4, 5]
    assert recorded_sizes(600, cpu, 16384) == [*range(1, 17), 20, 24, 28, 32]
    assert recorded_sizes(600, cpu, 500) == [*range(1, 17), *(size for size in SIZES if 16 < size <= 256)]
    assert recorded_sizes(600, cpu, 500, 3) == [*range(1, 6), *(size for size in SIZES if 5 < size < 85), 85]
    assert recorded_sizes(19, cpu, 500) == [*range(1, 17), 19]


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.bfloat16, "int4")],
)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, top_p=0.9, top_k=20)])
def test_recorded_steps_on_a_cpu_give_the_tokens_of_steps_that_are_not(dtype, quantize, params):
    model, other = wide(dtype=dtype), wide(seed=2, dtype=dtype)
    for each in (model, other):
        for module in each.modules() if quantize else ():
            if isinstance(module, Linear):
                module.pack(quantize)
    want = outputs(engine_of(model, graphs=False), params)
    engine = engine_of(model)
    if engine.runner.graphs is None:
        pytest.skip("no kernels here")
    assert outputs(engine, params) == want
    assert outputs(engine, params) == want, "the second run replays"
    assert outputs(engine_of(model, num_draft_tokens=2, graphs=False), params) == want
    assert outputs(engine_of(model, num_draft_tokens=2), params) == want
    engine.update_weights(other)
    assert outputs(engine, params) == outputs(engine_of(other, graphs=False), params) != want


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize(("rope", "dim", "latent"), [(16, 96, 32), (2, 96, 40), (6, 60, 23)])
@torch.no_grad()
def test_on_a_cpu_models_of_any_width_are_recorded_and_run_by_kernels_alone(rope, dim, latent, format, monkeypatch):
    model = narrow(rope, dim, latent)
    for _, layer in packable(model, format) if format else ():
        if FORMATS[format].takes(layer.shape):
            layer.pack(format)
    model.absorb()
    if engine_of(wide()).runner.graphs is None:
        pytest.skip("no kernels here")
    want = outputs(engine_of(model, graphs=False), SAMPLED, PROMPTS[:3])
    engine = engine_of(model, num_draft_tokens=2, adaptive_drafts=False)
    assert outputs(engine, SAMPLED, PROMPTS[:3]) == want
    recorded = engine.runner.draft_graphs._recorded.values()
    assert recorded and all(len(step.graphs._parts) == 1 for step in recorded), "PyTorch's own operations in between"


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, top_p=0.9, top_k=20)])
@pytest.mark.parametrize("drafts", [1, 3])
def test_on_a_cpu_a_step_with_drafts_is_kernels_from_end_to_end(drafts, params):
    engine = engine_of(wide(dtype=torch.float32), num_draft_tokens=drafts)
    outputs(engine, params)
    graphs = engine.runner.draft_graphs
    if graphs is None:
        pytest.skip("no kernels here")
    parts = [part for step in graphs._recorded.values() for part in step.graphs._parts]
    assert len(parts) == len(graphs._recorded) > 0, "one call for all of it, and nothing of PyTorch's in between"


def test_on_a_cpu_sequences_with_drafts_overlap_join_and_leave():
    """Steps planned ahead, of which the device alone knows where they start."""
    model, params = wide(dtype=torch.float32), [GREEDY, SAMPLED, replace(SAMPLED, top_k=5)] * 2
    params = [replace(each, max_tokens=5 + 4 * i) for i, each in enumerate(params)]
    want = [c[0].token_ids for c in engine_of(model, graphs=False).generate(PROMPTS[:6], params)]
    for overlap in (False, True):
        engine = engine_of(model, num_draft_tokens=2, adaptive_drafts=False, overlap=overlap, max_sequences=4)
        for _ in range(2):
            assert [c[0].token_ids for c in engine.generate(PROMPTS[:6], params)] == want
        assert engine.stats.num_drafted > 0
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_drawing_with_filters_is_recorded_and_each_row_has_its_own(monkeypatch):
    model = wide()
    each = [GREEDY, SAMPLED, replace(SAMPLED, top_p=0.7), replace(SAMPLED, top_k=3), replace(SAMPLED, min_p=0.2)]
    params = [*each, replace(SAMPLED, temperature=0.6, top_p=0.95, top_k=40, min_p=0.01), replace(SAMPLED, seed=9)]
    want = [c[0].token_ids for c in engine_of(model, graphs=False).generate(PROMPTS, params)]
    if engine_of(model).runner.graphs is None:
        pytest.skip("no kernels here")
    engine, drawn = engine_of(model), []
    draw = graphs.DecodeGraphs.draw
    monkeypatch.setattr(
        graphs.DecodeGraphs,
        "draw",
        lambda self, step, *, filtered: drawn.append(filtered) or draw(self, step, filtered=filtered),
    )
    assert [c[0].token_ids for c in engine.generate(PROMPTS, params)] == want
    assert len(drawn) > 10 and all(drawn)
    assert [c[0].token_ids for c in engine.generate(PROMPTS[:2], params[:2])] == want[:2]
    assert not drawn[-1], "no filter is on"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [17, 31, 37])
def test_on_a_cpu_nobodys_sequences_beside_them_change_no_token_of_a_small_model(dtype, count):
    model, prompts = wide(dtype=dtype), [[3 + (7 * i + j) % 50 for j in range(5)] for i in range(count)]
    engine = engine_of(model, max_sequences=40)
    if engine.runner.graphs is None:
        pytest.skip("no kernels here")
    want = outputs(engine_of(model, max_sequences=40, graphs=False), SAMPLED, prompts)
    assert outputs(engine, SAMPLED, prompts) == want
    assert engine.runner.graphs.sizes[-1] == 40


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_tokens": 7}, {"max_batch_tokens": 23}, {"prefix_cache": True}, {"cache_dtype": "fp8"}]
)
def test_prompts_expanded_from_the_cache_give_the_tokens_of_absorbed_ones(options, monkeypatch):
    model = tiny("cpu", dtype=torch.float32)
    want = outputs(engine_of(model, **options), GREEDY)
    engine = engine_of(model, **options)
    view, expanded = engine.runner.view, []
    assert isinstance(view, WholeCache) and not view.cache.expands
    view.cache = replace(view.cache, expands=True)
    prefilled = MLA._prefilled
    monkeypatch.setattr(MLA, "_prefilled", lambda self, q, *rest: expanded.append(len(q)) or prefilled(self, q, *rest))
    found = outputs(engine, GREEDY)
    assert [ids for ids, _ in found] == [ids for ids, _ in want]
    for (_, got), (_, expected) in zip(found, want, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=1e-3)
    assert expanded and max(expanded) > 4


@gpu
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, top_p=0.9, top_k=20)])
def test_recorded_steps_give_the_tokens_of_steps_that_are_not(params):
    model = tiny()
    want = outputs(engine_of(model, graphs=False), params)
    engine = engine_of(model, graphs=True)
    assert outputs(engine, params) == want
    assert outputs(engine, params) == want, "the second run replays"
    assert outputs(engine_of(model, graphs=True, overlap=False), params) == want


@gpu
@pytest.mark.parametrize("options", [{"active_experts": 1}, {"active_experts": 4}, {"expert_threshold": 0.6}])
def test_the_engines_own_number_of_experts_is_recorded_and_a_requests_own_is_not(options):
    model = tiny()
    want = outputs(engine_of(model, graphs=False, **options), GREEDY)
    engine = engine_of(model, graphs=True, **options)
    assert outputs(engine, GREEDY) == want
    assert outputs(engine_of(model, graphs=True), replace(GREEDY, **options)) == want


@gpu
def test_a_batch_between_two_recorded_sizes_is_filled_up_with_nobody():
    model = tiny()
    engine, eager = engine_of(model, graphs=True), engine_of(model, graphs=False)
    for count in range(1, 8):
        assert outputs(engine, GREEDY, PROMPTS[:count]) == outputs(eager, GREEDY, PROMPTS[:count])
    assert engine.runner.graphs is not None
    engine.warm_up()
    assert outputs(engine, GREEDY) == outputs(eager, GREEDY)


def test_recorded_operations_run_on_weights_that_were_trained_since():
    model = tiny("cpu", dtype=torch.float32)
    config = EngineConfig(block_size=4, num_blocks=800, prefix_cache=False)
    engine, many = Engine(model, None, config), PROMPTS * 8  # of which the products are PyTorch's
    before = outputs(engine, GREEDY, many)
    with torch.enable_grad():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        after = outputs(engine, GREEDY, many)
    assert after == outputs(Engine(model, None, config), GREEDY, many) != before


@gpu
def test_graphs_outlive_new_weights():
    model, other = tiny(), tiny(seed=2)
    engine = engine_of(model, graphs=True)
    before = outputs(engine, GREEDY)
    engine.update_weights(other)
    after = outputs(engine, GREEDY)
    assert after == outputs(engine_of(other, graphs=True), GREEDY) != before


@gpu
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_packed_models_run_in_graphs_which_outlive_new_weights(format):
    model, other = (packed(tiny(seed=seed, expert_dim=128), format) for seed in (1, 2))
    engine = engine_of(model, graphs=True)
    before = outputs(engine, GREEDY)
    assert before == outputs(engine_of(model, graphs=False), GREEDY)
    engine.update_weights(other)
    assert outputs(engine, GREEDY) == outputs(engine_of(other, graphs=True), GREEDY) != before


@gpu
def test_weights_that_change_under_running_requests_give_a_fresh_engines_continuations():
    model, other = tiny(), tiny(seed=2)
    engine = engine_of(model, graphs=True)
    ids = engine.add(PROMPTS[0], GREEDY)
    for _ in range(8):
        engine.step()
    engine.update_weights(other)
    done = None
    while done is None:
        done = next((e.completion for e in engine.step() if e.request_id == ids[0] and e.completion), None)
    fresh = engine_of(other, graphs=True)
    for cut in range(1, 10):  # some prefix was sampled before the update; the rest is what the new weights say
        rest = outputs(fresh, replace(GREEDY, max_tokens=20 - cut), [PROMPTS[0] + done.token_ids[:cut]])[0][0]
        if rest == done.token_ids[cut:]:
            return
    pytest.fail(f"no prefix of {done.token_ids} continues as the new weights do")


@gpu
def test_a_request_whose_logits_are_not_numbers_ends_alone():
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    # beside a fourth that is as long: how attention is split, and with it rounding, follows from the shape of a step
    good = outputs(engine_of(model, graphs=True), GREEDY, [*PROMPTS[:3], [4, 5, 5]])[:3]
    engine = engine_of(model, graphs=True)
    found = engine.generate([*PROMPTS[:3], [4, 60, 5]], GREEDY)
    assert found[3][0].finish_reason == "error"
    assert [(c[0].token_ids, c[0].logprobs) for c in found[:3]] == good
    again = outputs(engine, GREEDY, [*PROMPTS[:3], [4, 5, 5]])[:3]
    assert again == good, "nothing of it is left in the cache"


@gpu
def test_prompts_have_the_same_log_probabilities_whole_in_chunks_and_behind_cached_prefixes():
    """Up to bfloat16, whose error is measured against float32: that of chunks is no larger than that of whole ones. The
    median, as rounding now and then sends a token to another expert, which moves that token by whole nats."""
    model = tiny()
    wide = copy.deepcopy(model).float()
    prompts = [list(range(3, 60)), [*range(3, 40), 50, 51, 9], [8, 3]]
    errors = {}
    whole = {"max_batch_tokens": 256}
    for options in (whole, {"max_batch_tokens": 7}, {"max_batch_tokens": 23}, {"prefix_cache": True}):
        found = outputs(engine_of(model, **options), GREEDY, prompts)
        gaps = []
        for prompt, (ids, logprobs) in zip(prompts, found, strict=True):
            with torch.no_grad(), use_backend("reference"):
                want = wide.logprobs(pack([prompt + ids]).to("cuda"))[len(prompt) :].cpu()
            gaps.append((want - torch.tensor(logprobs)).abs())
        errors[str(options)] = float(torch.cat(gaps).median())
    assert max(errors.values()) < 2 * errors[str(whole)] + 0.01, errors
