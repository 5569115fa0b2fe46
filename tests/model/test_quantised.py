"""Models with packed weights: which they are, and that drawing them packed is packing what is drawn."""

from dataclasses import replace

import pytest
import torch
from checkpoint.tiny import CONFIG, DENSE

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.linear import Linear
from kogia.model.packed import pack
from kogia.model.quantised import build_packed, make_packed, packable
from kogia.model.transformer import build_model, empty_model

WIDE = ModelConfig(
    vocab_size=50, dim=64, num_layers=2, ffn_dim=96, num_mtp_layers=1,
    attention=MLAConfig(
        num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        indexer=IndexerConfig(num_heads=2, head_dim=16, topk=4),
    ),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=32, num_shared_experts=1),
)  # fmt: skip
PROJECTIONS = {
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj",
}  # fmt: skip


def leaves(model, format):
    return {name.rpartition(".")[2] for name, _ in packable(model, format)}


def test_int_formats_take_projections_experts_and_an_untied_head():
    for format in ("int8", "int4"):
        assert leaves(empty_model(WIDE), format) == PROJECTIONS | {"lm_head"}
        assert leaves(empty_model(replace(WIDE, tie_embeddings=True)), format) == PROJECTIONS
    assert leaves(empty_model(DENSE), "int8") == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip


def test_fp8_takes_what_deepseek_publishes_in_it():
    assert leaves(empty_model(WIDE), "fp8") == PROJECTIONS | {"wq_b", "wk"}


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_a_model_drawn_packed_is_the_drawn_model_packed(format):
    want = build_model(WIDE, dtype=torch.bfloat16, seed=3)
    for _, layer in packable(want, format):
        layer.pack(format)
    got = build_packed(WIDE, format, device="cpu", dtype=torch.bfloat16, seed=3)
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), want.state_dict()[name].view(torch.uint8)), name
    batch = pack([[3, 1, 4, 1, 5], [9, 2]])
    with torch.no_grad():
        assert torch.equal(got.logits(got(batch)), want.logits(want(batch)))
        assert torch.equal(got.logprobs(batch), want.logprobs(batch))


def test_rows_that_no_group_divides_stay_dense_and_are_named_once(capsys):
    model = empty_model(replace(WIDE, ffn_dim=48))
    make_packed(model, "int4")
    said = capsys.readouterr()
    assert "model.layers.0.mlp.down_proj [64, 48]: rows of such a length have no int4 form" in said.out + said.err
    dense = {name for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.format is None}
    assert {name for name in dense if ".indexer." not in name} == {"model.layers.0.mlp.down_proj"}
    make_packed(empty_model(CONFIG), "int4")  # nothing there fits
    assert "and 28 more" in "".join(capsys.readouterr())


def test_zeros_are_held_and_filled():
    model = empty_model(WIDE)
    make_packed(model, "int4", zeros=True)
    layer = Linear(64, 32, stack=(3,))
    layer.make_packed("int4", zeros=True)
    dense = torch.randn(3, 32, 64) + 1
    layer.store(dense)
    want = Linear(64, 32, stack=(3,))
    want.weight.data.copy_(dense)
    want.pack("int4", asymmetric=True)
    assert all(torch.equal(tensor, want.state_dict()[name]) for name, tensor in layer.state_dict().items())
    assert model.lm_head.weight_zero_point.shape == (50, 1)


@pytest.mark.parametrize("dim, ffn, expert", [(96, 160, 32), (160, 64, 96), (64, 96, 160)])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_the_engine_runs_int4_rows_of_any_multiple_of_32_as_it_runs_what_they_stand_for(kind, dim, ffn, expert):
    """Kernels take multiples of 64; rows of others meet kernels of their neighbours within one layer."""
    latent = MLAConfig(num_heads=2, kv_lora_rank=96, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    config = replace(
        WIDE, dim=dim, ffn_dim=ffn, num_mtp_layers=0, init_std=0.2, max_position=64,
        attention=latent if kind == "mla" else GQAConfig(num_heads=2, head_dim=32),
        moe=MoEConfig(num_experts=4, topk=2, expert_dim=expert, num_shared_experts=1, num_dense_layers=1),
    )  # fmt: skip
    packed = build_packed(config, "int4", device="cpu", dtype=torch.float32, seed=3)
    dense = build_model(config, dtype=torch.float32, seed=3)
    layers = dict(packed.named_modules())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            layer = layers[name.rpartition(".")[0]]
            if isinstance(layer, Linear) and name.endswith(".weight"):
                parameter.copy_(layer.dense_weight(torch.float32))
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=True, ignore_eos=True)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    got, want = (
        Engine(model, None, EngineConfig(num_blocks=20, block_size=4)).generate(prompts, params)
        for model in (packed, dense)
    )
    for (mine,), (theirs,) in zip(got, want, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=2e-3)
