"""Getting ready before the first request. What is compiled and recorded needs a GPU."""

import threading
from typing import Any

import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.graphs import DecodeGraphs
from kogia.engine.request import SamplingParams
from kogia.engine.warm_up import one_of_each_kind, prompt_steps
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.ops.prefill import FEW

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def latent(device: str, num_mtp_layers: int = 0, num_layers: int = 2) -> Transformer:
    """A small model whose latent rows are as wide as the published ones, for which kernels are made."""
    mla = MLAConfig(
        num_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32
    )
    moe = MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=64)
    config = ModelConfig(
        vocab_size=97, dim=128, num_layers=num_layers, ffn_dim=128, attention=mla, max_position=1024, init_std=0.1,
        moe=moe, num_mtp_layers=num_mtp_layers,
    )  # fmt: skip
    return build_model(config, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def engine_of(model: Transformer, **options: Any) -> Engine:
    settings = {"block_size": 16, "num_blocks": 300, "max_sequences": 24, "max_batch_tokens": 600, **options}
    return Engine(model, None, EngineConfig(**settings))


def test_on_a_cpu_nothing_is_made_ahead():
    engine, heard = engine_of(latent("cpu")), []
    engine.warm_up(lambda *progress: heard.append(progress))
    assert not heard


@pytest.mark.parametrize(("longest", "block", "most_tokens"), [(1024, 16, 600), (100, 64, 8192), (7, 4, 3)])
def test_steps_that_are_gone_through_span_every_power_of_two_of_tokens_and_of_blocks(longest, block, most_tokens):
    steps = list(prompt_steps(longest, block, 24, most_tokens))
    alone = {length for length, _, others in steps if not others}
    limit = min(most_tokens, longest)
    assert max(alone) == max(limit, FEW)
    assert {(n, c, o) for n in range(1, FEW + 1) for c in (min(block, longest), longest) for o in (0, 23)} <= set(steps)
    for tokens in range(2, limit + 1):
        assert any(length.bit_length() == (tokens - 1).bit_length() + 1 or length == limit for length in alone)
    few = {(length, -(-context // block)) for length, context, others in steps if length <= FEW and not others}
    for blocks in range(1, -(-longest // block) + 1):
        more = 1 << (blocks - 1).bit_length()
        assert (FEW, min(more, -(-longest // block))) in few


def layers_of(model: Transformer) -> list[Any]:
    return list(model.model.layers)


def test_what_is_gone_through_has_one_layer_of_each_kind_and_then_all_of_them_again():
    model = latent("cpu", num_mtp_layers=1, num_layers=7)
    layers = layers_of(model)
    layers[3].self_attn.o_proj.pack("int8")
    layers[4].mlp.experts.down_proj.pack("fp8")
    layers[6].mlp.gate.weight = torch.nn.Parameter(torch.zeros(8 * 128 + 1)[1:].view(8, 128))  # aligned otherwise
    graphs = engine_of(model).runner.graphs
    assert isinstance(graphs, DecodeGraphs)
    with one_of_each_kind(model, graphs.cache.rows):
        assert layers_of(model) == [layers[i] for i in (0, 1, 3, 4, 6, 7)]
        step = model.step(pack([[1, 2, 3]]))
        hidden = model(pack([[1, 2, 3]]), step=step)
        assert hidden.isfinite().all() and model.mtp_hidden(0, hidden, torch.tensor([2, 3, 4]), step).isfinite().all()
    assert layers_of(model) == layers and model.model.num_layers == 7


def test_layers_whose_rows_of_the_cache_are_aligned_otherwise_are_kinds_of_their_own():
    model = latent("cpu", num_layers=5)
    layers, rows = layers_of(model), torch.zeros(5, 3, 2)  # 24 bytes a layer
    with pytest.raises(KeyboardInterrupt), one_of_each_kind(model, rows):
        raise KeyboardInterrupt if layers_of(model) == layers[:3] else AssertionError
    assert layers_of(model) == layers


@gpu
@pytest.mark.parametrize("drafts", [0, 2])
def test_nothing_is_compiled_after_the_warm_up_and_tokens_are_those_without_it(drafts):
    from triton import knobs

    model, compiled = latent("cuda", num_mtp_layers=1), []
    ready = engine_of(model, num_draft_tokens=drafts)
    heard = []
    ready.warm_up(lambda *progress: heard.append(progress))
    assert heard[-1][0] == heard[-1][1] == len(heard)
    prompts = [[7 + i % 80 for i in range(length)] for length in (1, 2, 3, 4, 5, 40, 130, 131, 200, 300, 511)]
    params = [SamplingParams(temperature=i % 2, top_p=1 - i % 3 / 9, max_tokens=9, seed=i, ignore_eos=True)
              for i in range(len(prompts))]  # fmt: skip
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, src, **_: compiled.append(src.name)
    try:
        for each, own in zip(prompts, params, strict=True):
            ready.generate([each], own)
        together = ready.generate(prompts, params)
    finally:
        knobs.compilation.listener = before
    assert not compiled
    lazy = engine_of(model, num_draft_tokens=drafts)
    want = lazy.generate(prompts, params)
    same = [a[0].token_ids == b[0].token_ids for a, b in zip(together, want, strict=True)]
    assert sum(same) >= len(same) - 2  # up to ties of bf16


@gpu
def test_what_another_thread_launches_meanwhile_is_launched():
    from kogia.ops.norm import rms_norm
    from kogia.ops.triton.ahead import _noted

    x, weight = torch.randn(3, 208, device="cuda").bfloat16(), torch.ones(208, device="cuda").bfloat16()
    found: list[torch.Tensor] = []
    with torch.no_grad(), _noted() as noted:
        thread = threading.Thread(target=lambda: found.append(rms_norm(x, weight, 1e-6)))
        thread.start()
        thread.join()
        assert not noted
    torch.testing.assert_close(found[0].float(), torch.nn.functional.rms_norm(x.float(), (208,), eps=1e-6), atol=0.05,
                               rtol=0.02)  # fmt: skip
