"""`kogia convert --calibration` from a text file to a checkpoint, and what it refuses before it works."""

import json

import pytest
import torch
from checkpoint.tiny import GROUPS, stored

from kogia.checkpoint.convert import convert
from kogia.checkpoint.hf import load_model, save_model
from kogia.cli import main
from kogia.inference.calibrate import NUM_TOKENS, calibration_batches
from kogia.model.transformer import build_model
from kogia.text.tokenizer import train_bpe

WORDS = " ".join(f"the small whale {i} dives deep" for i in range(400))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([WORDS], 300)


@pytest.fixture
def source(tmp_path, tokenizer):
    config = type(GROUPS)(**{**vars(GROUPS), "vocab_size": 300, "max_position": 128})
    model = build_model(config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.linspace(-3, 3, len(parameter)).exp())
    return save_model(model, tmp_path / "source", tokenizer)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    return tmp_path / "text.jsonl"


def test_the_command_calibrates_and_writes_a_checkpoint_of_its_own(source, text, tmp_path, capsys):
    words = ["convert", str(source), "--quantize", "int4"]
    assert main([*words, "--calibration", str(text), str(tmp_path / "target")]) == 0
    assert "tensors are scaled" in capsys.readouterr().err
    plain = convert(source, tmp_path / "plain", quantize="int4")
    got, want = stored(tmp_path / "target"), stored(plain)
    assert got.keys() == want.keys()
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(got[norm], want[norm])
    dense = load_model(source)
    errors = []
    for directory in (tmp_path / "target", plain):
        model = load_model(directory)
        batch = next(calibration_batches(str(text), train_bpe([WORDS], 300), 128))
        with torch.no_grad():
            errors.append(float((model.logits(model(batch)) - dense.logits(dense(batch))).square().mean()))
    assert errors[0] < errors[1]


def test_batches_are_the_first_tokens_of_all_documents(tmp_path, tokenizer):
    rows = [{"text": "a small whale"}, {"messages": [{"role": "user", "content": "hi"}], "completion": "deep"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (batch,) = calibration_batches(str(file), tokenizer, 100)
    text = tokenizer.decode(batch.token_ids.tolist())
    assert "a small whale" in text and "hi\n" in text and "deep" in text
    long = tmp_path / "long.txt"
    long.write_text(WORDS * 60)
    batches = list(calibration_batches(str(long), tokenizer, 100))
    assert NUM_TOKENS - 1 <= sum(batch.num_tokens for batch in batches) <= NUM_TOKENS
    assert max(int(batch.segments.lengths.max()) for batch in batches) <= 100


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--quantize", "fp8"], "calibration: is for quantize = int8 or int4, not fp8"),
        (["--dtype", "bfloat16"], "calibration: is for quantize = int8 or int4, not None"),
    ],
)
def test_calibration_is_for_integers(source, text, tmp_path, words, says, capsys):
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(tmp_path / "t"), "--calibration", str(text), *words])
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_text_that_is_none_is_refused_before_the_model_runs(source, tmp_path, capsys):
    words = ["convert", str(source), str(tmp_path / "t"), "--quantize", "int4", "--calibration"]
    assert main([*words, str(tmp_path / "no.txt")]) == 2
    assert "no.txt" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("  \n")
    assert main([*words, str(tmp_path / "empty.txt")]) == 2
    assert "holds no text" in capsys.readouterr().err
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "letter").write_text("dear")
    assert main([*words, str(tmp_path / "empty.txt")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_checkpoint_published_in_fp8_is_calibrated(source, text, tmp_path):
    published = convert(source, tmp_path / "published", quantize="fp8")
    words = ["convert", str(published), str(tmp_path / "t"), "--quantize", "int4", "--calibration", str(text)]
    assert main(words) == 0
    assert any(name.endswith("weight_packed") for name in stored(tmp_path / "t"))
    dense = load_model(published)
    errors = []
    for directory in (tmp_path / "t", convert(published, tmp_path / "plain", quantize="int4")):
        model, batch = load_model(directory), next(calibration_batches(str(text), train_bpe([WORDS], 300), 128))
        with torch.no_grad():
            errors.append(float((model.logits(model(batch)) - dense.logits(dense(batch))).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_what_is_rounded_already_is_not_calibrated(source, text, tmp_path, capsys):
    packed = convert(source, tmp_path / "packed", quantize="int8")
    words = ["convert", str(packed), str(tmp_path / "t"), "--quantize", "int4", "--calibration", str(text)]
    assert main(words) == 2
    assert "holds int8 weights, which have been rounded already" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
