"""GGUF files that are cut, damaged or not of the kinds read here: one clear error each, before anything is built."""

import struct
import subprocess
import sys

import numpy as np
import pytest
from checkpoint.gguf_files import read_entries, write_entries, write_gguf_model, write_model

from kogia import cli
from kogia.checkpoint.directory import load_config, resolve_model_dir, stored_tensors
from kogia.checkpoint.gguf_file import MAX_ITEMS, is_gguf, read_gguf
from kogia.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from kogia.checkpoint.hf import load_model, read_stored
from kogia.checkpoint.open import find_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_gguf_model(tmp_path_factory.mktemp("gguf"), "llama", "q8_0")


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return write_gguf_model(tmp_path_factory.mktemp("latent"), "deepseek-v3", "q8_0")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(entries: list[bytes], tensors: list[bytes] = (), *, version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(entries))
    return b"GGUF" + counts + b"".join(entries) + b"".join(tensors)


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = entry("general.architecture", 8, text("llama"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes, its header needs 4"),
        (b"GGUF", "has 4 bytes, its header needs 8"),
        (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
        (header([], version=1), "version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648; .*little endian"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(99),
            "says it has 9,223,372,036,854,775,808 tensors; more than 100,000",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1) + bytes(99),
            "18,446,744,073,709,551,615 metadata entries; more than 100,000",
        ),
        (b"GGUF" + struct.pack("<IQ", 3, 272), "it has 16 bytes, too few for the 272 tensors that it says it has"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 33), "it has 24 bytes, too few for the 33 metadata entries that"),
        (header([struct.pack("<Q", 2**62)]), "its header needs 4,611,686,018,427,387,936 at least"),
        (header([entry("a", 8, struct.pack("<Q", 2**64 - 1))]), "its header needs"),
        (header([entry("a", 9, struct.pack("<IQ", 6, 2**40))]), f"more than {MAX_ITEMS:,} in all"),
        (header([entry("a", 9, struct.pack("<IQ", 8, 3_000_000))]), "its header needs"),
        (
            header([entry("a", 9, struct.pack("<IQ", 9, 1)) + bytes(60)]),
            "a is of the unknown type 9; known are 0 to 12",
        ),
        (header([entry("a", 77, bytes(8))]), "a is of the unknown type 77"),
        (header([entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "no UTF-8"),
        (header([entry("a\x1b[2J", 7, b"\1")]), r"'a\\x1b\[2J' is no name"),
        (header([entry("a", 7, b"\1")] * 2), "a is there twice"),
        (header([], [tensor("t", (1,) * 9)]), "t has 9 axes; a tensor has 4 at most"),
        (header([], [tensor("t", (2**40,))]), r"t has the shape \[1099511627776\]"),
        (header([], [tensor("t", (0, 4))]), r"t has the shape \[0, 4\]; an axis has 1 to"),
        (header([], [tensor("t", (4,), offset=2**50)]), "t begins at byte 1,125,899,906,842,.*and the file has"),
        (header([entry("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment = 0; it must be 1 to"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(tmp_path, data, message):
    file = tmp_path / "a.gguf"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_gguf(file)
    assert str(file) in str(caught.value)
    assert "copy or download it again" in str(caught.value)


def test_a_file_that_is_cut_anywhere_is_refused(sound, tmp_path):
    data, file = sound.read_bytes(), tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, len(data), 9_973), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: "):
            read_stored(file)


def test_a_file_that_shrinks_behind_its_header_is_refused(sound, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(sound.read_bytes())
    found = find_model(file)
    file.write_bytes(sound.read_bytes()[:-20_000])
    with pytest.raises(ValueError, match=r"a\.gguf: no sound GGUF file \(.* begins at byte .*, and the file has "):
        found.open()


@pytest.mark.parametrize("kind", [4, 15, 24, 31, 36, 4242, 2**32 - 1])
def test_types_that_are_removed_or_unknown_are_refused(tmp_path, kind):
    file = tmp_path / "a.gguf"
    file.write_bytes(header([ARCHITECTURE], [tensor("token_embd.weight", (32, 4), kind)]) + bytes(10_000))
    with pytest.raises(ValueError, match=rf"token_embd\.weight: its type {kind} is none that the gguf library"):
        stored_tensors(file)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((1024, 1024), 0, r"token_embd\.weight \[1024, 1024\] of F32 ends at byte 4,194,432 of 10,"),
        ((33, 4), 8, r"\[4, 33\] is no whole number of Q8_0 blocks of 32"),
        ((64,), 8, r"\[64\] is no whole number of Q8_0 blocks"),
        ((32, 32, 2**30), 0, "ends at byte 4,398,046,511,"),
    ],
)
def test_sizes_that_the_file_does_not_hold_are_refused(tmp_path, shape, kind, message):
    file = tmp_path / "a.gguf"
    file.write_bytes(header([ARCHITECTURE], [tensor("token_embd.weight", shape, kind)]) + bytes(10_000))
    with pytest.raises(ValueError, match=message):
        stored_tensors(file)


def test_more_experts_than_any_model_has_are_refused(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(header([ARCHITECTURE], [tensor("blk.0.ffn_up_exps.weight", (1, 1, 9_000), 1)]) + bytes(20_000))
    with pytest.raises(ValueError, match="9,000 experts, more than 4,096"):
        stored_tensors(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma3"}, "architecture 'gemma3' is not supported; known: llama, qwen2"),
        ({"split.count": 4}, "one of several files of a model; join them with"),
        ({"llama.attention.head_count": 5}, "blk.0.attn_q.weight .* is no 5 heads|num_key_value_heads"),
        ({"llama.attention.head_count": 0}, "head_count = 0: must be a positive whole number"),
        ({"llama.attention.head_count": "4"}, "head_count = '4': must be a positive whole number"),
        ({"llama.attention.head_count": [4, 4]}, r"head_count = \[4, 4\]: must be a positive whole number"),
        ({"llama.rope.dimension_count": 8}, "rotary parts of 8; only heads where all are equal"),
        ({"llama.block_count": 3}, "missing: model.layers.2."),
        ({"llama.block_count": 2_000}, "describes another model than the weights"),
        ({"llama.block_count": 2_000_000}, "num_hidden_layers = 2000000; it must be"),
        ({"llama.embedding_length": 128}, "mis-shaped: model.embed_tokens.weight"),
        ({"llama.feed_forward_length": None}, "field 'intermediate_size' is missing"),
        ({"llama.expert_count": 8}, "Mixtral"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window = 4096: changes what the model computes"),
        ({"llama.attention.causal": False}, "no model that writes text"),
        ({"llama.rope.scaling.type": "longrope"}, "rope type 'longrope' is not supported"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "rope type 'linear'"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta = nan"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer is of the kind 't5'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is missing, or no list of texts"),
        ({"tokenizer.ggml.tokens": ["a"]}, "token_type must have a number for each token"),
        ({"tokenizer.ggml.scores": [0.5]}, "scores must have a number for each token"),
        ({"tokenizer.ggml.eos_token_id": 99_999}, "eos_token_id = 99999: there are 460 tokens"),
        ({"tokenizer.chat_template": "x" * 1_000_001}, "at most 1,000,000 characters"),
    ],
)
def test_metadata_that_say_something_else_are_refused(sound, tmp_path, changes, message):
    metadata, tensors = read_entries(sound)
    changed = {name: value for name, value in (metadata | changes).items() if value is not None}
    file = write_entries(tmp_path / "a.gguf", changed, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        find_model(file).open()
    assert "a.gguf" in str(caught.value)


def test_what_nobody_knows_is_named_once_and_passed_over(sound, tmp_path, capsys):
    metadata, tensors = read_entries(sound)
    file = write_entries(tmp_path / "a.gguf", metadata | {"llama.of_tomorrow": 3}, tensors)
    find_model(file).open()
    assert capsys.readouterr().err.count("passed over: llama.of_tomorrow = 3") == 1


def test_tensors_without_a_place_are_named(sound, tmp_path):
    metadata, tensors = read_entries(sound)
    tensors["blk.0.ssm_a.weight"] = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"extra: blk\.0\.ssm_a\.weight \[4, 4\]"):
        load_model(write_entries(tmp_path / "a.gguf", metadata, tensors))


def test_halves_of_latents_that_do_not_fit_are_refused(latent, tmp_path):
    metadata, tensors = read_entries(latent)
    tensors["blk.0.attn_k_b.weight"] = np.zeros((3, 32, 32), np.float32)
    with pytest.raises(ValueError, match="are not the two parts of 2 heads"):
        stored_tensors(write_entries(tmp_path / "a.gguf", metadata, tensors))
    del tensors["blk.0.attn_k_b.weight"]
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.self_attn\.kv_b_proj"):
        load_model(write_entries(tmp_path / "b.gguf", metadata, tensors))


def test_stretched_wavelengths_of_other_models_are_refused(sound, tmp_path):
    metadata, tensors = read_entries(sound)
    tensors["rope_freqs.weight"] = np.full(8, 3.0, np.float32)
    with pytest.raises(ValueError, match="stretches wavelengths up to 3 times, not as Llama"):
        load_config(write_entries(tmp_path / "a.gguf", metadata, tensors))
    tensors["rope_freqs.weight"] = np.full((2, 4), 3.0, np.float32)
    with pytest.raises(ValueError, match="must be a vector of F32"):
        load_config(write_entries(tmp_path / "b.gguf", metadata, tensors))


def test_a_way_of_splitting_texts_that_is_not_known_is_refused(latent, tmp_path, capsys):
    metadata, tensors = read_entries(latent)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre = 'tekken': .* known: llama-bpe"):
        tokenizer_from_gguf(write_entries(tmp_path / "a.gguf", metadata | {"tokenizer.ggml.pre": "tekken"}, tensors))
    del metadata["tokenizer.ggml.pre"]
    tokenizer_from_gguf(write_entries(tmp_path / "b.gguf", metadata, tensors))
    assert "does not say how its tokenizer splits texts" in capsys.readouterr().err


def test_a_vocabulary_that_would_take_for_ever_to_merge_is_refused(sound, tmp_path):
    metadata, tensors = read_entries(sound)
    words = {"tokenizer.ggml.tokens": [f"{i}" + "x" * 12_000 for i in range(460)]}
    with pytest.raises(ValueError, match="pieces have 5,5.* characters, more than 5,000,000"):
        tokenizer_from_gguf(write_entries(tmp_path / "a.gguf", metadata | words, tensors))


def test_the_command_line_says_it_in_one_line(sound, tmp_path, capsys):
    file = tmp_path / "a.gguf"
    file.write_bytes(sound.read_bytes()[:5_000])
    for words in (["inspect"], ["chat"], ["generate", "--prompt", "x"], ["convert", str(tmp_path / "out")]):
        capsys.readouterr()
        assert cli.main([words[0], str(file), *words[1:]]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no sound GGUF file (it has 5,000 bytes, its header needs" in error
    assert not (tmp_path / "out").exists()


def test_a_file_is_known_by_its_name_or_its_first_bytes(sound, tmp_path):
    (tmp_path / "model").write_bytes(sound.read_bytes())
    assert is_gguf(tmp_path / "model")
    assert not is_gguf(tmp_path)
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    with pytest.raises(ValueError, match="or a GGUF file"):
        resolve_model_dir(other)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"b\.gguf in it is a model by itself"):
        resolve_model_dir(tmp_path)


def test_without_the_library_one_line_says_how_to_have_it(sound):
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from kogia.cli import main\n"
        f"sys.exit(main(['inspect', {str(sound)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "pip install 'kogia[gguf]'" in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_a_tokenizer_with_rules_that_llama_cpp_lacks_is_not_written(tmp_path):
    import json

    from kogia.checkpoint.convert import convert_to_gguf

    directory = write_model(tmp_path, "qwen3")
    file = directory / "tokenizer.json"
    state = json.loads(file.read_text())
    changed = state | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="changes texts by Lowercase first, which llama.cpp does not do"):
        convert_to_gguf(directory, tmp_path / "a.gguf")
    file.write_text(json.dumps(state | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(ValueError, match=r"splits texts by .*Whitespace.*, for which llama.cpp has no name"):
        convert_to_gguf(directory, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
