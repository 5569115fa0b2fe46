import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kogia.checkpoint import hf
from kogia.checkpoint.hf import load_config, load_model, resolve_model_dir, save_model
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.hf_config import config_from_hf, config_to_hf
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import train_bpe

MLA = MLAConfig(num_heads=3, q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=7)
CONFIG = ModelConfig(
    vocab_size=19, dim=10, num_layers=2, ffn_dim=14, attention=MLA, num_mtp_layers=1,
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=6, num_groups=2, topk_groups=1, routed_scale=2.5),
)  # fmt: skip
DENSE = replace(CONFIG, attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=4), moe=None, num_mtp_layers=0)
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "reference" / "hf_configs"


def tiny(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    model = build_model(config, seed=seed, dtype=dtype)
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    return model


def assert_same(ours: Transformer, theirs: Transformer) -> None:
    assert ours.config == theirs.config
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs.state_dict()[name].dtype, name
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tiny(), tmp_path / "model")


def edit(directory: Path, **fields: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(directory: Path, change) -> None:
    """Apply `change` to the stored tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path, parts: int = 3) -> Path:
    """Split the weights as the published checkpoints are; returns the index."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {name: f"model-{i % parts:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tie_embeddings=True, num_mtp_layers=2),
        replace(CONFIG, attention=replace(MLA, q_lora_rank=None, rope_scaling=YarnConfig(factor=4.0, original_max_position=64, mscale_all_dim=0.707))),
        replace(CONFIG, moe=replace(CONFIG.moe, num_shared_experts=0, num_dense_layers=0), num_mtp_layers=0),
        DENSE,
        replace(DENSE, attention=replace(DENSE.attention, qkv_bias=True), tie_embeddings=True),
    ],
    ids=["v3", "tied, two mtp", "v2-lite queries, yarn", "no shared expert", "llama", "qwen2 tied"],
)
def test_a_saved_model_comes_back_exactly(config, dtype, tmp_path):
    model = tiny(config, dtype)
    loaded = load_model(save_model(model, tmp_path / "model"))
    assert_same(loaded, model)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == config.tie_embeddings
    batch = pack([[3, 1, 4, 1, 5], [9, 2]])
    with torch.no_grad():
        assert torch.equal(loaded(batch), model.eval()(batch))


def test_router_biases_stay_float32_in_a_bfloat16_model(tmp_path):
    loaded = load_model(save_model(tiny(dtype=torch.bfloat16), tmp_path / "model"))
    assert loaded.routers()[0].e_score_correction_bias.dtype == torch.float32
    assert load_model(tmp_path / "model", dtype=torch.float32).dtype == torch.float32


def test_names_and_shapes_on_disk_are_the_published_ones(saved):
    with safe_open(saved / "model.safetensors", framework="pt") as handle:
        shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
    want = {
        "model.embed_tokens.weight": [19, 10],
        "lm_head.weight": [19, 10],
        "model.norm.weight": [10],
        "model.layers.0.mlp.gate_proj.weight": [14, 10],
        "model.layers.0.mlp.down_proj.weight": [10, 14],
        "model.layers.0.self_attn.q_a_proj.weight": [6, 10],
        "model.layers.0.self_attn.q_a_layernorm.weight": [6],
        "model.layers.0.self_attn.q_b_proj.weight": [3 * 9, 6],
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": [12, 10],
        "model.layers.0.self_attn.kv_a_layernorm.weight": [8],
        "model.layers.0.self_attn.kv_b_proj.weight": [3 * 12, 8],
        "model.layers.0.self_attn.o_proj.weight": [10, 21],
        "model.layers.1.mlp.gate.weight": [4, 10],
        "model.layers.1.mlp.gate.e_score_correction_bias": [4],
        "model.layers.1.mlp.experts.3.gate_proj.weight": [6, 10],
        "model.layers.1.mlp.experts.3.up_proj.weight": [6, 10],
        "model.layers.1.mlp.experts.3.down_proj.weight": [10, 6],
        "model.layers.1.mlp.shared_experts.down_proj.weight": [10, 6],
        "model.layers.2.enorm.weight": [10],
        "model.layers.2.hnorm.weight": [10],
        "model.layers.2.eh_proj.weight": [10, 20],
        "model.layers.2.shared_head.norm.weight": [10],
        "model.layers.2.embed_tokens.weight": [19, 10],
        "model.layers.2.shared_head.head.weight": [19, 10],
        "model.layers.2.mlp.experts.0.up_proj.weight": [6, 10],
    }
    assert {name: shapes.get(name) for name in want} == want
    assert not [name for name in shapes if "gate_up" in name or name.endswith("gate.load")]
    per_layer = 2 + 7  # norms and attention
    per_moe = 2 + 4 * 3 + 3
    assert len(shapes) == 3 + (per_layer + 3) + (per_layer + per_moe) + (per_layer + per_moe + 6)


def test_the_stacked_experts_hold_the_gate_before_the_up_projection(saved):
    tensors, model = load_file(saved / "model.safetensors"), load_model(saved)
    stacked = model.model.layers[1].mlp.experts.gate_up_proj[2]
    assert torch.equal(stacked[:6], tensors["model.layers.1.mlp.experts.2.gate_proj.weight"])
    assert torch.equal(stacked[6:], tensors["model.layers.1.mlp.experts.2.up_proj.weight"])


