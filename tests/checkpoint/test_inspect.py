import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint.tiny import BLOCKS, CONFIG, DENSE, edit, rewrite, shard, tiny, tiny_fp8
from rich.console import Console

from kogia.checkpoint.hf import save_model
from kogia.checkpoint.inspect_table import print_presets, print_report
from kogia.checkpoint.inspection import Report, inspect_model
from kogia.cli import main
from kogia.model.config import GQAConfig, IndexerConfig, ModelConfig
from kogia.model.costs import num_params, weight_bytes
from kogia.model.facts import cache_name
from kogia.model.presets import PRESETS
from kogia.text.tokenizer import train_bpe


def saved(directory: Path, config: ModelConfig = CONFIG) -> Path:
    return save_model(tiny(config), directory / "model")


def lines(directory: Path) -> list[str]:
    return list(inspect_model(str(directory)).disagreements)


def printed(report: Report, width: int = 80) -> str:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        print_report(report, console)
    return capture.get()


def test_a_preset_has_the_figures_of_its_reports():
    report = inspect_model("DeepSeek-R1")
    costs = report.costs
    assert costs.active_share == pytest.approx(0.055, abs=5e-4)
    assert costs.active_params + costs.embedding_params == pytest.approx(37.55e9, rel=1e-3)
    assert sum(part.params for part in costs.parts) == costs.params
    assert sum(part.active for part in costs.parts) == costs.active_params
    assert [(cache_name(cached), cached.per_token) for cached in costs.cache_bytes] == [
        ("MLA", 70_272),
        ("the same, latent in FP8", 61 * 656),  # FlashMLA: 512 FP8, 4 scales of 4 bytes, 64 rotary numbers in bf16
        ("MHA", 61 * 2 * 128 * 128 * 2),
        ("GQA-8", 61 * 2 * 8 * 128 * 2),
        ("MQA", 61 * 2 * 128 * 2),
    ]
    assert list(costs.forward_flops) == [4096, 163840]
    assert costs.forward_flops[4096] == pytest.approx(250.5e9 / 3, rel=1e-3)
    fp8 = [cached for cached in inspect_model("deepseek-v3.2").costs.cache_bytes if cached.latent_fp8]
    assert [cached.per_token for cached in fp8] == [61 * (656 + 128 + 4)]


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_every_preset_add_up(name: str):
    costs = inspect_model(name, context=1000).costs
    assert sum(part.params for part in costs.parts) == costs.params
    assert sum(part.active for part in costs.parts) == costs.active_params
    assert list(costs.forward_flops) == [1000]
    for width in (80, 120):
        assert all(len(line) <= width for line in printed(inspect_model(name), width).splitlines())


def test_the_table_says_what_a_reader_looks_for():
    text = printed(inspect_model("deepseek-r1"))
    for words in (
        "671.03 B parameters, 36.63 B activated per token (5.5%)",
        "61: 3 dense, 58 of experts, then 1 of multi-token prediction",
        "MLA, 128 heads; query rank 1,536, key and value latent 512",
        "256 routed, 8 per token, 1 shared; 2,048 wide",
        "sigmoid, gates normalised, scaled by 2.5; 4 of 8 groups",
        "base 10,000; YaRN x 40 over 4,096",
        "with the input embedding                           5.6%     37.55 B",
        "MLA (this model)            70.3 KB         11.51 GB       1 x",
        "MHA                         4.00 MB        654.98 GB    56.9 x",
        "training (forward and backward)   250.45 G       1.45 T",
    ):
        assert words in text
    assert "Files" not in text and "agree" not in text
    llama = printed(inspect_model("llama-3.1-8b"))
    assert "base 500,000; Llama 3 scaling x 8 over 8,192" in llama and "activated" not in llama


