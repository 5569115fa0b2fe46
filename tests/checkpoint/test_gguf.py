"""GGUF files as models: read against the library's own numbers, transformers' reading and llama.cpp's answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint.gguf_files import (
    CONFIGS,
    LLAMA,
    gguf,
    llama_cpp,
    random_blocks,
    read_entries,
    write_entries,
    write_gguf_model,
    write_model,
)
from checkpoint.tiny import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from kogia import cli
from kogia.checkpoint.config import ConvertConfig
from kogia.checkpoint.convert import convert, convert_to_gguf
from kogia.checkpoint.directory import load_config, stored_tensors
from kogia.checkpoint.gguf_file import read_gguf
from kogia.checkpoint.hf import load_model
from kogia.checkpoint.inspection import inspect_model
from kogia.checkpoint.open import open_model
from kogia.engine.request import SamplingParams
from kogia.inference.llm import LLM
from kogia.model.linear import Linear
from kogia.model.packed import pack

REQUIRED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
OTHERS = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "TQ2_0")
PROMPTS = [[5, 70, 8, 200, 31], [301, 12], [9] * 12]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, root):
    """(model directory, the same as a file, in float32)"""
    file = root / f"{request.param}-f32.gguf"
    if not file.exists():
        write_gguf_model(root, request.param)
    return root / request.param, file


def logits(model, ids):
    with torch.inference_mode():
        return model.logits(model(pack([ids])))


# Tensors --------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit(pair):
    directory, file = pair
    assert_same(load_model(file), load_model(directory))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-3.2", "qwen2", "qwen2-yarn", "qwen3", "qwen3moe"])
def test_a_file_is_computed_as_transformers_computes_it(root, name):
    transformers = pytest.importorskip("transformers")
    file = root / f"{name}-f32.gguf"
    if not file.exists():
        write_gguf_model(root, name)
    # of such a file transformers reads neither the scaling of rotary angles nor the width of qwen3's heads
    options = {"config": transformers.AutoConfig.from_pretrained(root / name), "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root, gguf_file=file.name, **options)
    model = load_model(file)
    for ids in PROMPTS:
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", REQUIRED + OTHERS)
def test_every_type_is_the_numbers_that_the_library_makes_of_it(root, tmp_path, kind):
    """In `ffn_down` [64, 256], of which 256 columns are a whole block of every type."""
    directory = write_model(tmp_path, "llama")
    config = json.loads((directory / "config.json").read_text())
    metadata, tensors = read_entries(root_file(root))
    wide = {"llama.feed_forward_length": 256}
    for layer in range(2):
        for name, shape in (("gate", (256, 64)), ("up", (256, 64)), ("down", (64, 256))):
            tensors[f"blk.{layer}.ffn_{name}.weight"] = np.zeros(shape, np.float32)
    packed = random_blocks((64, 256), kind, seed=1)
    plain = {"F32": np.float32, "F16": np.float16}
    if kind in plain:
        packed = np.random.default_rng(1).standard_normal((64, 256)).astype(plain[kind])
    file = write_entries(tmp_path / "a.gguf", metadata | wide, tensors | {"blk.1.ffn_down.weight": packed})
    reader = gguf.GGUFReader(file)
    (data,) = (t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(np.array(gguf.dequantize(data.data, data.tensor_type)).astype(np.float32))
    assert config["intermediate_size"] == 96
    model = load_model(file, dtype=torch.float32)
    torch.testing.assert_close(
        model.model.layers[1].mlp.down_proj.weight.data, expected, atol=0, rtol=0, equal_nan=True
    )
    assert inspect_model(str(file)).stored.dtypes[kind][0] == (21 if kind == "F32" else 1)


def root_file(root):
    return root / "llama-f32.gguf" if (root / "llama-f32.gguf").exists() else write_gguf_model(root, "llama")


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 63), count=st.integers(1, 64), name=st.sampled_from(["q_proj", "k_proj", "o_proj"]))
def test_any_rows_of_a_tensor_are_those_rows_of_the_whole(root, start, count, name):
    tensor = stored_tensors(root_file(root))[f"model.layers.0.self_attn.{name}.weight"]
    stop = min(tensor.num_rows, start + count)
    if start >= stop:
        return
    whole, part = bytearray(tensor.nbytes), bytearray((stop - start) * tensor.row_bytes)
    tensor.read_into(0, memoryview(whole))
    tensor.read_into(start, memoryview(part))
    assert part == whole[start * tensor.row_bytes : stop * tensor.row_bytes]


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_older_files_have_keys_and_values_of_latents_in_one_matrix(root, tmp_path, kind):
    directory = write_model(tmp_path, "deepseek-v3")
    file = convert_to_gguf(directory, tmp_path / "new.gguf", kind="f32")
    metadata, tensors = read_entries(file)
    model = load_model(directory)
    for layer in range(2):
        del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
        whole = model.model.layers[layer].self_attn.kv_b_proj.weight.data.numpy()
        ggml = gguf.GGMLQuantizationType[kind]
        tensors[f"blk.{layer}.attn_kv_b.weight"] = (gguf.quantize(whole, ggml), kind) if kind != "F32" else whole
    for name in ("key_length", "value_length"):
        metadata[f"deepseek2.attention.{name}"] = metadata.pop(f"deepseek2.attention.{name}_mla")
    metadata["deepseek2.attention.head_count_kv"] = 2
    old = load_model(write_entries(tmp_path / "old.gguf", metadata, tensors))
    assert old.config == model.config
    if kind == "F32":
        assert_same(old, model)
    else:
        difference = old.model.layers[0].self_attn.kv_b_proj.weight - model.model.layers[0].self_attn.kv_b_proj.weight
        assert 0 < difference.abs().max() < 2e-3


def test_parts_of_latents_may_be_of_different_types(root, tmp_path):
    directory = write_model(tmp_path, "deepseek-v3")
    metadata, tensors = read_entries(convert_to_gguf(directory, tmp_path / "new.gguf", kind="f32"))
    tensors["blk.0.attn_k_b.weight"] = tensors["blk.0.attn_k_b.weight"].astype(np.float16)
    mixed = load_model(write_entries(tmp_path / "mixed.gguf", metadata, tensors)).model.layers[0].self_attn.kv_b_proj
    whole = load_model(directory).model.layers[0].self_attn.kv_b_proj
    keys, values = mixed.weight.view(2, 64, -1).split(32, dim=1)
    expected = whole.weight.view(2, 64, -1)
    assert torch.equal(keys, expected[:, :32].half().float())
    assert torch.equal(values, expected[:, 32:])


# Out ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen3moe", "deepseek-v3"])
def test_a_written_file_holds_each_matrix_rounded_to_its_type(tmp_path, name, kind):
    directory = write_model(tmp_path, name)
    ours = load_model(convert_to_gguf(directory, tmp_path / "a.gguf", kind=kind), dtype=torch.float32)
    for (key, before), read in zip(load_model(directory).state_dict().items(), ours.state_dict().values(), strict=True):
        whole = before.dim() < 2 or key.endswith("mlp.gate.weight") or kind == "f32"
        if whole or kind in ("bf16", "f16"):
            dtype = torch.float32 if whole else {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
            assert torch.equal(read, before.to(dtype).float()), key
        else:
            assert (read - before).abs().max() <= before.abs().max() / 127, key


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen2-yarn"])
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_llama_cpp_says_the_same_greedy_tokens(tmp_path, name, kind):
    """In f32 but for ties within rounding. With q8_0 weights it rounds activations to 8 bits, which turns a few."""
    file = write_gguf_model(tmp_path, name, kind)
    theirs = llama_cpp(file, PROMPTS, 24)["tokens"]
    llm = LLM(file, device="cpu", dtype="float32")
    model = llm.model
    for prompt, tokens in zip(PROMPTS, theirs, strict=True):
        ids, count = list(prompt), 0
        for token in tokens:
            row = logits(model, ids)[-1]
            margin = float(row.max() - row[token])
            assert margin <= (1e-3 if kind == "f32" else 0.15), (count, margin)
            count += margin == 0
            ids.append(token)
        assert count >= (0.9 if kind == "f32" else 0.8) * len(tokens)


def test_modules_of_multi_token_prediction_are_left_out(tmp_path, capsys):
    from checkpoint.tiny import tiny

    from kogia.checkpoint.hf import save_model
    from kogia.text.tokenizer import Tokenizer

    directory = write_model(tmp_path, "deepseek-v3")
    config = replace(load_config(directory), num_mtp_layers=1)
    save_model(tiny(config), tmp_path / "mtp", Tokenizer.load(directory))
    file = convert_to_gguf(tmp_path / "mtp", tmp_path / "a.gguf")
    assert "1 module(s) of multi-token prediction" in capsys.readouterr().err
    assert load_config(file).num_mtp_layers == 0
    assert load_model(file).config.num_layers == 2


def test_fp8_weights_are_dequantised_on_the_way(tmp_path):
    convert(write_model(tmp_path, "deepseek-v3"), tmp_path / "fp8", dtype="fp8")
    written = load_model(convert_to_gguf(tmp_path / "fp8", tmp_path / "a.gguf", kind="f32"), dtype=torch.float32)
    assert_same(written, load_model(tmp_path / "fp8", dtype=torch.float32))


def test_a_file_may_be_written_in_another_type(root, tmp_path):
    again = convert_to_gguf(root_file(root), tmp_path / "a.gguf", kind="q8_0")
    assert inspect_model(str(again)).stored.dtypes["Q8_0"][0] == 16
    assert load_config(again) == load_config(root_file(root))


# Commands -------------------------------------------------------------------------------------------------------------


def test_a_file_converts_to_a_directory_that_transformers_reads(root, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert(root_file(root), tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), load_model(root / "llama"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = open_model(root / "llama").tokenizer
    assert theirs("The answer to 3 plus 4")["input_ids"] == ours.encode_raw("The answer to 3 plus 4")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_a_file_converts_to_any_type(root, tmp_path, dtype):
    convert(root_file(root), tmp_path / "out", dtype=dtype)
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_file_is_packed_at_load_as_the_directory_is(root, tmp_path, quantize):
    """llama.cpp's order of rows is undone before rows are rounded."""
    directory, file = root / "llama", root_file(root)
    packed = open_model(file, quantize=quantize, device="cpu").model
    assert_same(packed, open_model(directory, quantize=quantize, device="cpu").model)
    convert(file, tmp_path / "out", quantize=quantize)
    assert_same(open_model(tmp_path / "out", device="cpu").model, packed)
    assert any(layer.format == quantize for layer in packed.modules() if isinstance(layer, Linear))


