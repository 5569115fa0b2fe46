"""What is wrong with a model directory is said in one message that names the file; nothing half-loaded comes back."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint.tiny import CONFIG, assert_same, edit, rewrite, shard, tiny
from safetensors.torch import load_file, save_file

from kogia.checkpoint.directory import resolve_model_dir, stored_tensors
from kogia.checkpoint.hf import load_model, read_rows, save_model
from kogia.checkpoint.open import open_model
from kogia.model.config import YarnConfig
from kogia.model.costs import num_params
from kogia.model.hf_config import config_from_hf
from kogia.model.hf_export import config_to_hf
from kogia.text.tokenizer import train_bpe

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "reference" / "hf_configs"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tiny(), tmp_path / "model")


def test_missing_extra_and_misshaped_tensors_are_reported_together(saved):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(7, 10)
        tensors["model.layers.0.self_attn.indexer.wk.weight"] = torch.zeros(2, 3)

    rewrite(saved, damage)
    with pytest.raises(ValueError, match="do not agree") as error:
        load_model(saved)
    text = str(error.value)
    assert "missing: model.norm.weight [10]" in text
    assert "mis-shaped: model.layers.1.mlp.experts.3.up_proj.weight is [7, 10], config.json says [6, 10]" in text
    assert "extra: model.layers.0.self_attn.indexer.wk.weight [2, 3]" in text
    assert str(saved) in text


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "model.gguf"]
)
def test_a_file_that_git_lfs_has_not_fetched_is_called_that(tmp_path, name):
    tokenizer = train_bpe(["a text of few words"], 300)
    directory = save_model(tiny(replace(CONFIG, vocab_size=tokenizer.vocab_size)), tmp_path / "model", tokenizer)
    file = directory / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"{name}: stands for a file that Git LFS has not fetched; `git lfs pull`"):
        open_model(file if name.endswith(".gguf") else directory)


def test_a_long_list_of_problems_is_cut_with_its_length(saved):
    edit(saved, num_hidden_layers=2, n_routed_experts=40)
    with pytest.raises(ValueError, match=r"\.\.\. and \d+ more"):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -50])
def test_a_truncated_weight_file_is_named(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or truncated"):
        load_model(saved)


def test_an_index_naming_a_missing_file_is_reported(saved):
    shard(saved)
    (saved / "model-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00001\.safetensors: missing"):
        load_model(saved)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", ""])
def test_a_shard_outside_the_directory_is_not_followed(saved, name):
    index = saved / "model.safetensors.index.json"
    save_file({"x": torch.zeros(1)}, saved.parent / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: shard name .* refusing"):
        load_model(saved)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "null", '{"weight_map": {"x": 3}}']
)
def test_a_broken_index_is_named(saved, text):
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: not (a weight index|valid JSON)"):
        load_model(saved)


@pytest.mark.parametrize("text", ["", '{"vocab_size": 3', "[1, 2]", "null", "\x00\x01"])
def test_a_broken_config_is_named(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_model(saved)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(index_topk=2048), "index_topk = 2048"),
        (dict(model_type="gpt2"), "'gpt2'.*deepseek_v3"),
        (dict(model_type=None), "None is not supported"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(topk_method="greedy"), "topk_method = 'greedy'"),
        (dict(scoring_func="softmax"), "scoring_func = 'softmax'"),
        (dict(rope_interleave=False), "rope_interleave = False"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(num_key_value_heads=1), "num_key_value_heads = 1"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope type 'linear'"),
        (dict(rope_scaling={"type": "yarn", "factor": 2, "truncate": False}), "truncate = False"),
        (dict(rope_scaling={"type": "yarn", "factor": 2}), "original_max_position_embeddings.*missing"),
        (dict(num_experts_per_tok=9), "topk = 9"),
        (dict(hidden_size="wide"), "hidden_size = 'wide'"),
        (dict(num_hidden_layers=None), "num_hidden_layers = None"),
    ],
)
def test_a_config_this_code_cannot_compute_is_refused_by_field(saved, fields, words):
    edit(saved, **fields)
    with pytest.raises(ValueError, match=words):
        load_model(saved)


@pytest.mark.parametrize("field", ["vocab_size", "kv_lora_rank", "n_routed_experts"])
def test_a_missing_config_field_is_named(field):
    data = config_to_hf(CONFIG)
    del data[field]
    with pytest.raises(ValueError, match=f"'{field}' is missing"):
        config_from_hf(data)


def test_a_path_without_a_model_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not a model.*config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"vocab_size": ' + "9" * 10_000 + "}"])
def test_json_made_to_exhaust_the_parser_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_model(saved)


def num_read() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("name, size", [("config.json", 200_000_000), ("model.safetensors.index.json", 200_000_000)])
def test_a_huge_json_file_is_refused_unread(saved, name, size):
    (saved / name).touch()
    os.truncate(saved / name, size)  # sparse: as long as it says, without its bytes
    before = num_read()
    with pytest.raises(ValueError, match=rf"{name}: 200 MB, over the limit"):
        load_model(saved)
    assert num_read() - before < 10_000_000


def test_a_file_is_not_a_model_directory(saved):
    for file in ("model.safetensors", "config.json"):
        with pytest.raises(ValueError, match=rf"{file}: a file; give the model directory"):
            load_model(saved / file)


def test_shards_without_an_index_are_not_guessed_together(saved):
    shard(saved).unlink()
    with pytest.raises(
        ValueError, match=r"model-00000\.safetensors \(3 files\) but no model\.safetensors\.index\.json"
    ):
        load_model(saved)


def test_pickled_weights_are_never_opened(saved):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(saved / "executed"),)

    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model\.bin\).*safetensors"):
        load_model(saved)
    assert not (saved / "executed").exists()


def test_code_beside_the_weights_is_not_run(saved):
    edit(saved, auto_map={"AutoModelForCausalLM": "modeling_trap.Trap"})
    (saved / "modeling_trap.py").write_text("import pathlib; pathlib.Path(__file__ + '.ran').touch()")
    load_model(saved)
    assert not (saved / "modeling_trap.py.ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_link_out_of_the_directory_is_not_followed(saved, name):
    outside = saved.parent / "outside"
    if name.endswith("index.json"):
        shard(saved)
    (saved / name).rename(outside)
    (saved / name).symlink_to("../outside")
    with pytest.raises(ValueError, match=rf"{name}: a link to .*outside, outside the model directory"):
        load_model(saved)


def test_a_link_to_a_shard_outside_is_not_followed(saved):
    shard(saved)
    (saved / "model-00001.safetensors").rename(saved.parent / "outside")
    (saved / "model-00001.safetensors").symlink_to(saved.parent / "outside")
    with pytest.raises(ValueError, match=r"model-00001\.safetensors: a link"):
        load_model(saved)


def test_links_within_the_directory_and_a_linked_directory_are_fine(saved):
    (saved / "model.safetensors").rename(saved / "weights")
    (saved / "model.safetensors").symlink_to("weights")
    (saved.parent / "alias").symlink_to(saved, target_is_directory=True)
    assert_same(load_model(saved.parent / "alias"), load_model(saved))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leads_nowhere_is_a_missing_file(saved, name):
    (saved / name).unlink()
    (saved / name).symlink_to(name)
    with pytest.raises(ValueError, match="missing|not a model"):
        load_model(saved)


def test_the_layout_of_the_hugging_face_cache_loads_and_bounds_its_links(saved):
    repository = saved.parent / "hub" / "models--deep--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    want = load_model(saved)
    for file in saved.iterdir():
        file.rename(blobs / f"{file.name}.sha")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}.sha")
    assert_same(load_model(snapshot), want)
    (blobs / "config.json.sha").rename(saved.parent / "hub" / "other")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../other")
    with pytest.raises(ValueError, match="outside the model directory"):
        load_model(snapshot)


def header(directory: Path, change) -> None:
    """Rewrite the header of the weight file, its data as it is."""
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(NORM), "begins at byte|header describes"),
        (lambda t: t[NORM].update(shape=[11]), "takes 44 bytes, not 40"),
        (lambda t: t[NORM].update(shape=[-10]), "shape"),
        (lambda t: t[NORM].update(shape=[10, True]), "shape"),
        (lambda t: t[NORM].update(shape="10"), "shape"),
        (lambda t: t[NORM].update(data_offsets=[0]), "values to unpack"),
        (lambda t: t[NORM].update(data_offsets=[0, 40]), "begins at byte"),
        (lambda t: t[NORM].update(data_offsets=[10**18, 10**18 + 40]), "begins at byte"),
        (lambda t: t[NORM].update(dtype="F4"), "unknown dtype 'F4'"),
        (lambda t: t.update({NORM: 3}), "subscriptable"),
        (lambda t: t[NORM].pop("dtype"), "dtype"),
    ],
)
def test_a_header_that_contradicts_its_file_is_damage(saved, change, words):
    header(saved, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: damaged or truncated \(.*({words})"):
        load_model(saved)


@pytest.mark.parametrize("length", [2**63, 200_000_000, 10**6])
def test_a_header_that_claims_to_be_huge_is_not_read(saved, length):
    file = saved / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    if length == 200_000_000:
        os.truncate(file, 300_000_000)
    with pytest.raises(ValueError, match="cannot hold a header of"):
        load_model(saved)


def test_a_file_that_shrinks_while_it_is_read_is_damage(saved):
    tensor = stored_tensors(saved)["lm_head.weight"]
    os.truncate(saved / "model.safetensors", tensor.offset + 5)
    with pytest.raises(ValueError, match=r"damaged or truncated \(it ends within lm_head\.weight\)"):
        read_rows(tensor, 0, 19)


def test_an_index_is_held_against_the_shards(saved):
    index = shard(saved)
    data = json.loads(index.read_text())
    data["weight_map"][NORM] = "model-00001.safetensors"
    data["weight_map"]["lm_head.weight"] = "model-00001.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"index\.json: .*is not in model-00001\.safetensors, where the index has it"):
        load_model(saved)


def test_a_tensor_in_two_shards_that_the_index_does_not_place_is_refused(saved):
    index = shard(saved, 2)
    for part in range(2):
        tensors = load_file(saved / f"model-{part:05d}.safetensors")
        save_file(tensors | {"twice": torch.ones(1)}, saved / f"model-{part:05d}.safetensors")
    with pytest.raises(ValueError, match=r"twice is in model-00000\.safetensors and in model-00001\.safetensors"):
        load_model(saved)
    assert index.is_file()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e5m2, torch.uint8])
def test_a_weight_of_the_wrong_type_is_named(saved, dtype):
    rewrite(saved, lambda t: t.update({NORM: t[NORM].to(dtype)}))
    with pytest.raises(ValueError, match=rf"wrong dtype: {NORM} is (I64|BOOL|F8_E5M2|U8)"):
        load_model(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_warned_of_by_name(tmp_path, capsys, value, dtype):
    model = tiny(dtype=dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj.weight[2, 1, 3, 5] = value
        model.lm_head.weight[-1, -1] = value
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype=torch.float32)
    message = "".join(capsys.readouterr().err.split())
    names = ("lm_head.weight", "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.2.shared_head.head.weight")
    assert "NaNorinfinitevaluesinlm_head.weight,model.layers.1.mlp.experts.2.up_proj.weight" in message, names
    assert torch.equal(loaded.lm_head.weight.isfinite(), model.lm_head.weight.isfinite())


def test_the_largest_finite_numbers_raise_no_warning(tmp_path, capsys):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny(dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight[0] = torch.finfo(dtype).max
            model.lm_head.weight[1] = torch.finfo(dtype).min
        load_model(save_model(model, tmp_path / "model"))
    assert capsys.readouterr().err == ""


def test_a_weight_that_overflows_float16_is_warned_of(tmp_path, capsys):
    model = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[0] = 1e5
    load_model(save_model(model, tmp_path / "model"), dtype=torch.float16)
    assert "NaN or infinite values in lm_head.weight" in " ".join(capsys.readouterr().err.split())


def test_a_long_list_of_weights_that_are_not_finite_is_cut(tmp_path, capsys):
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_model(save_model(model, tmp_path / "model"))
    assert re.search(r"and\s+\d+\s+more", capsys.readouterr().err)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method = 'awq'"),
        ({"quant_method": "fp8", "weight_block_size": [1, 32]}, r"weight_block_size = \[1, 32\]"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size = None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt = 'e5m2'"),
        ("int8", "quant_method = 'int8'"),
    ],
)
def test_another_quantisation_is_refused_by_its_name(saved, settings, words):
    edit(saved, quantization_config=settings)
    with pytest.raises(ValueError, match=words):
        load_model(saved)


# Published configurations.


def published(name: str) -> dict:
    file = PUBLISHED / f"{name}_config.json"
    if not file.is_file():
        pytest.skip("the published configurations are not part of this checkout")
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", ["deepseek-ai--DeepSeek-V3", "deepseek-ai--DeepSeek-R1"])
def test_the_published_v3_and_r1_configurations_parse(name):
    config = config_from_hf(published(name))
    assert num_params(config) == pytest.approx(671.03e9, rel=1e-4)
    assert config.attention.rope_scaling == YarnConfig(factor=40.0, original_max_position=4096)
    assert (config.moe.num_groups, config.moe.topk_groups, config.moe.routed_scale) == (8, 4, 2.5)
    assert (config.num_mtp_layers, config.max_position, config.moe.num_dense_layers) == (1, 163840, 3)
    assert config_from_hf(config_to_hf(config)) == config


def test_a_published_configuration_of_another_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="model_type = 'kimi_k2' is not supported"):
        config_from_hf(published("moonshotai--Kimi-K2-Instruct"))


@pytest.mark.parametrize("given", ["runs/demo", "runs", "runs/demo/base/checkpoints"])
def test_a_directory_that_holds_models_says_which(saved, tmp_path, given):
    for index, name in enumerate(("demo/base/checkpoints/step-10", "demo/student/checkpoints/step-5", "demo/notes")):
        stage = tmp_path / "runs" / name
        if name.endswith("notes"):
            stage.mkdir(parents=True)
            continue
        shutil.copytree(saved, stage)
        os.utime(stage / "config.json", (index, index))
    with pytest.raises(ValueError, match="not a model.*Models in it are") as error:
        resolve_model_dir(tmp_path / given)
    names, hint = str(error.value).partition("Models in it are ")[2].split("; ")
    newest = "demo/student" if "base" not in given else "demo/base/checkpoints/step-10"
    assert hint == f"give one of them, as {tmp_path / 'runs' / newest}, the newest"
    inside = ["demo/base", "demo/student"] if "base" not in given else ["demo/base/checkpoints/step-10"]
    assert names.split(", ") == [str((tmp_path / "runs" / each).relative_to(tmp_path / given)) for each in inside]
    assert resolve_model_dir(tmp_path / "runs" / newest).name.startswith("step-")
    with pytest.raises(ValueError, match="no such file or directory; .*Models in .* are") as error:
        resolve_model_dir(tmp_path / given / "stundet")
    assert str(error.value).endswith(f"Models in {tmp_path / given} are {names}; {hint}")