def test_without_a_model_the_presets_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect"]) == 0
    rows = {words[0]: words[1:] for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    assert set(PRESETS) <= set(rows)
    assert " ".join(rows["deepseek-r1"]) == "671.03 B 36.63 B 1.37 TB 163,840 11.51 GB"
    assert " ".join(rows["llama-3.1-8b"]) == "8.03 B 16.06 GB 131,072 17.18 GB"
    reports = [inspect_model(name) for name in PRESETS]
    console = Console(width=80, highlight=False, color_system=None)
    with console.capture() as capture:
        print_presets(reports, console)
    text = capture.get()
    assert all(len(line) <= 80 for line in text.splitlines()) and all(text.count(f" {name} ") == 1 for name in PRESETS)


def test_the_list_of_presets_takes_context_and_json(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "--context", "1000", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    assert [each["name"] for each in listed] == list(PRESETS)
    assert {each["context"] for each in listed} == {1000}
    assert listed[0]["weight_bytes"] == weight_bytes(PRESETS[listed[0]["name"]])
    assert main(["inspect", "--context", "0"]) == 2


@pytest.mark.parametrize(
    "config",
    [
        replace(BLOCKS, num_mtp_layers=2),
        replace(BLOCKS, moe=replace(BLOCKS.moe, score="softmax", num_shared_experts=0, num_groups=1)),
        replace(BLOCKS, attention=replace(BLOCKS.attention, q_lora_rank=None)),
        replace(BLOCKS, attention=replace(BLOCKS.attention, indexer=IndexerConfig(num_heads=2, head_dim=8, topk=4))),
        replace(BLOCKS, attention=GQAConfig(num_heads=6, num_kv_heads=2, head_dim=50, qkv_bias=True)),
        replace(DENSE, dim=200, ffn_dim=140),
    ],
)
def test_weights_take_the_memory_that_a_real_model_takes(config: ModelConfig):
    models = {"float32": tiny(config), "bfloat16": tiny(config, torch.bfloat16), "fp8": tiny_fp8(config)}
    taken = {dtype: sum(t.nbytes for t in model.state_dict().values()) for dtype, model in models.items()}
    assert weight_bytes(config) == taken


def test_a_preset_shows_what_its_weights_take_in_each_dtype():
    text = printed(inspect_model("deepseek-r1"))
    for words in (
        "float32                      2.73 TB       2 x",
        "bfloat16, float16            1.37 TB       1 x",
        "FP8, blocks of 128 x 128   684.87 GB   0.502 x",
    ):
        assert words in text
    copies = 2 * 2 * 129280 * 7168  # the published files hold embedding and head a second time
    assert weight_bytes(PRESETS["deepseek-r1"])["fp8"] + copies == pytest.approx(688.6e9, rel=1e-4)
    assert inspect_model("llama-3-8b").costs.weight_bytes["bfloat16"] == 2 * 8_030_261_248


def test_json_holds_the_same_figures(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "qwen3-30b-a3b", "--json", "--context", "8192"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["name"], data["params"], data["mtp_params"]) == ("qwen3-30b-a3b", 30_532_122_624, 0)
    assert list(data["forward_flops"]) == ["4096", "8192"]
    assert data["cache_bytes"]["GQA-4"] == 2 * 4 * 128 * 48 * 2
    parts = {part.pop("name"): part for part in data["parts"]}
    assert list(parts) == ["embedding and head", "attention", "routed experts", "router", "norms"]
    assert parts["router"] == {"params": 48 * 128 * 2048, "active": 48 * 128 * 2048}
    assert data["config"]["attention"]["qk_norm"] is True
    assert "stored" not in data


def test_a_preset_takes_no_torch_and_little_time():
    code = (
        "import sys; from kogia.cli import main; status = main(['inspect', 'deepseek-v3']);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    best = 60.0
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    assert best < 4  # about 0.25 s; the margin is for a slow and busy machine


def test_a_lone_config_is_read_without_torch(tmp_path: Path):
    directory = saved(tmp_path)
    (directory / "model.safetensors").unlink()
    command = f"main(['inspect', {str(directory)!r}])"
    code = f"import sys; from kogia.cli import main; {command}; assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "MLA, 3 heads; query rank 6" in out and "Files" not in out


def test_what_we_save_agrees_with_its_config(tmp_path: Path):
    for config in (CONFIG, DENSE, replace(CONFIG, tie_embeddings=True)):
        report = inspect_model(str(saved(tmp_path, config)))
        assert report.disagreements == () and report.config == config
        assert report.stored is not None and report.stored.num_files == 1
        assert report.costs.params == num_params(config)
    assert "config.json and tensors agree" in printed(report)
    fp8 = save_model(tiny_fp8(), tmp_path / "fp8")
    shard(fp8)
    report = inspect_model(str(fp8))
    assert report.disagreements == () and report.stored is not None and report.stored.num_files == 3
    assert 0.5 < report.stored.format_shares["fp8"] < 1
    assert report.stored.bytes == sum(
        (file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little"))
        for file in fp8.glob("*.safetensors")
    )


def test_a_directory_exits_with_1_where_it_disagrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = saved(tmp_path)
    assert main(["inspect", str(directory)]) == 0
    edit(directory, vocab_size=20)
    assert main(["inspect", str(directory)]) == 1
    assert "vocab_size = 20, but the embedding has 19 rows" in capsys.readouterr().out
    assert main(["inspect", str(directory), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["disagreements"][0].startswith("vocab_size = 20")


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"hidden_size": 12}, "hidden_size = 12, but the embedding is 10 wide"),
        ({"num_hidden_layers": 5, "num_nextn_predict_layers": 0}, "num_hidden_layers = 5, but 3 layers are stored"),
        ({"n_routed_experts": 8}, "n_routed_experts = 8, but 4 experts per layer are stored"),
        (
            {"n_routed_experts": 8},
            "missing: model.layers.1.mlp.experts.4.gate_proj.weight [6, 10], and 7 more like it",
        ),
        (
            {"num_nextn_predict_layers": 0},
            "num_nextn_predict_layers = 0, but 1 multi-token-prediction module(s) are stored",
        ),
        (
            {"num_nextn_predict_layers": 2},
            "num_nextn_predict_layers = 2, but 1 multi-token-prediction module is stored",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config announces 'fp8', but no tensor is quantised",
        ),
        (
            {"torch_dtype": "bfloat16"},
            "torch_dtype = bfloat16, but 55 matrices are F32",
        ),
    ],
)
def test_a_field_that_the_tensors_contradict_is_named(tmp_path: Path, fields: dict[str, object], expected: str):
    directory = saved(tmp_path)
    edit(directory, **fields)
    assert expected in lines(directory)


def test_an_announced_module_that_is_absent_takes_one_line(tmp_path: Path):
    directory = saved(tmp_path, replace(CONFIG, num_mtp_layers=0))
    edit(directory, num_nextn_predict_layers=1)
    assert lines(directory) == ["num_nextn_predict_layers = 1, but no multi-token-prediction module is stored"]


def test_tensors_that_are_missing_extra_or_mis_shaped_are_listed_in_order(tmp_path: Path):
    directory = saved(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # old exports carry it
        tensors["model.layers.0.bonus.weight"] = torch.zeros(3)
        tensors["model.norm.weight"] = torch.zeros(11)

    rewrite(directory, change)
    assert lines(directory) == [
        "tie_word_embeddings = false, but no lm_head.weight is stored: is the head tied?",
        "extra: model.layers.0.bonus.weight [3]",
        "mis-shaped: model.norm.weight is [11], config.json says [10]",
        "missing: lm_head.weight [19, 10]",
    ]


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path: Path):
    directory = saved(tmp_path, replace(DENSE, tie_embeddings=True))
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert lines(directory) == []
    rewrite(directory, lambda t: t["lm_head.weight"][-1].add_(1))
    assert lines(directory) == [
        "tie_word_embeddings = true, but the stored lm_head.weight differs from the embedding: it is the head"
    ]


def test_fp8_without_its_scales_or_its_announcement_is_named(tmp_path: Path):
    directory = save_model(tiny_fp8(), tmp_path / "fp8")
    rewrite(directory, lambda t: t.pop("model.layers.0.self_attn.o_proj.weight_scale_inv"))
    edit(directory, quantization_config=None)
    found = lines(directory)
    assert any("tensors are FP8, but config.json has no quantization_config" in line for line in found)
    assert any("model.layers.0.self_attn.o_proj.weight_scale_inv" in line and "missing" in line for line in found)
    edit(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    assert "quantization_config.weight_block_size = [64, 64] in config.json; only [128, 128] is supported" in lines(
        directory
    )


def test_damaged_files_are_told_and_the_rest_still_shown(tmp_path: Path):
    directory = saved(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    report = inspect_model(str(directory))
    assert "damaged or truncated" in report.disagreements[0] and report.stored is None
    assert "MLA, 3 heads" in printed(report)
    file.rename(directory / "pytorch_model.bin")
    assert "pickled" in lines(directory)[0]


def test_the_tokenizer_is_held_against_the_embedding(tmp_path: Path):
    tokenizer = train_bpe(["say 1 2 3"], 270)
    config = replace(DENSE, vocab_size=tokenizer.vocab_size + 5, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    directory = save_model(tiny(config), tmp_path / "model", tokenizer)
    report = inspect_model(str(directory))
    assert report.disagreements == () and report.tokenizer is not None and report.tokenizer.has_template
    assert f"{tokenizer.vocab_size} ids, 5 rows of the embedding unused; BOS 0, EOS 1" in printed(report)
    edit(directory, eos_token_id=[2, 3], vocab_size=200)
    found = lines(directory)
    assert "eos_token_id = [2, 3] in config.json, the tokenizer's is 1" in found
    assert f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, vocab_size = 200" in found
    edit(directory, eos_token_id=[2, 1], vocab_size=config.vocab_size)
    assert lines(directory) == []
    (directory / "tokenizer.json").write_text("{")
    assert any("tokenizer.json" in line for line in lines(directory))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["deepseek-v33"], "no preset is named 'deepseek-v33'; did you mean 'deepseek-v3"),
        (["runs/nowhere"], "runs/nowhere: no such file or directory"),
        (["deepseek-v3", "--context", "0"], "context = 0: must be at least 1 token"),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", *argv]) == 2
    assert f"kogia: error: {message}" in capsys.readouterr().err