def test_commands_take_a_file_where_they_take_a_directory(root, tmp_path, capsys):
    file = str(root_file(root))
    assert cli.main(["inspect", file]) == 0
    assert "F32" in capsys.readouterr().out
    out = tmp_path / "rows.jsonl"
    options = ["--max-tokens", "4", "--temperature", "0", "--device", "cpu"]
    assert cli.main(["generate", file, "--prompt", "1+1?", "--out", str(out), *options]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    params = SamplingParams(max_tokens=4, temperature=0)
    (same,) = LLM(root / "llama", device="cpu").chat([{"role": "user", "content": "1+1?"}], params)
    assert row["num_tokens"] == len(same.token_ids)
    assert row["text"] == same.text


def test_dry_runs_write_nothing(root, tmp_path, capsys):
    assert cli.main(["convert", str(root_file(root)), str(tmp_path / "a.gguf"), "--quantize", "q8_0", "--dry-run"]) == 0
    assert "Q8_0" in capsys.readouterr().out
    assert cli.main(["convert", str(root_file(root)), str(tmp_path / "out"), "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.gguf", "--dtype", "bf16"], "the types of a GGUF file are given by quantize"),
        (["out", "--quantize", "q8_0"], "a type of GGUF files; name one to write"),
    ],
)
def test_types_go_with_their_format(words, message):
    target, option, value = words
    with pytest.raises(ValueError, match=message):
        ConvertConfig("model", target, **{option.removeprefix("--"): value})


