"""`kogia convert` against loading and saving: the same tensors, without the model in between."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoint.tiny import BLOCKS, CONFIG, DENSE, assert_same, edit, rewrite, shard, stored, tiny, tiny_fp8
from safetensors.torch import load_file

from kogia.checkpoint import tensorfile
from kogia.checkpoint.convert import convert
from kogia.checkpoint.directory import load_config, stored_tensors
from kogia.checkpoint.hf import load_model, save_model
from kogia.cli import main
from kogia.model.config import IndexerConfig
from kogia.text.tokenizer import train_bpe

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = torch.float8_e4m3fn


def kogia(*words: object) -> int:
    return main(["convert", *map(str, words)])


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "fp8", "fp8 in shards"])
@pytest.mark.parametrize("config", [BLOCKS, replace(DENSE, tie_embeddings=True)], ids=["moe", "dense"])
def test_a_converted_checkpoint_is_the_loaded_model_saved(config, source, target, tmp_path):
    model = tiny_fp8(config) if source.startswith("fp8") else tiny(config, TYPES[source])
    save_model(model, tmp_path / "source")
    if "shards" in source:
        shard(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "target", dtype=target)
    want = save_model(load_model(tmp_path / "source", dtype=TYPES[target]), tmp_path / "want")
    assert_equal_tensors(stored(tmp_path / "target"), stored(want))
    assert json.loads((tmp_path / "target/config.json").read_text()) == json.loads((want / "config.json").read_text())
    assert_same(load_model(tmp_path / "target"), load_model(want))


@pytest.mark.parametrize(("spelled", "name"), [("bf16", "bfloat16"), ("half", "float16"), ("float", "float32")])
def test_a_dtype_may_be_spelled_as_people_spell_it(spelled, name, tmp_path):
    save_model(tiny(DENSE), tmp_path / "source")
    assert kogia(tmp_path / "source", tmp_path / "a", "--dtype", spelled) == 0
    convert(tmp_path / "source", tmp_path / "b", dtype=name)
    assert_equal_tensors(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    with pytest.raises(ValueError, match="dtype = 'float8': must be auto, float32, bfloat16, float16 or fp8"):
        convert(tmp_path / "source", tmp_path / "c", dtype="float8")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_quantises_the_matrices_of_v3_as_the_layers_do(dtype, tmp_path):
    attention = replace(BLOCKS.attention, indexer=IndexerConfig(num_heads=2, head_dim=136, topk=4))
    source = save_model(tiny(replace(BLOCKS, attention=attention), TYPES[dtype]), tmp_path / "source")
    target = convert(source, tmp_path / "target", dtype="fp8")
    before, after = stored(source), stored(target)
    quantized = {name for name, tensor in after.items() if tensor.dtype == FP8}
    assert {name.split(".")[-2] for name in quantized} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk",
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for name, tensor in before.items():
        if name in quantized:
            continue
        matrix = tensor.dim() > 1
        assert torch.equal(after[name], tensor.bfloat16() if matrix else tensor), name
        assert after[name].dtype == (torch.bfloat16 if matrix else tensor.dtype), name
    for name in quantized:
        weight, scale = before[name].float(), after[f"{name}_scale_inv"]
        for i, rows in enumerate(weight.split(128)):
            for j, block in enumerate(rows.split(128, 1)):
                want = block.abs().max() / 448
                torch.testing.assert_close(scale[i, j], want, rtol=1e-6, atol=0)
                q = after[name][i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float() * want
                # half a step of a 3-bit mantissa, or of the smallest subnormal
                assert ((q - block).abs() <= (block.abs() / 16).clamp(min=want * 2**-10) * 1.001).all(), name
    assert json.loads((target / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    kept = load_model(target, quantize="stored")
    assert_same(load_model(convert(target, tmp_path / "again", dtype="fp8"), quantize="stored"), kept)


def test_quantising_a_loaded_model_and_converting_its_files_agree(tmp_path):
    source = save_model(tiny(BLOCKS, torch.bfloat16), tmp_path / "source")
    want = save_model(tiny_fp8(BLOCKS), tmp_path / "want")
    assert_equal_tensors(stored(convert(source, tmp_path / "target", dtype="fp8")), stored(want))


def test_pieces_of_many_sizes_make_the_same_files(tmp_path, monkeypatch):
    """A tensor is cut at whole blocks however small the pieces are."""
    source = save_model(tiny(BLOCKS, torch.bfloat16), tmp_path / "source")
    want = convert(source, tmp_path / "want", dtype="fp8")
    dense = convert(want, tmp_path / "dense", dtype="float32")
    for piece in (1, 20_000):
        monkeypatch.setattr(tensorfile, "PIECE", piece)
        assert any(len(list(tensorfile.row_ranges(t))) > 1 for t in stored_tensors(source).values())
        assert_equal_tensors(stored(convert(source, tmp_path / f"fp8-{piece}", dtype="fp8")), stored(want))
        assert_equal_tensors(stored(convert(want, tmp_path / f"dense-{piece}", dtype="float32")), stored(dense))
        assert_same(load_model(want, quantize="stored"), load_model(tmp_path / f"fp8-{piece}", quantize="stored"))


@pytest.mark.parametrize("model", [tiny(dtype=torch.bfloat16), tiny_fp8()], ids=["bfloat16", "fp8"])
def test_without_a_dtype_files_are_merged_and_split_with_every_tensor_as_it_was(model, tmp_path):
    source = save_model(model, tmp_path / "source")
    edit(source, auto_map={"AutoModel": "modeling.Model"})
    want = stored(source)
    assert kogia(source, tmp_path / "split", "--shard-gib", 4e-6) == 0
    index = json.loads((tmp_path / "split/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert kogia(tmp_path / "split", tmp_path / "merged", "--shard-gib", 0) == 0
    for target in ("split", "merged"):
        assert_equal_tensors(stored(tmp_path / target), want)
        config = json.loads((source / "config.json").read_text())
        config.pop("auto_map")
        assert json.loads((tmp_path / target / "config.json").read_text()) == config
    assert sorted(p.name for p in (tmp_path / "merged").glob("model*")) == ["model.safetensors"]


def test_tokenizer_template_and_settings_travel_along(tmp_path):
    source = save_model(tiny(), tmp_path / "source", train_bpe(["a small whale dives deep"] * 3, 280))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_x.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"pickle")
    target = convert(source, tmp_path / "target", dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert {p.name for p in source.iterdir()} - {p.name for p in target.iterdir()} == {
        "modeling_x.py",
        "training_args.bin",
    }


def test_router_biases_and_copies_of_shared_tensors_are_kept(tmp_path):
    source = save_model(tiny(), tmp_path / "source")
    target = convert(source, tmp_path / "target", dtype="bfloat16")
    before, after = stored(source), stored(target)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(after[bias], before[bias])
    assert torch.equal(after["model.layers.2.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_a_checkpoint_whose_announced_mtp_is_absent_converts(tmp_path):
    source = save_model(tiny(), tmp_path / "source")
    rewrite(source, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.2.")])
    target = convert(source, tmp_path / "target", dtype="bfloat16")
    assert load_model(target).config == replace(CONFIG, num_mtp_layers=0)


def test_a_dry_run_prints_sizes_and_writes_nothing(tmp_path, capsys):
    source = save_model(tiny(BLOCKS), tmp_path / "source")
    assert kogia(source, tmp_path / "target", "--dtype", "fp8", "--shard-gib", 0.0005, "--dry-run") == 0
    out = capsys.readouterr().out
    target = convert(source, tmp_path / "real", dtype="fp8", max_shard_bytes=int(0.0005 * 2**30))
    sizes = {}
    for tensor in stored_tensors(target).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    assert f"to      {sum(sizes.values()) / 2**20:.2f} MiB: F8_E4M3 {sizes['F8_E4M3'] / 2**20:.2f} MiB, BF16" in out
    assert f"files   {len(list(target.glob('*.safetensors')))} with {len(stored(target))} tensors" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["real", "source"]


# Bad input


def test_an_existing_target_is_replaced_only_when_asked_and_only_a_model(tmp_path, capsys):
    source = save_model(tiny(), tmp_path / "source")
    target = save_model(tiny(seed=1), tmp_path / "target")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    assert kogia(source, target) == 2
    assert "target: exists already; choose another place, or replace it with --overwrite" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert kogia(source, target, "--overwrite", "--dtype", "bfloat16") == 0
    assert load_model(target).dtype == torch.bfloat16
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assert kogia(source, tmp_path / "home", "--overwrite") == 2
    assert "not just a model directory" in capsys.readouterr().err
    inner = shutil.copytree(source, target / "checkpoints" / "step-000001")
    assert kogia(inner, target, "--overwrite") == 2
    assert inner.is_dir()
    (tmp_path / "empty").mkdir()
    assert kogia(source, tmp_path / "empty") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "home", "source", "target"]


def test_a_checkpoint_converts_in_its_own_place(tmp_path):
    source = save_model(tiny(), tmp_path / "source")
    want = load_model(source, dtype=torch.bfloat16)
    assert kogia(source, source, "--overwrite", "--dtype", "bfloat16") == 0
    assert_same(load_model(source), want)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_source_is_named_and_nothing_is_written(tmp_path, capsys, name):
    source = save_model(tiny(), tmp_path / "source")
    (source / name).write_bytes((source / name).read_bytes()[:-9])
    assert kogia(source, tmp_path / "target") == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_source_that_does_not_fit_its_config_is_refused(tmp_path, capsys):
    source = save_model(tiny(), tmp_path / "source")
    edit(source, vocab_size=21)
    assert kogia(source, tmp_path / "target") == 2
    assert "mis-shaped: lm_head.weight is [19, 10], config.json says [21, 10]" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, words", [("fp8", "has no FP8 form"), ("float16", None), (None, None)])
def test_nan_is_refused_in_fp8_and_named_elsewhere(tmp_path, capsys, dtype, words):
    model, name = tiny(), "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 2] = torch.nan
    source = save_model(model, tmp_path / "source")
    status = kogia(source, tmp_path / "target", *(("--dtype", dtype) if dtype else ()))
    err = capsys.readouterr().err
    assert status == (2 if words else 0)
    assert name in err
    assert (words or "NaN or infinite values in") in err
    assert (tmp_path / "target").exists() == (not words)


def test_numbers_beyond_float16_are_refused_not_made_infinite(tmp_path, capsys):
    model = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[3, 2] = 70000.0
    source = save_model(model, tmp_path / "source")
    assert kogia(source, tmp_path / "target", "--dtype", "float16") == 2
    assert "lm_head.weight exceeds float16's largest number" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("words", [("--dtype", "bfloat16"), ("--dtype", "fp8"), ()])
def test_scales_that_are_no_positive_numbers_are_named(tmp_path, capsys, words):
    source, name = save_model(tiny_fp8(), tmp_path / "source"), "model.layers.0.mlp.up_proj.weight_scale_inv"
    rewrite(source, lambda t: t[name].fill_(-1))
    assert kogia(source, tmp_path / "target", *words) == 2
    assert f"{name} holds scales that are not positive numbers" in capsys.readouterr().err


def test_a_tokenizer_that_is_a_link_out_of_the_directory_is_not_copied(tmp_path, capsys):
    source = save_model(tiny(), tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert kogia(source, tmp_path / "target") == 2
    assert "tokenizer.json: a link to" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["secret", "source"]


@pytest.mark.parametrize("words", [("--shard-gib", "-1"), ("--dtype", "int4"), ("--dtyp", "fp8")])
def test_flags_that_make_no_sense_are_refused(tmp_path, words):
    source = save_model(tiny(), tmp_path / "source")
    with pytest.raises(SystemExit, match="2"):
        kogia(source, tmp_path / "target", *words)
    assert os.listdir(tmp_path) == ["source"]


def test_converted_files_open_with_the_formats_own_library(tmp_path):
    source = save_model(tiny_fp8(), tmp_path / "source")
    target = convert(source, tmp_path / "target", dtype="float32", max_shard_bytes=200_000)
    names = [name for file in sorted(target.glob("*.safetensors")) for name in load_file(file)]
    assert sorted(names) == sorted(stored_tensors(target))
    assert load_config(target) == BLOCKS
