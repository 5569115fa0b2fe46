import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint.tiny import CONFIG, DENSE, MLA, assert_same, rewrite, shard, stored, tiny, tiny_fp8
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kogia import files
from kogia.checkpoint import hf
from kogia.checkpoint.directory import stored_tensors
from kogia.checkpoint.hf import load_config, load_model, resolve_model_dir, save_model
from kogia.model.config import IndexerConfig, MoEConfig, YarnConfig
from kogia.model.packed import pack
from kogia.text.tokenizer import train_bpe

SOFTMAX = MoEConfig(num_experts=4, topk=2, expert_dim=6, score="softmax", num_shared_experts=0, num_dense_layers=0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tiny(), tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tie_embeddings=True, num_mtp_layers=2),
        replace(
            CONFIG,
            attention=replace(
                MLA,
                q_lora_rank=None,
                rope_scaling=YarnConfig(factor=4.0, original_max_position=64, mscale_all_dim=0.707),
            ),
        ),
        replace(CONFIG, moe=replace(CONFIG.moe, num_shared_experts=0, num_dense_layers=0), num_mtp_layers=0),
        DENSE,
        replace(DENSE, attention=replace(DENSE.attention, qkv_bias=True), tie_embeddings=True),
        replace(CONFIG, attention=replace(MLA, indexer=IndexerConfig(num_heads=2, head_dim=6, topk=4))),
        replace(CONFIG, attention=replace(DENSE.attention, qk_norm=True), moe=SOFTMAX, num_mtp_layers=0),
        replace(CONFIG, attention=replace(MLA, q_lora_rank=None, q_lora_ranks=(5, 3)), tie_embeddings=True),
        replace(CONFIG, attention=replace(DENSE.attention, qk_norm=True), num_mtp_layers=2),
    ],
    ids=[
        "v3",
        "tied, two mtp",
        "v2-lite queries, yarn",
        "no shared expert",
        "llama",
        "qwen2 tied",
        "v3.2",
        "qwen3-moe",
        "own: ranks",
        "own: gqa",
    ],
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
    stacked = model.model.layers[1].mlp.experts.gate_up_proj.weight[2]
    assert torch.equal(stacked[0], tensors["model.layers.1.mlp.experts.2.gate_proj.weight"])
    assert torch.equal(stacked[1], tensors["model.layers.1.mlp.experts.2.up_proj.weight"])


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


