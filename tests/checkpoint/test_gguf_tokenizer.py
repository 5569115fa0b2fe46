"""Tokenizers in GGUF files: those of every family, there and back, beside transformers' reading and llama.cpp's."""

import gzip
from pathlib import Path

import pytest
from checkpoint.gguf_files import gguf, llama_cpp, read_entries, write_entries, write_gguf_model, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import CORPUS, write_llama2

from kogia.checkpoint.convert import convert_to_gguf
from kogia.checkpoint.gguf_tokenizer import _PRE, load_tokenizer, tokenizer_from_gguf, tokenizer_to_gguf
from kogia.text.chat import Message, render_prompt
from kogia.text.tokenizer import Tokenizer, train_bpe

DATA = Path(__file__).parents[3] / "shared" / "data" / "reference"
TEXTS = [
    "",
    "The answer to 3 plus 4 is 12345, naïve 漢字 🐋\n\n  x",
    " leading",
    "tab\tand </think> tag",
    "a  b",
    "it's",
]
TALK = (Message("system", "Be brief."), Message("user", "1+1?"), Message("assistant", "2"), Message("user", "2+2?"))
FAMILIES = {"llama": "llama2", "llama-3.2": "llama3", "qwen3": "qwen", "deepseek-v3": "deepseek"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Architecture -> (tokenizer of the directory, the file)"""
    root = tmp_path_factory.mktemp("gguf")
    written = {name: write_gguf_model(root, name, "q8_0") for name in FAMILIES}
    return {name: (Tokenizer.load(root / name), file) for name, file in written.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_comes_back_as_it_went(files, name):
    before, file = files[name]
    after = load_tokenizer(file)
    for text in [*TEXTS, *CORPUS[:20]]:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert render_prompt(TALK, after).token_ids == render_prompt(TALK, before).token_ids
    assert (after.bos_id, after.eos_id, after.adds_bos) == (before.bos_id, before.eos_id, before.adds_bos)
    assert after.eos_ids == before.eos_ids[:2]
    assert after.special_ids == before.special_ids
    assert after.vocab_size == before.vocab_size


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), name=st.sampled_from(sorted(FAMILIES)))
def test_any_text_has_the_same_ids(files, text, name):
    before, file = files[name]
    assert load_tokenizer(file).encode(text) == before.encode(text)


@pytest.mark.parametrize("name", ["llama-3.2", "qwen3"])
def test_ids_are_those_of_transformers_reading_of_the_file(files, name):
    transformers = pytest.importorskip("transformers")
    _, file = files[name]
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = load_tokenizer(file)
    for text in [*TEXTS, *CORPUS[:20]]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_llama_cpp(files, name):
    _, file = files[name]
    ours, texts = load_tokenizer(file), [text for text in (*TEXTS, *CORPUS[:20]) if text]
    assert llama_cpp(file, texts=texts)["texts"] == [ours.encode(text) for text in texts]


def test_the_vectors_of_deepseek_llm_are_met(tmp_path):
    packed = DATA / "ggml-vocab-deepseek-llm.gguf.gz"
    if not packed.exists():
        pytest.skip(f"{packed.name} is not there")
    file = tmp_path / "vocab.gguf"
    file.write_bytes(gzip.decompress(packed.read_bytes()))
    tokenizer = tokenizer_from_gguf(file)
    inputs = packed.with_suffix(".inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = packed.with_suffix(".out").read_text().split("\n")
    assert len(inputs) == len(outputs) == 47
    for text, ids in zip(inputs, outputs):
        assert tokenizer.encode(text) == [int(each) for each in ids.split()]
    assert tokenizer.adds_bos


def test_a_tokenizer_of_our_own_splits_as_deepseek_v3():
    words = tokenizer_to_gguf(train_bpe(CORPUS, 300), 320)
    assert words["tokenizer.ggml.pre"] == "deepseek-v3"
    assert words["tokenizer.ggml.token_type"][-1] == 5  # rows that stand for nothing
    assert words["tokenizer.ggml.tokens"][-1] == "[PAD319]"
    assert words["tokenizer.chat_template"].startswith("{{ bos_token }}")


@pytest.mark.parametrize("name", _PRE)
def test_every_way_of_splitting_passes_our_own_checks(files, tmp_path, name):
    _, file = files["qwen3"]
    metadata, tensors = read_entries(file)
    changed = write_entries(tmp_path / "a.gguf", metadata | {"tokenizer.ggml.pre": name}, tensors)
    tokenizer = tokenizer_from_gguf(changed)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_metaspace_is_written_as_a_prefix(tmp_path):
    directory = write_model(tmp_path, "llama")
    for metaspace in (False, True):
        tokenizer = Tokenizer.load(write_llama2(tmp_path / f"{metaspace}", metaspace=metaspace))
        tokenizer.save(directory)
        again = load_tokenizer(convert_to_gguf(directory, tmp_path / f"{metaspace}.gguf", kind="f16"))
        assert again.encode("The answer to 3") == tokenizer.encode("The answer to 3")


def test_a_file_may_end_turns_with_another_token_than_texts(files, tmp_path):
    _, file = files["qwen3"]
    metadata, tensors = read_entries(file)
    ids = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2}
    tokenizer = tokenizer_from_gguf(write_entries(tmp_path / "a.gguf", metadata | ids, tensors))
    assert tokenizer.eos_ids == (0, 2)
    assert gguf.GGUF_VERSION == 3
