"""Block-scaled FP8 checkpoints: kept as they are, dequantised, saved, and refused where weights and scales part."""

import json
import re
from dataclasses import replace

import pytest
import torch
from checkpoint.tiny import BLOCKS, CONFIG, DENSE, assert_same, edit, rewrite, shard, stored, tiny_fp8
from safetensors.torch import load_file

from kogia.checkpoint.directory import load_config
from kogia.checkpoint.hf import load_model, save_model
from kogia.model.config import IndexerConfig
from kogia.model.packed import pack

GATE = "model.layers.0.mlp.gate_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(params=["one file", "scales in other files"])
def saved(tmp_path, request):
    directory = save_model(tiny_fp8(), tmp_path / "model")
    if request.param != "one file":
        shard(directory, 2)
    return directory


@pytest.fixture
def one_file(tmp_path):
    return save_model(tiny_fp8(), tmp_path / "model")


def dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published rule, element by element: W[a, b] = q[a, b] * scale_inv[a // 128, b // 128]."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"].double()
            rows, columns = (torch.arange(n) // 128 for n in tensor.shape)
            tensor = (tensor.double() * scale[rows][:, columns]).float()
        if not name.endswith("_scale_inv"):
            out[name] = tensor
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_fp8_weights_are_dequantised_in_float32_and_rounded_once(saved, dtype):
    loaded = load_model(saved, dtype=dtype)
    want = dequantized(stored(saved))
    again = stored(save_model(loaded, saved.parent / "dense"))
    assert again.keys() == want.keys()
    for name, tensor in again.items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype or torch.bfloat16
        assert tensor.dtype == kept, name
        torch.testing.assert_close(tensor, want[name].to(kept), rtol=0, atol=0, msg=name)


def test_kept_fp8_weights_are_the_stored_bytes_and_compute_the_same(saved):
    model = tiny_fp8()
    kept = load_model(saved, quantize="stored")
    assert_same(kept, model)
    names = {name for name, tensor in kept.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    assert {"gate", "embed_tokens", "lm_head", "eh_proj", "norm"}.isdisjoint(name.split(".")[-2] for name in names)
    batch = pack([[3, 1, 4, 1, 5], [9, 2]])
    with torch.no_grad():
        dense = load_model(saved)
        torch.testing.assert_close(kept(batch), dense(batch), rtol=0, atol=2e-2 * dense(batch).abs().max().item())
        exact = load_model(saved, quantize="stored", dtype=torch.float32)
        want = load_model(saved, dtype=torch.float32)(batch)
        torch.testing.assert_close(exact(batch), want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_saving_kept_fp8_weights_gives_the_same_bytes(one_file, tmp_path):
    again = save_model(load_model(one_file, quantize="stored"), tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (one_file / file).read_bytes()


def test_names_types_and_config_of_a_saved_fp8_model_are_the_published_ones(one_file):
    tensors = stored(one_file)
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    leaves = {name.split(".")[-2] for name in fp8}
    assert leaves == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {name for name in tensors if name.endswith("_scale_inv")} == {f"{name}_scale_inv" for name in fp8}
    for name in fp8:
        rows, columns = tensors[name].shape
        scale = tensors[f"{name}_scale_inv"]
        assert (scale.dtype, scale.shape) == (torch.float32, (-(-rows // 128), -(-columns // 128))), name
    settings = json.loads((one_file / "config.json").read_text())["quantization_config"]
    want = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert settings == want
    assert json.loads((one_file / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_config(one_file) == BLOCKS


def test_scales_that_are_powers_of_two_are_announced(tmp_path):
    directory = save_model(tiny_fp8(power_of_two=True), tmp_path / "model")
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    assert_same(load_model(directory, quantize="stored"), tiny_fp8(power_of_two=True))


def test_scales_in_bfloat16_are_read(tmp_path):
    directory = save_model(tiny_fp8(power_of_two=True), tmp_path / "model")
    wide = load_model(directory, quantize="stored"), load_model(directory)
    rewrite(directory, lambda t: t.update({n: s.bfloat16() for n, s in t.items() if n.endswith("_scale_inv")}))
    assert_same(load_model(directory, quantize="stored"), wide[0])
    assert_same(load_model(directory), wide[1])


INDEXER = IndexerConfig(num_heads=2, head_dim=136, topk=4)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        DENSE,
        replace(BLOCKS, tie_embeddings=True, num_mtp_layers=2),
        replace(BLOCKS, attention=replace(BLOCKS.attention, indexer=INDEXER)),
        replace(BLOCKS, attention=replace(BLOCKS.attention, q_lora_rank=None, q_lora_ranks=(130, 20))),
    ],
)
def test_fp8_models_of_other_shapes_come_back(config, tmp_path):
    model = tiny_fp8(config)
    assert_same(load_model(save_model(model, tmp_path / "model"), quantize="stored"), model)


def test_a_head_in_fp8_is_kept_or_dequantised(one_file):
    """Some publish the head in FP8 as well."""

    def quantise_head(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale_inv"] = torch.full((1, 2), 0.5)

    rewrite(one_file, quantise_head)
    want = load_file(one_file / "model.safetensors")["lm_head.weight"].float() * 0.5
    for quantize in ("stored", None):
        head = load_model(one_file, quantize=quantize).lm_head
        assert (head.weight.dtype == torch.float8_e4m3fn) == bool(quantize)
        assert torch.equal(head.dense_weight(torch.bfloat16), want.bfloat16())


def test_fp8_in_some_layers_only_is_kept_there(one_file):
    def dense_gate(tensors):
        tensors[GATE] = tensors[GATE].bfloat16()
        del tensors[f"{GATE}_scale_inv"]

    rewrite(one_file, dense_gate)
    model = load_model(one_file, quantize="stored")
    assert model.model.layers[0].mlp.gate_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn


# Bad input


def refused(directory, change, **options) -> str:
    rewrite(directory, change)
    with pytest.raises(ValueError) as error:
        load_model(directory, **options)
    return str(error.value)


@pytest.mark.parametrize("quantize", ["stored", None])
@pytest.mark.parametrize("name", [GATE, EXPERT])
def test_an_fp8_weight_without_scales_is_named(one_file, name, quantize):
    message = refused(one_file, lambda t: t.pop(f"{name}_scale_inv"), quantize=quantize)
    assert f"missing: {name}_scale_inv" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("quantize", ["stored", None])
def test_scales_without_an_fp8_weight_are_named(one_file, quantize):
    message = refused(one_file, lambda t: t.update({GATE: t[GATE].bfloat16()}), quantize=quantize)
    assert f"extra: {GATE}_scale_inv stands beside a weight [272, 144] of BF16" in message
    message = refused(one_file, lambda t: t.pop(GATE), quantize=quantize)
    assert f"extra: {GATE}_scale_inv has no weight" in message
    assert f"missing: {GATE}" in message


@pytest.mark.parametrize("quantize", ["stored", None])
def test_swapped_scales_are_named(one_file, quantize):
    down = GATE.replace("gate_proj", "down_proj")

    def swap(t):
        t[f"{GATE}_scale_inv"], t[f"{down}_scale_inv"] = t[f"{down}_scale_inv"], t[f"{GATE}_scale_inv"]

    message = refused(one_file, swap, quantize=quantize)
    assert f"mis-shaped: {GATE}_scale_inv is [2, 3], its weight [272, 144] needs [3, 2]" in message
    assert f"mis-shaped: {down}_scale_inv is [3, 2], its weight [144, 272] needs [2, 3]" in message


@pytest.mark.parametrize("quantize", ["stored", None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_no_positive_numbers_are_named(one_file, value, quantize):
    name = f"{EXPERT}_scale_inv"

    def damage(t):
        t[name][-1, -1] = value

    message = refused(one_file, damage, quantize=quantize)
    assert f"model.safetensors: {name} holds scales that are not positive numbers" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.float8_e5m2])
def test_scales_of_another_type_are_named(one_file, dtype):
    name = f"{GATE}_scale_inv"
    message = refused(one_file, lambda t: t.update({name: t[name].to(dtype)}))
    assert f"wrong dtype: {name} is" in message
    assert "scales are F32 or BF16" in message


def test_nan_in_fp8_is_warned_of_by_name(one_file, capsys):
    def damage(t):
        t[EXPERT].view(torch.uint8)[3, 5] = 0xFF
        t[GATE].view(torch.uint8)[3, 5] = 0x7F

    rewrite(one_file, damage)
    for quantize in ("stored", None):
        load_model(one_file, quantize=quantize)
        message = "".join(capsys.readouterr().err.split())
        assert message.endswith(f"NaNorinfinitevaluesin{GATE},{EXPERT}")


def test_experts_that_are_partly_fp8_cannot_be_kept_but_load(one_file):
    def damage(t):
        t[EXPERT] = t[EXPERT].bfloat16()
        del t[f"{EXPERT}_scale_inv"]

    message = refused(one_file, damage, quantize="stored")
    assert "the weights of model.layers.1.mlp.experts.down_proj are of several types, dense and fp8" in message
    load_model(one_file)


def test_an_fp8_checkpoint_loads_without_its_announcement(one_file):
    want = load_model(one_file)
    data = json.loads((one_file / "config.json").read_text())
    del data["quantization_config"]
    (one_file / "config.json").write_text(json.dumps(data))
    assert_same(load_model(one_file), want)
    edit(one_file, quantization_config=None)
    assert_same(load_model(one_file), want)


def test_a_vector_in_fp8_is_refused(one_file):
    def damage(t):
        t["model.norm.weight"] = t["model.norm.weight"].to(torch.float8_e4m3fn)
        t["model.norm.weight_scale_inv"] = torch.ones(2, 1)

    assert "extra: model.norm.weight_scale_inv stands beside a weight [144]" in refused(one_file, damage)


@torch.no_grad()
def test_transformers_dequantises_what_we_save_to_the_same_weights(tmp_path):
    """At sizes of whole blocks: transformers takes a scale's block to be an even share of the matrix."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads FP8 checkpoints with it only")
    transformers.utils.logging.disable_progress_bar()
    attention = replace(
        BLOCKS.attention, num_heads=4, q_lora_rank=128, kv_lora_rank=96, qk_rope_head_dim=32, qk_nope_head_dim=32,
        v_head_dim=32,
    )  # fmt: skip
    moe = replace(BLOCKS.moe, expert_dim=128)
    config = replace(BLOCKS, dim=256, ffn_dim=384, attention=attention, moe=moe, num_mtp_layers=0)
    model = tiny_fp8(config)
    directory = save_model(model, tmp_path / "model", max_shard_bytes=200_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    # theirs are stacked as well, [experts, gate | up, dim], and are no modules
    ours = {re.sub(r"(\.experts\.\w+)\.weight$", r"\1", n): t for n, t in load_model(directory).state_dict().items()}
    assert theirs.state_dict().keys() == ours.keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, ours[name].to(tensor.dtype).view(tensor.shape), rtol=0, atol=0, msg=name)