# Interrupted saves.


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("bad")], ids=repr)
def test_an_interrupted_save_leaves_the_old_directory_and_no_debris(saved, monkeypatch, error):
    before = snapshot(saved)

    def interrupted(*args, **kwargs):
        raise error

    monkeypatch.setattr(hf, "write", interrupted)
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

    monkeypatch.setattr(files, "exchange", lambda a, b: False)  # a system that cannot swap two names at once
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save_model(tiny(seed=5), saved)
    assert snapshot(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("swaps", [True, False])
def test_only_what_killed_saves_left_is_removed(saved, monkeypatch, swaps):
    names = ("model.partial", "model.old", ".model.partial", ".model.0123456789abcdef", ".model.mine.tmp")
    others = [saved.with_name(name) for name in names] + [saved.with_name(".other.0123456789abcdef.tmp")]
    debris = [saved.with_name(f".model.0123456789abcde{i}.{what}") for i, what in enumerate(("tmp", "old"))]
    for place in (*others, *debris):
        shutil.copytree(saved, place)
    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
    model = tiny(seed=5)
    assert_same(load_model(save_model(model, saved)), model)
    assert sorted(saved.parent.iterdir()) == sorted([saved, *others])


def test_two_saves_at_once_leave_each_other_alone(saved):
    with files.replacing_directory(saved) as first:
        (first / "mine").touch()
        model = tiny(seed=5)
        assert_same(load_model(save_model(model, saved)), model)
        assert (first / "mine").exists()
    assert [p.name for p in saved.parent.iterdir()] == ["model"] and (saved / "mine").exists()


DIRECTORY_EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def saved_until(model, place: Path, events: int) -> int:
    """Save in a process that is killed at its `events`-th event on the file system; gives its wait status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    left = events

    def count(event, args):
        nonlocal left
        left -= event in DIRECTORY_EVENTS
        if left < 0:
            left = events + 1000  # the kill is an event, too
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_model(model, place)
    os._exit(0)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_save_killed_at_any_event_leaves_a_model_or_has_it_put_back(saved, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
    place, old, new = saved.with_name("place"), tiny(seed=7), load_model(saved)
    status, missing = 1, 0
    for events in range(60):
        save_model(old, place)
        status = saved_until(new, place, events)
        if not place.exists():
            missing += 1
            with pytest.raises(ValueError, match="stop"), files.replacing_directory(place):
                raise ValueError("stop")
        got = load_model(place)
        assert_same(got, old if torch.equal(got.lm_head.weight, old.lm_head.weight) else new)
        if status == 0:
            break
    assert status == 0 and torch.equal(got.lm_head.weight, new.lm_head.weight)
    assert events > 3 and bool(missing) != swaps
    save_model(old, place)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model", "place"]


FULL_DISK = """
import resource, sys
from kogia.checkpoint.hf import load_model, save_model

model = load_model(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # the kernel refuses to grow a file beyond it
try:
    save_model(model, sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [3000, 20_000], ids=["in the header", "in the data"])
def test_a_full_disk_is_an_os_error_and_the_old_directory_stays(saved, limit):
    before = snapshot(saved)
    command = [sys.executable, "-c", FULL_DISK, str(saved), str(limit)]
    message = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"model\.safetensors: could not be written \(File too large\); free some disk space", message)
    assert snapshot(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


# Several files.


def test_a_large_model_is_saved_in_shards_with_their_index(tmp_path):
    model = tiny(dtype=torch.bfloat16)
    one, many = save_model(model, tmp_path / "one"), save_model(model, tmp_path / "many", max_shard_bytes=5000)
    assert_same(load_model(many), model)
    assert_same(load_model(one), model)
    files = sorted(many.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) >= 3
    assert not (many / "model.safetensors").exists()
    index = json.loads((many / "model.safetensors.index.json").read_text())
    want = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == want
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored(many).values())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 5000
    assert all(torch.equal(tensor, stored(one)[name]) for name, tensor in stored(many).items())
    assert (one / "config.json").read_bytes() == (many / "config.json").read_bytes()


def test_saving_in_one_file_over_shards_leaves_no_index(tmp_path):
    save_model(tiny(), tmp_path / "model", max_shard_bytes=5000)
    save_model(tiny(seed=1), tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert_same(load_model(tmp_path / "model"), tiny(seed=1))


def test_every_tensor_lies_aligned_in_its_file(tmp_path):
    model = tiny_fp8()
    for tensor in stored_tensors(save_model(model, tmp_path / "model", max_shard_bytes=100_000)).values():
        size = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[tensor.dtype]
        assert tensor.offset % size == 0, tensor


@torch.no_grad()
def test_transformers_loads_our_shards_and_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # widths that their grouped products in bfloat16 need
    moe = replace(CONFIG, dim=16, moe=replace(CONFIG.moe, expert_dim=8), num_mtp_layers=0)
    for config in (moe, replace(DENSE, dim=16)):
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny(config, dtype).eval()
            directory = save_model(model, tmp_path / "model", max_shard_bytes=4000)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
            assert len(list(directory.glob("*.safetensors"))) > 1
            ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
            want = theirs(ids).logits[0].float()
            ours = model.logits(model(pack(ids.tolist()))).float()
            torch.testing.assert_close(
                ours, want, rtol=0, atol=(1e-5 if dtype == torch.float32 else 2e-2) * want.abs().max()
            )