def test_only_a_gguf_file_is_overwritten(root, tmp_path):
    target = tmp_path / "a.gguf"
    target.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"exists already; .* --overwrite"):
        convert_to_gguf(root_file(root), target)
    convert_to_gguf(root_file(root), target, overwrite=True)
    assert len(read_gguf(target).entries) == 21
    directory = tmp_path / "b.gguf"
    directory.mkdir()
    with pytest.raises(ValueError, match="is no GGUF file"):
        convert_to_gguf(root_file(root), directory, overwrite=True)


def test_numbers_without_a_form_stop_the_writing_and_leave_nothing(tmp_path):
    from kogia.checkpoint.hf import save_model
    from kogia.text.tokenizer import Tokenizer

    directory = write_model(tmp_path, "llama")
    model = load_model(directory)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    save_model(model, directory, Tokenizer.load(directory))
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight exceeds float16's largest number"):
        convert_to_gguf(directory, tmp_path / "a.gguf", kind="f16")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    save_model(model, directory, Tokenizer.load(directory))
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight holds NaN or infinity"):
        convert_to_gguf(directory, tmp_path / "a.gguf", kind="q8_0")
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


def test_models_that_llama_cpp_has_no_form_for_are_refused(tmp_path):
    from checkpoint.tiny import tiny

    from kogia.checkpoint.hf import save_model
    from kogia.model.config import IndexerConfig
    from kogia.text.tokenizer import Tokenizer

    directory = write_model(tmp_path, "deepseek-v3")
    config = load_config(directory)
    sparse = replace(config, attention=replace(config.attention, indexer=IndexerConfig(2, 32, 8)))
    save_model(tiny(sparse), tmp_path / "sparse", Tokenizer.load(directory))
    with pytest.raises(ValueError, match="models of the kind deepseek_v32 have no GGUF form"):
        convert_to_gguf(tmp_path / "sparse", tmp_path / "a.gguf")
    assert LLAMA.attention.head_dim == 16
