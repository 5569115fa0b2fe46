"""What other tools write into `config.json` means here what it means to them."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint.fuzz import KINDS, mutated, outcome, written
from checkpoint.tiny import CONFIG, DENSE, edit, tiny

from kogia.checkpoint.hf import load_model, save_model
from kogia.model.hf_config import config_from_hf
from kogia.model.hf_export import config_to_hf

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

import parity  # noqa: E402


def check_against_transformers(architecture: str, fields: dict, directory: Path, monkeypatch) -> None:
    monkeypatch.setitem(parity.CASES[architecture], "case", fields)
    want = parity.theirs_logits(parity.build_theirs(architecture, "case", directory))
    ours = load_model(directory)
    assert parity.relative_difference(parity.packed_logits(ours), want) <= parity.LIMIT
    assert parity.relative_difference(parity.cached_logits(ours), want) <= parity.LIMIT
    again = load_model(save_model(ours, directory / "again"))
    torch.testing.assert_close(parity.packed_logits(again), parity.packed_logits(ours))


# Fields that say nothing, and fields that change the model


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_mrope=False, _attn_implementation_autoset=True, unsloth_version="2024.9", unsloth_fixed=True),
        dict(_model_name_or_path="Smollm2 135M 8k Lc100K Mix1 Ep2", unk_token_id=0),
        dict(temperature=0.6, top_p=0.95, task_specific_params=None, gradient_checkpointing=False),
        dict(transformers_weights="x", my_notes={"a": [1, "\x1b[31mred"]}, tokenizer_model_max_length=4096),
    ],
)
def test_fields_that_say_nothing_are_named_in_one_warning(tmp_path, capsys, fields):
    save_model(tiny(DENSE), tmp_path)
    want = load_model(tmp_path).config
    capsys.readouterr()
    edit(tmp_path, **fields)
    assert load_model(tmp_path).config == want
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "\x1b" not in message
    assert all(f"{name} = " in message for name in fields if name != "use_mrope")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "field, value",
    [
        ("use_mrope", True), ("final_logit_softcapping", 30.0), ("attention_chunk_size", 8192), ("logit_scale", 0.0625),
        ("partial_rotary_factor", 0.5), ("is_causal", False), ("compression_config", {"format": "pack-quantized"}),
        ("use_mrope", "false"), ("alibi", 1), ("query_pre_attn_scalar", 256), ("hidden_activation", "gelu"),
        ("clip_qkv", 8.0), ("num_kv_shared_layers", 10), ("rope_interleaved", True),
    ],
)  # fmt: skip
def test_fields_that_change_the_computation_are_refused_by_name(kind, field, value):
    with pytest.raises(ValueError, match=f"{kind}: {field} = .*change"):
        config_from_hf(config_to_hf(KINDS[kind]) | {field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_mrope", False), ("final_logit_softcapping", None), ("logit_scale", 1.0), ("partial_rotary_factor", 1),
        ("clip_qkv", None), ("num_kv_shared_layers", 0), ("rope_interleaved", False),
        ("is_causal", True), ("num_local_experts", 0), ("mrope_section", []), ("hidden_activation", "silu"),
        ("position_embedding_type", "rope"), ("sliding_window", None), ("index_topk", None),
    ],
)  # fmt: skip
def test_the_same_fields_pass_silently_where_they_change_nothing(capsys, field, value):
    data = config_to_hf(KINDS["llama"])
    assert config_from_hf(data | {field: value}) == config_from_hf(data)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "field, value", [("num_experts", 8), ("sliding_window", 4096), ("kv_lora_rank", 512), ("n_routed_experts", 64)]
)
def test_fields_of_a_format_that_is_read_here_are_no_bookkeeping_in_another(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        config_from_hf(config_to_hf(KINDS["llama"]) | {field: value})


# Optional fields

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"attn_factor": 1.0}, {"attn_factor": 0.5}, {"attention_factor": None}, {"attention_factor": 1.3},
        {"truncate": True}, {"mscale": 0.707}, {"mscale": 0.707, "mscale_all_dim": 0.5}, {"beta_fast": None},
        {"mscale": 0, "mscale_all_dim": 0.5}, {"attention_factor": 0.8, "mscale": 2.0, "mscale_all_dim": 1.0},
        {"finetuned": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["Qwen2", "DeepseekV3"])
def test_yarns_optional_fields_mean_what_transformers_reads(tmp_path, monkeypatch, architecture, fields):
    sizes = parity.V3 if architecture == "DeepseekV3" else parity.CASES["Qwen2"]["yarn"]
    case = sizes | {"rope_parameters": YARN | {k: v for k, v in fields.items() if v is not None}}
    monkeypatch.setitem(parity.CASES[architecture], "case", case)
    want = parity.theirs_logits(parity.build_theirs(architecture, "case", tmp_path))
    data = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path, rope_parameters=data["rope_parameters"] | fields)
    ours = load_model(tmp_path)
    assert parity.relative_difference(parity.packed_logits(ours), want) <= parity.LIMIT
    again = load_model(save_model(ours, tmp_path / "again"))
    torch.testing.assert_close(parity.packed_logits(again), parity.packed_logits(ours))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    if architecture == "DeepseekV3":
        theirs.set_experts_implementation("eager")
    assert parity.relative_difference(parity.theirs_logits(theirs), want) <= parity.LIMIT


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"attention_factor": "1"}, "attention_factor = '1'"), ({"truncate": 1}, "truncate = 1"),
        ({"factor": 0}, "factor = 0"), ({"beta_fast": float("nan")}, "beta_fast = nan"),
        ({"factor": None}, "factor.*missing"), ({"original_max_position_embeddings": 4096.5}, "4096.5"),
        ({"mrope_section": [16, 24, 24]}, "mrope_section"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"extrapolation_factor": 2.0}, "extrapolation_factor"), ({"rope_type": ["yarn"]}, "rope_type"),
        ({"factor": 0.5, "attention_factor": 2.0}, "attention_factor = 2.0"),
    ],
)  # fmt: skip
def test_a_rope_that_cannot_be_read_is_refused_by_its_field(fields, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf(config_to_hf(KINDS["llama"]) | {"rope_scaling": YARN | fields})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["absent", None])
def test_an_optional_field_that_says_nothing_loads_or_is_named(tmp_path, kind, value):
    save_model(tiny(KINDS[kind]), tmp_path)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    for name in data.keys() - {"model_type"}:
        changed = {key: item for key, item in data.items() if key != name}
        file.write_text(json.dumps(changed if value == "absent" else data | {name: None}))
        try:
            load_model(tmp_path)
        except ValueError as error:
            assert name in str(error), str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "field, value", [("eos_token_id", []), ("rope_theta", None), ("rope_scaling", {}), ("layer_types", None)]
)
def test_an_empty_field_is_as_good_as_none(field, value):
    data = config_to_hf(KINDS["llama"])
    without = {key: item for key, item in data.items() if key != field}
    assert config_from_hf(data | {field: value}) == config_from_hf(without)


@pytest.mark.parametrize("kind, fields", [("deepseek_v3", parity.V3), ("llama", parity.HEADS), ("qwen3", parity.HEADS)])
def test_what_a_format_leaves_out_is_what_transformers_takes(kind, fields):
    names = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "deepseek_v3": "DeepseekV3Config"}
    theirs = getattr(transformers, names[kind])().to_dict()
    required = {"moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "v_head_dim"}
    required |= {"qk_nope_head_dim", "qk_rope_head_dim", "vocab_size", "hidden_size", "intermediate_size"}
    required |= {"num_hidden_layers", "num_attention_heads"}
    short = {"model_type": kind} | {name: theirs[name] for name in required & theirs.keys()}
    full = {key: value for key, value in theirs.items() if key != "num_nextn_predict_layers"}
    ours, want = config_from_hf(short), config_from_hf(full)
    assert replace(ours, bos_id=0, eos_id=0) == replace(want, bos_id=0, eos_id=0)


# Types


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("llama", "tie_word_embeddings", "false"), ("llama", "rope_theta", True), ("llama", "layer_types", 5),
        ("deepseek_v3", "norm_topk_prob", "false"), ("deepseek_v3", "n_routed_experts", True),
        ("llama", "hidden_size", 2**40), ("llama", "rms_norm_eps", float("nan")), ("llama", "rope_scaling", 5),
        ("qwen3", "rms_norm_eps", 10**400), ("qwen3_moe", "num_hidden_layers", 10**9), ("llama", "rope_theta", "1e6"),
        ("qwen2", "use_sliding_window", 0), ("deepseek_v3", "topk_method", ["noaux_tc"]), ("llama", "hidden_act", {}),
        ("deepseek_v2", "moe_layer_freq", True), ("deepseek_v2", "routed_scaling_factor", float("inf")),
        ("llama", "eos_token_id", [1, "2"]), ("llama", "bos_token_id", [1]), ("llama", "initializer_range", -1),
        ("deepseek_v3", "first_k_dense_replace", 1.0), ("llama", "attention_bias", 0), ("qwen3", "head_dim", -4),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_is_refused_by_name(kind, field, value):
    with pytest.raises(ValueError, match=f"{field} = "):
        config_from_hf(config_to_hf(KINDS[kind]) | {field: value})


@pytest.mark.parametrize("value", [[], {}, None, 5, True, "\x1b[31mllama"])
def test_a_model_type_that_is_no_name_is_refused(value):
    with pytest.raises(ValueError, match="model_type = ") as error:
        config_from_hf(config_to_hf(DENSE) | {"model_type": value})
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_eps": float("nan")}, {"num_layers": 2**70}, {"attention": {"kind": ["mla"]}}, {"moe": {"num_groups": 0}},
        {"moe": {"routed_scale": float("inf")}}, {"init_std": 10**400}, {"attention": {"rope_theta": 0.0}},
        {"attention": {"rope_scaling": {"factor": 0.0}}}, {"attention": {"rope_theta": 1.0}},
        {"attention": {"rope_scaling": {"beta_slow": 1e-320}}}, {"norm_eps": -1e-6},
        {"attention": {"q_lora_ranks": [2**40, 1]}},
    ],
    ids=str,
)  # fmt: skip
def test_our_own_format_is_read_as_strictly(change):
    with pytest.raises(ValueError, match=next(iter(change)) + "|rope_scaling"):
        config_from_hf({"model_type": "kogia", "kogia": {"num_layers": 2} | change})


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_configurations_load_or_are_refused_in_words(tmp_path, kind):
    directory = written(tmp_path, kind)
    text = (directory / "config.json").read_text()
    draw = random.Random(f"seed of {kind}")
    seen = {outcome(directory, mutated(json.loads(text), draw)) for _ in range(60)}
    assert seen <= {"loaded", "refused"} and "refused" in seen


# The norms of the latents


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("fields", ["V2", "V3", "V32"])
def test_the_norms_of_the_latents_do_not_follow_rms_norm_eps(tmp_path: Path, monkeypatch, fields: str, eps: float):
    case = getattr(parity, fields) | {"rms_norm_eps": eps}
    check_against_transformers(f"Deepseek{fields}", case, tmp_path, monkeypatch)
    assert load_model(tmp_path).config.norm_eps == eps


def test_another_epsilon_of_the_latents_is_saved_under_our_own_name(tmp_path: Path):
    config = replace(CONFIG, attention=replace(CONFIG.attention, norm_eps=1e-3))
    save_model(tiny(config), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kogia"
    assert load_model(tmp_path).config == config
    layer = load_model(tmp_path).model.layers[0].self_attn
    assert layer.q_a_layernorm.eps == layer.kv_a_layernorm.eps == 1e-3