def test_saving_a_loaded_model_again_gives_the_same_bytes(saved, tmp_path):
    again = save_model(load_model(saved), tmp_path / "again")
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        assert (again / file).read_bytes() == (saved / file).read_bytes()


def test_the_tokenizer_travels_with_the_model(tmp_path):
    tokenizer = train_bpe(["a small whale dives deep"] * 3, 280)
    directory = save_model(tiny(), tmp_path / "model", tokenizer)
    assert type(tokenizer).load(directory).encode("a whale") == tokenizer.encode("a whale")


def test_sharded_weights_load_through_their_index(saved):
    want = load_model(saved)
    shard(saved)
    assert_same(load_model(saved), want)


def test_the_dtype_is_found_when_the_first_shard_holds_no_matrix(tmp_path):
    directory = save_model(tiny(dtype=torch.bfloat16), tmp_path / "model")
    index = shard(directory, 1)
    tensors = load_file(directory / "model-00000.safetensors")
    first = {"model.norm.weight": tensors.pop("model.norm.weight")}
    save_file(first, directory / "a.safetensors")
    save_file(tensors, directory / "b.safetensors")
    weight_map = {name: "b.safetensors" for name in tensors} | {"model.norm.weight": "a.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert load_model(directory).dtype == torch.bfloat16


def test_announced_but_absent_mtp_is_left_out(saved, capsys):
    rewrite(saved, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.2.")])
    assert load_model(saved).config == replace(CONFIG, num_mtp_layers=0)
    assert "multi-token prediction" in capsys.readouterr().err


def test_a_run_directory_means_its_newest_checkpoint(saved, tmp_path):
    run = tmp_path / "run"
    for step in (5, 20, 100):
        shutil.copytree(saved, run / "checkpoints" / f"step-{step:06d}")
    shutil.copytree(saved, run / "checkpoints" / "step-000999.partial")
    (run / "checkpoints" / "step-000500").mkdir()  # no config: not complete
    assert resolve_model_dir(run).name == "step-000100"
    assert load_config(run) == CONFIG


# Bad input: every message names the file and what is wrong with it.


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


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "null"])
def test_a_broken_index_is_named(saved, text):
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: not a weight index"):
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


def test_fp8_weights_are_named_and_their_config_still_parses(saved):
    edit(saved, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})

    def quantise(tensors):
        name = "model.layers.0.mlp.gate_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1, 1)

    rewrite(saved, quantise)
    assert load_config(saved) == CONFIG
    with pytest.raises(ValueError, match=r"FP8 weights are not supported yet.*gate_proj"):
        load_model(saved)


# Interrupted saves.


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("bad")], ids=repr)
def test_an_interrupted_save_leaves_the_old_directory_and_no_debris(saved, monkeypatch, error):
    before = snapshot(saved)

    def interrupted(*args, **kwargs):
        raise error

    monkeypatch.setattr(hf, "save_file", interrupted)
    with pytest.raises(type(error)):
        save_model(tiny(seed=5), saved)
    assert snapshot(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_failing_rename_puts_the_old_directory_back(saved, monkeypatch, call):
    before, calls, replace_ = snapshot(saved), [], os.replace

    def failing(source, target):
        if not Path(source).is_dir():  # the rename inside write_json
            return replace_(source, target)
        calls.append(source)
        if len(calls) == call:
            raise OSError("no")
        return replace_(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save_model(tiny(seed=5), saved)
    assert snapshot(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_debris_of_a_killed_save_does_not_stop_the_next_one(saved):
    for suffix in (".partial", ".old"):
        shutil.copytree(saved, saved.with_name(saved.name + suffix))
    model = tiny(seed=5)
    assert_same(load_model(save_model(model, saved)), model)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_full_disk_is_an_os_error(saved, monkeypatch):
    def full(*args, **kwargs):
        raise hf.SafetensorError("Error while serializing: IoError(Os { code: 28 })")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: could not be written"):
        save_model(tiny(), saved)


# Published configurations.


def published(name: str) -> dict:
    file = PUBLISHED / f"{name}_config.json"
    if not file.is_file():
        pytest.skip("the published configurations are not part of this checkout")
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", ["deepseek-ai--DeepSeek-V3", "deepseek-ai--DeepSeek-R1"])
def test_the_published_v3_and_r1_configurations_parse(name):
    config = config_from_hf(published(name))
    assert config.num_params() == pytest.approx(671.03e9, rel=1e-4)
    assert config.attention.rope_scaling == YarnConfig(factor=40.0, original_max_position=4096)
    assert (config.moe.num_groups, config.moe.topk_groups, config.moe.routed_scale) == (8, 4, 2.5)
    assert (config.num_mtp_layers, config.max_position, config.moe.num_dense_layers) == (1, 163840, 3)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    "name, kind", [("deepseek-ai--DeepSeek-V3.2", "deepseek_v32"), ("moonshotai--Kimi-K2-Instruct", "kimi_k2")]
)
def test_published_configurations_of_other_kinds_are_refused_by_name(name, kind):
    with pytest.raises(ValueError, match=f"model_type = '{kind}' is not supported"):
        config_from_hf(published(name))


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, attention=DENSE.attention),
        replace(CONFIG, moe=None, num_mtp_layers=0),
        replace(CONFIG, moe=replace(CONFIG.moe, score="softmax")),
    ],
)
def test_models_without_a_published_format_are_refused_on_saving(config, tmp_path):
    with pytest.raises(ValueError, match="no published format"):
        save_model(build_model(config), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
