"""int8 and int4 checkpoints in the layout of compressed-tensors: saved, loaded, converted, refused."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoint.tiny import CONFIG, GROUPS, assert_same, edit, rewrite, shard, stored, tiny, tiny_packed

from kogia.checkpoint import hf, tensorfile
from kogia.checkpoint.convert import convert
from kogia.checkpoint.hf import load_model, save_model
from kogia.checkpoint.inspection import inspect_model
from kogia.cli import main
from kogia.model.packed import pack
from kogia.model.quantised import packable

KINDS = {"int8": {}, "int4": {}, "int4 asymmetric": {"asymmetric": True}}
GATE = "model.layers.0.mlp.gate_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


def packed(kind: str, config=GROUPS):
    return tiny_packed(kind.split()[0], config, **KINDS[kind])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def saved(tmp_path, kind):
    return save_model(packed(kind), tmp_path / "model")


@pytest.fixture
def int4(tmp_path):
    return save_model(packed("int4 asymmetric"), tmp_path / "model")


def dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What compressed-tensors says that its files mean, number by number, in float64."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_packed"):
            name = name.removesuffix("_packed")
            rows, columns = tensors[f"{name}_shape"].tolist()
            scale = tensors[f"{name}_scale"].double().repeat_interleave(columns // tensors[f"{name}_scale"].shape[1], 1)
            codes = torch.stack([(tensor >> 4 * i & 15) - 8 for i in range(8)], -1).flatten(1)
            zeros = torch.zeros_like(scale)
            if f"{name}_zero_point" in tensors:
                words = tensors[f"{name}_zero_point"].T
                zeros = torch.stack([(words >> 4 * i & 15) - 8 for i in range(8)], -1).flatten(1)[:, :rows].T
                zeros = zeros.repeat_interleave(columns // zeros.shape[1], 1)
            out[name] = (codes - zeros).double() * scale
        elif tensor.dtype == torch.int8:
            out[name] = tensor.double() * tensors[f"{name}_scale"].double()
        elif not name.rpartition(".")[2].startswith("weight_"):
            out[name] = tensor
    return out


def test_a_packed_model_comes_back_to_the_byte(saved, kind, tmp_path):
    assert_same(load_model(saved, quantize="stored"), packed(kind))
    again = save_model(load_model(saved, quantize="stored"), tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (saved / file).read_bytes()
    shard(saved, 3)
    assert_same(load_model(saved, quantize="stored"), packed(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_weights_are_what_the_layout_means_rounded_once(saved, dtype, tmp_path):
    want = dequantised(stored(saved))
    got = stored(save_model(load_model(saved, dtype=dtype), tmp_path / "dense"))
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        torch.testing.assert_close(tensor, want[name].float().to(kept), rtol=1e-6, atol=0, msg=name)


def test_packed_and_dense_models_say_the_same(saved):
    batch = pack([[3, 1, 4, 1, 5], [9, 2]])
    with torch.no_grad():
        got = load_model(saved, quantize="stored", dtype=torch.float32).logprobs(batch)
        torch.testing.assert_close(got, load_model(saved, dtype=torch.float32).logprobs(batch), rtol=1e-4, atol=1e-4)


def test_tensors_have_the_names_types_and_shapes_of_compressed_tensors(int4):
    tensors = stored(int4)
    shapes = {n.removeprefix(DOWN): (t.dtype, tuple(t.shape)) for n, t in tensors.items() if n.startswith(DOWN)}
    assert shapes == {
        "_packed": (torch.int32, (64, 32)),
        "_scale": (torch.bfloat16, (64, 2)),
        "_zero_point": (torch.int32, (8, 2)),
        "_shape": (torch.int64, (2,)),
    }
    assert tensors["lm_head.weight_zero_point"].shape == (7, 1)  # 50 rows, eight in a word
    assert tensors["model.layers.2.shared_head.head.weight_packed"].equal(tensors["lm_head.weight_packed"])


def test_config_json_describes_the_groups_and_what_stays_dense(int4, tmp_path):
    settings = json.loads((int4 / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    found = {g["weights"]["group_size"]: g["targets"] for g in settings["config_groups"].values()}
    assert found.keys() == {32, 64, 128}
    assert found[128] == [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]
    assert found[64] == ["Linear"]
    assert r"re:^model\.layers\.\d+\.self_attn\.q_b_proj$" in found[32]
    assert all(g["weights"]["symmetric"] is False for g in settings["config_groups"].values())
    assert settings["ignore"] == ["model.layers.1.mlp.gate", "model.layers.2.eh_proj", "model.layers.2.mlp.gate"]
    int8 = json.loads((save_model(packed("int8"), tmp_path / "int8") / "config.json").read_text())
    (group,) = int8["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel",
    }  # fmt: skip


def test_converting_packing_what_is_loaded_and_loading_packed_agree(tmp_path, kind):
    format, options = kind.split()[0], KINDS[kind]
    source = save_model(tiny(GROUPS, torch.bfloat16), tmp_path / "source")
    want = save_model(packed(kind), tmp_path / "want")
    got = convert(source, tmp_path / "got", quantize=format, **options)
    assert {n: t.tolist() for n, t in stored(got).items()} == {n: t.tolist() for n, t in stored(want).items()}
    for directory in (want, got):
        assert json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]
    if not options:
        assert_same(load_model(source, quantize=format), packed(kind))
    assert_same(load_model(got, quantize=format), packed(kind))  # as it is stored, zeros and all


def test_fp8_at_load_is_what_convert_writes(tmp_path):
    source = save_model(tiny(GROUPS, torch.bfloat16), tmp_path / "source")
    fp8 = convert(source, tmp_path / "fp8", quantize="fp8")
    assert_same(load_model(source, quantize="fp8"), load_model(fp8, quantize="stored"))


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("piece", [1, 5000, 1 << 19])
def test_weights_rounded_together_at_load_are_as_rounded_alone(format, piece, tmp_path, monkeypatch):
    config = replace(GROUPS, moe=replace(GROUPS.moe, expert_dim=160))
    source = save_model(tiny(config, torch.bfloat16), tmp_path / "source")
    wide = {EXPERT: torch.float32, EXPERT.replace("2", "3"): torch.float64}
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].to(kind) for name, kind in wide.items()}))
    for module in (hf, tensorfile):
        monkeypatch.setattr(module, "PIECE", piece)
    assert_same(load_model(source, dtype=torch.bfloat16, quantize=format), tiny_packed(format, config))


def test_one_format_is_made_of_another_and_dense_of_any(saved, kind, tmp_path):
    dense = convert(saved, tmp_path / "dense", dtype="float32")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    want = dequantised(stored(saved))
    for name, tensor in stored(dense).items():
        torch.testing.assert_close(tensor, want[name].float(), rtol=1e-6, atol=0, msg=name)
    other = "int4" if kind == "int8" else "int8"
    assert_same(
        load_model(convert(saved, tmp_path / "other", quantize=other), quantize="stored"),
        load_model(saved, quantize=other),
    )
    kept = convert(saved, tmp_path / "kept", max_shard_bytes=20_000)
    assert_same(load_model(kept, quantize="stored"), load_model(saved, quantize="stored"))


def test_pieces_of_many_sizes_make_the_same_files(tmp_path, kind, monkeypatch):
    format, options = kind.split()[0], KINDS[kind]
    source = save_model(tiny(replace(GROUPS, vocab_size=300), torch.bfloat16), tmp_path / "source")
    want = convert(source, tmp_path / "want", quantize=format, **options)
    monkeypatch.setattr(tensorfile, "PIECE", 1)
    got = convert(source, tmp_path / "got", quantize=format, **options)
    assert (got / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    assert_same(load_model(got, quantize="stored"), load_model(want, quantize="stored"))
    assert_same(load_model(got), load_model(want))


def test_the_command_says_what_it_writes(tmp_path, capsys):
    source = save_model(tiny(GROUPS, torch.bfloat16), tmp_path / "source")
    words = ["convert", str(source), str(tmp_path / "target"), "--quantize", "int4", "--asymmetric"]
    assert main([*words, "--dry-run"]) == 0
    assert "I32" in capsys.readouterr().out
    assert not (tmp_path / "target").exists()
    assert main(words) == 0
    assert_same(load_model(tmp_path / "target", quantize="stored"), packed("int4 asymmetric"))


def test_inspect_counts_weights_and_finds_nothing_odd(saved, kind):
    report = inspect_model(str(saved))
    assert report.disagreements == ()
    (share,) = report.stored.format_shares.items()
    assert share[0] == kind.split()[0] and 0.8 < share[1] < 1
    assert (
        report.stored.bytes
        < 0.8 * inspect_model(str(save_model(tiny(GROUPS, torch.bfloat16), saved / "d"))).stored.bytes
    )


@pytest.mark.parametrize("config", [GROUPS, replace(GROUPS, tie_embeddings=True), replace(GROUPS, ffn_dim=48), CONFIG])
def test_models_with_weights_that_stay_dense_come_back(config, tmp_path):
    source = save_model(tiny(config, torch.bfloat16), tmp_path / "source")
    target = convert(source, tmp_path / "target", quantize="int4")
    assert_same(load_model(target, quantize="stored"), load_model(source, quantize="int4"))
    assert inspect_model(str(target)).disagreements == ()


def test_compressed_tensors_reads_our_files_as_we_do(saved, kind, tmp_path):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    settings = json.loads((saved / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(settings)
    tensors, dense = stored(saved), stored(save_model(load_model(saved, dtype=torch.float32), tmp_path / "dense"))
    compressor = compressors.BaseCompressor.get_value_from_registry(settings["format"])
    for name, group in ((DOWN, 128), (GATE, 64), (EXPERT, 32)):
        parts = {n.removeprefix(f"{name.removesuffix('weight')}"): t for n, t in tensors.items() if n.startswith(name)}
        scheme = next(scheme for scheme in config.config_groups.values() if scheme.weights.group_size in (group, None))
        got = compressor.decompress(parts, scheme)["weight"]
        torch.testing.assert_close(got.float(), dense[name], rtol=1e-2, atol=0)  # its product is rounded to bfloat16


# Bad input


def refused(directory, change, **options) -> str:
    rewrite(directory, change)
    with pytest.raises(ValueError) as caught:
        load_model(directory, **options)
    return str(caught.value)


@pytest.mark.parametrize("quantize", ["stored", None, "int4"])
@pytest.mark.parametrize("kind", ["int8", "int4"], indirect=True)
def test_a_quantised_weight_without_scales_is_named(saved, kind, quantize):
    message = refused(saved, lambda t: t.pop(f"{EXPERT}_scale"), quantize=quantize)
    assert f"missing: {EXPERT}_scale, the scales of an {kind} weight [64, 32]" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.update({f"{DOWN}_scale": torch.ones(64, 8)}),
            "_scale is [64, 8], its weight [64, 256] needs [64, 2]",
        ),
        (
            lambda t: t.update({f"{DOWN}_scale": t[f"{DOWN}_scale"].double()}),
            "_scale is F64; scales are F32 or BF16 or F16",
        ),
        (lambda t: t.update({f"{DOWN}_zero_point": torch.ones(64, 2).int()}), "_zero_point is [64, 2] of I32"),
        (lambda t: t.update({f"{DOWN}_zero_point": torch.ones(8, 2)}), "_zero_point is [8, 2] of F32"),
        (lambda t: t.update({f"{DOWN}_packed": torch.ones(64, 32)}), "_packed is F32; int4 weights are packed in I32"),
        (lambda t: t.update({f"{DOWN}_packed": torch.ones(64, 31).int()}), "is [64, 248], config.json says [64, 256]"),
        (lambda t: t.update({f"{DOWN}_g_idx": torch.ones(256).int()}), f"extra: {DOWN}_g_idx"),
        (lambda t: t.pop(f"{DOWN}_packed"), f"{DOWN}_scale has no weight"),
    ],
)
def test_parts_that_do_not_fit_are_named(int4, change, says):
    assert says in refused(int4, change)


def test_zeros_beside_int8_are_refused(tmp_path):
    directory = save_model(packed("int8"), tmp_path / "model")
    message = refused(directory, lambda t: t.update({f"{GATE}_zero_point": torch.zeros(256, 1, dtype=torch.int8)}))
    assert f"extra: {GATE}_zero_point stands beside a weight [256, 64] of I8" in message


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", ["stored", None])
def test_scales_that_are_no_positive_numbers_are_named(saved, value, quantize):
    message = refused(saved, lambda t: t[f"{DOWN}_scale"].fill_(value), quantize=quantize)
    assert f"{DOWN}_scale holds scales that are not positive numbers" in message


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        (
            lambda t: t.pop(f"{EXPERT}_zero_point", 0),
            {},
            f"missing: {EXPERT}_zero_point, as config.json says symmetric",
        ),
        (lambda t: None, {"group_size": 0}, "_scale is of 128 columns each, config.json has group_size = "),
        (lambda t: None, {"group_size": None}, "_scale is of 128 columns each, config.json has group_size = "),
    ],
)
def test_weights_that_are_of_no_scheme_are_named(int4, change, settings, says):
    for group in config_groups(int4, settings).values():
        assert group["weights"]["symmetric"] is False
    assert says in refused(int4, change)
    assert says in refused(int4, change, quantize="stored")
    assert any(says in line for line in inspect_model(str(int4)).disagreements)


def config_groups(directory, settings):
    """Those of config.json, after `settings` were put into each scheme."""
    found = json.loads((directory / "config.json").read_text())["quantization_config"]
    for group in found["config_groups"].values():
        group["weights"] |= settings
    edit(directory, quantization_config=found)
    return found["config_groups"]


def test_zeros_in_some_experts_only_cannot_be_kept_but_load(int4):
    config_groups(int4, {"symmetric": True})
    message = refused(int4, lambda t: t.pop(f"{EXPERT}_zero_point"), quantize="stored")
    assert "model.layers.1.mlp.experts.down_proj are of several types, int4 and int4 with zeros" in message
    load_model(int4)


SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "gptq"}, "quant_method = 'gptq' in config.json; only 'fp8' or 'compressed-tensors'"),
        ({"quant_method": "awq", "bits": 4}, "quant_method = 'awq'"),
        ({}, "config_groups = None"),
        (
            {"config_groups": {"group_0": {"weights": None}}},
            "config_groups.group_0 in config.json describes no weights",
        ),
        ({"config_groups": {"a": {"weights": SCHEME | {"num_bits": 8}}}}, r"(pack-quantized, int, 8, group) is not"),
        (
            {"config_groups": {"a": {"weights": SCHEME | {"type": "float"}}}},
            r"(pack-quantized, float, 4, group) is not",
        ),
        ({"config_groups": {"a": {"weights": SCHEME | {"actorder": "group"}}}}, "actorder = 'group'"),
        ({"config_groups": {"a": {"weights": SCHEME}}, "format": "marlin-24"}, "(marlin-24, int, 4, group) is not"),
    ],
)
def test_other_quantisations_are_refused_by_name(int4, settings, says):
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    edit(int4, quantization_config=base | settings)
    with pytest.raises(ValueError) as caught:
        load_model(int4)
    assert says in str(caught.value)
    assert any(says in line for line in inspect_model(str(int4)).disagreements)


def test_asymmetric_is_a_kind_of_int4_only(tmp_path, capsys):
    source = save_model(tiny(), tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "t"), "--quantize", "int8", "--asymmetric"]) == 2
    assert "asymmetric: is a kind of int4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(tmp_path / "t"), "--quantize", "int8", "--dtype", "fp8"])
    assert "dtype = 'fp8' and quantize = 'int8'" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", ["int8", "int4"], indirect=True)
def test_nan_has_no_quantised_form(tmp_path, kind, capsys):
    model = tiny(GROUPS)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 2] = torch.nan
    source = save_model(model, tmp_path / "source")
    with pytest.raises(ValueError, match=f"{DOWN} holds NaN or infinity and has no {kind} form"):
        load_model(source, quantize=kind)
    assert main(["convert", str(source), str(tmp_path / "t"), "--quantize", kind]) == 2
    assert f"has no {kind} form" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_every_weight_that_a_format_takes_is_packed():
    model = packed("int4")
    assert all(layer.format == "int4" for _, layer in packable(model, "int4"))
