"""Opening a model: one meaning of device, dtype and path for every program."""

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint

from kogia.checkpoint.config import DTYPES, SPELLINGS, dtype_name
from kogia.checkpoint.convert import convert
from kogia.checkpoint.hf import load_config, load_model, save_model
from kogia.checkpoint.open import open_model, pick_device, pick_dtype
from kogia.text.tokenizer import Tokenizer, train_bpe

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def half(saved):
    """The same model with bfloat16 weights."""
    return convert(saved, saved.parent / "half", dtype="bf16")


def test_auto_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu(half):
    assert load_model(half).dtype == torch.bfloat16
    assert open_model(half, device="cpu").model.dtype == torch.float32
    assert pick_dtype("auto", CPU) == pick_dtype("fp8", CPU) == torch.float32
    assert pick_dtype("auto", GPU) is pick_dtype("fp8", GPU) is None


@pytest.mark.parametrize("given", ["bfloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_spelled_as_people_spell_it(saved, given):
    assert open_model(saved, device="cpu", dtype=given).model.dtype == torch.bfloat16


def test_every_spelling_is_one_of_the_dtypes():
    assert set(SPELLINGS.values()) <= set(DTYPES)
    for spelling, name in SPELLINGS.items():
        assert pick_dtype(spelling, GPU) == pick_dtype(name, CPU) == getattr(torch, name)
    assert dtype_name(torch.half) == dtype_name("half") == "float16"


@pytest.mark.parametrize("dtype", ["float8", "int8", "", "bf 16", torch.float8_e4m3fn, torch.float64])
def test_another_dtype_is_refused_with_those_there_are(saved, dtype):
    with pytest.raises(ValueError, match=r"dtype = '.*': must be auto, float32, bfloat16, float16 or fp8"):
        open_model(saved, device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cpu0", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_may_be(saved, device):
    with pytest.raises(ValueError, match=rf"device = '{device}': not usable here .*; use auto, cpu or cuda"):
        open_model(saved, device=device)


def test_keeping_fp8_that_is_not_there_is_refused(saved):
    with pytest.raises(ValueError, match="holds no FP8 weights to keep; `--quantize fp8` rounds them"):
        open_model(saved, device="cpu", dtype="fp8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "int3"}, "quantize = 'int3': must be auto, none, fp8 or int8 or int4"),
        ({"dtype": "fp8", "quantize": "int4"}, "'fp8' keeps FP8 weights, and quantize = 'int4' does not"),
    ],
)
def test_another_way_to_quantise_is_refused(saved, options, says):
    with pytest.raises(ValueError, match=says):
        open_model(saved, device="cpu", **options)


def test_int8_and_int4_checkpoints_stay_packed_unless_all_is_to_be_dense(saved):
    for format in ("int8", "int4", "fp8"):
        directory = convert(saved, saved.parent / format, quantize=format)
        want = load_model(directory)
        for quantize, kept in (("auto", format != "fp8"), ("none", False), (format, True)):
            model = open_model(directory, device="cpu", quantize=quantize).model
            layer, dense = (each.model.layers[0].self_attn.kv_a_proj_with_mqa for each in (model, want))
            assert (layer.format == format) == kept
            torch.testing.assert_close(layer.dense_weight(torch.float32), dense.weight.float(), rtol=0.01, atol=1e-6)


def test_auto_is_the_gpu_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == pick_device(CPU) == CPU


def test_a_run_directory_opens_its_newest_checkpoint_and_says_which(saved, tmp_path):
    model, tokenizer, _ = open_model(saved, device="cpu")
    for step in (5, 40):
        save_model(model, tmp_path / "checkpoints" / f"step-{step:06d}", tokenizer)
    assert open_model(tmp_path, device="cpu").directory == tmp_path / "checkpoints" / "step-000040"
    assert open_model(str(saved), device="cpu").directory == saved


def test_a_tokenizer_of_another_model_is_refused_before_the_weights_are_read(saved, tmp_path):
    save_model(
        load_model(saved), tmp_path / "m", train_bpe(["abc abd bcd " * 50] + [chr(c) * 9 for c in range(200)], 600)
    )
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    known, has = load_config(saved).vocab_size, Tokenizer.load(tmp_path / "m").vocab_size
    assert has > known
    with pytest.raises(ValueError, match=rf"{has} tokens, the model only {known}; they do not belong together"):
        open_model(tmp_path / "m", device="cpu")
