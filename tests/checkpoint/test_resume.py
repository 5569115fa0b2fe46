import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kogia.checkpoint.hf import load_model
from kogia.checkpoint.resume import (
    ResumeState,
    checkpoints,
    latest_checkpoint,
    load_train_state,
    prune,
    restore_random,
    save_checkpoint,
)
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import Tokenizer, train_bpe

STATE = ResumeState({"loader": {"epoch": 2, "cursor": 7}}, {"w/exp_avg": torch.arange(3.0)})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a b a b"], 263)


@pytest.fixture(scope="module")
def model() -> Transformer:
    attention = MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    moe = MoEConfig(num_experts=4, topk=2, expert_dim=8)
    sizes = {"vocab_size": 264, "dim": 16, "num_layers": 2, "ffn_dim": 16, "num_mtp_layers": 1}
    built = build_model(ModelConfig(**sizes, attention=attention, moe=moe), seed=3)
    for router in built.routers():
        router.e_score_correction_bias.uniform_(-1, 1)
    return built


def test_a_checkpoint_gives_back_weights_biases_values_tensors_and_tokenizer_to_the_bit(tmp_path, model, tokenizer):
    path = save_checkpoint(tmp_path, 123, model, tokenizer, STATE)
    assert path == tmp_path / "checkpoints" / "step-000123" == latest_checkpoint(tmp_path)
    state = load_train_state(path)
    assert state.values["step"] == 123
    assert state.values["loader"] == STATE.values["loader"]
    assert torch.equal(state.tensors["w/exp_avg"], torch.arange(3.0))
    loaded = load_model(path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert Tokenizer.load(path).encode("a b") == tokenizer.encode("a b")
    suffixes = {Path(name).suffix for _, _, names in os.walk(path) for name in names}
    assert suffixes == {".json", ".safetensors"}, "no pickle anywhere"


def test_random_numbers_continue_where_they_were_when_saved(tmp_path, model, tokenizer):
    def draw() -> tuple:
        return np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    draw()
    path = save_checkpoint(tmp_path, 1, model, tokenizer, STATE)
    expected = [draw() for _ in range(3)]
    restore_random(load_train_state(path))
    assert [draw() for _ in range(3)] == expected
    # the type checker of the test run draws from Python's own generator, so that one is compared after a restore
    restore_random(load_train_state(path))
    numbers = [random.random() for _ in range(3)]
    random.seed(1)
    restore_random(load_train_state(path))
    assert [random.random() for _ in range(3)] == numbers


def test_only_the_newest_checkpoints_are_kept_in_numerical_order(tmp_path, model, tokenizer):
    for step in (999_999, 1_000_000, 5):
        save_checkpoint(tmp_path, step, model, tokenizer, STATE, keep=5)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]
    save_checkpoint(tmp_path, 1_000_001, model, tokenizer, STATE, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned_up(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path, 1, model, tokenizer, STATE)
    leftover = tmp_path / "checkpoints" / ".step-000002.0123456789abcdef.tmp"
    leftover.mkdir()
    (leftover / "config.json").write_text("{}")
    assert latest_checkpoint(tmp_path).name == "step-000001"
    save_checkpoint(tmp_path, 3, model, tokenizer, STATE)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000003"]


def test_what_a_kill_left_of_a_checkpoint_that_was_being_deleted_or_written_goes(tmp_path, model, tokenizer):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, tokenizer, STATE, keep=3)
    (tmp_path / "checkpoints" / "step-000001" / "model.safetensors").unlink()
    (tmp_path / "checkpoints" / ".step-000004.0123456789abcdef.tmp").mkdir()
    prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000002", "step-000003"]
    prune(tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()


def test_missing_and_truncated_training_state_are_errors_that_name_the_fix(tmp_path, model, tokenizer):
    with pytest.raises(ValueError, match="use it as `init`"):
        load_train_state(tmp_path)
    path = save_checkpoint(tmp_path, 1, model, tokenizer, STATE)
    tensors = path / "train_state" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"damaged or truncated.*delete .*step-000001"):
        load_train_state(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.clear(),
        lambda values: values["random"].pop("numpy"),
        lambda values: values["random"].update(python=[3, [1], None]),
        lambda values: values["random"].update(numpy=["MT19937", [2**70], 0, 0, 0.0]),
        lambda values: values.update(random=5),
    ],
)
def test_random_states_that_are_none_are_damage(tmp_path, model, tokenizer, change):
    path = save_checkpoint(tmp_path, 1, model, tokenizer, STATE)
    file = path / "train_state" / "state.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    before = random.getstate()
    with pytest.raises(ValueError, match=r"damaged or truncated .its random states.*delete .*step-000001"):
        load_train_state(path)
    assert random.getstate() == before


@pytest.mark.parametrize("value", [None, -1, 1.0, True, "3", 2**70, [3]])
def test_a_count_that_is_none_is_named(value):
    state = ResumeState({"loader": {"epoch": 2, "cursor": value}})
    assert state.count("loader", "epoch") == 2
    with pytest.raises(ValueError, match=r"loader\.cursor = .*must be a whole number"):
        state.count("loader", "cursor")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.gate.e_score_correction_bias", "lm_head.weight", "w/exp_avg"])
def test_what_is_not_finite_is_not_saved_and_the_older_checkpoint_stays(tmp_path, model, tokenizer, where, value):
    first = save_checkpoint(tmp_path, 1, model, tokenizer, STATE, keep=1)
    poisoned, moments = copy.deepcopy(model), {"w/exp_avg": torch.arange(3.0)}
    with torch.no_grad():
        (poisoned.state_dict() | moments)[where].view(-1)[2] = value
    with pytest.raises(FloatingPointError, match=rf"step-000002: {where} is not finite.*not saved.*step-000001"):
        save_checkpoint(tmp_path, 2, poisoned, tokenizer, ResumeState({}, moments), keep=1)
    assert checkpoints(tmp_path) == [first]
    (tmp_path / "new").mkdir()
    with pytest.raises(FloatingPointError, match="nothing is saved yet"):
        save_checkpoint(tmp_path / "new", 2, poisoned, tokenizer, ResumeState({}, moments))


def test_a_run_directory_that_is_gone_is_not_made_again(tmp_path, model, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"cannot save .*step-000001: .*run is gone, deleted or moved"):
        save_checkpoint(tmp_path / "run", 1, model, tokenizer, STATE)
    assert not (tmp_path / "run").exists()


FULL_DISK = """
import json, os, resource, sys
from pathlib import Path
from kogia.checkpoint.hf import load_model
from kogia.checkpoint.resume import ResumeState, save_checkpoint
from kogia.text.tokenizer import Tokenizer

run, limit = Path(sys.argv[1]), int(sys.argv[2])
first = run / "checkpoints" / "step-000001"
model, tokenizer = load_model(first), Tokenizer.load(first)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # from here on, the kernel refuses to grow a file beyond it
try:
    save_checkpoint(run, 2, model, tokenizer, ResumeState({}, {"x": model.lm_head.weight}))
except OSError as error:
    print(json.dumps({"errno": error.errno, "message": str(error)}))
"""


@pytest.mark.parametrize("limit", [200, 20_000])
def test_a_write_that_fails_leaves_the_older_checkpoint_and_no_partial_one(tmp_path, model, tokenizer, limit):
    first = save_checkpoint(tmp_path, 1, model, tokenizer, STATE)
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    failure = json.loads(result.stdout)
    assert "step-000002" in failure["message"]
    assert "step-000001 is intact" in failure["message"]
    assert "Free some space" in failure["message"]
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before
