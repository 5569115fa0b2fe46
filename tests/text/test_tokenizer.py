import json
from threading import Event, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from kogia.text.stream import IncrementalDecoder
from kogia.text.tokenizer import (
    BOS,
    END_THINK,
    EOS,
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    THINK,
    Tokenizer,
    cut_long_runs,
    train_bpe,
)

CORPUS = [f"{a}*{b}={a * b},{a * b}+{a}={a * b + a} no\n" for a in range(1, 26) for b in range(1, 9)]
CORPUS += ["the answer is seven, and the next one is larger.\n"] * 20
TOKENIZER = train_bpe(CORPUS, 600)


@given(st.text())
def test_any_text_survives_the_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.sampled_from(["15*4=60", " no\n", "é", "漢字", "🐋", *SPECIAL_TOKENS])).map("".join))
def test_text_with_special_tokens_survives_the_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.text(), st.integers(1, 4))
def test_incremental_text_equals_the_whole_text(text, step):
    ids = TOKENIZER.encode(text)
    decoder = IncrementalDecoder(TOKENIZER)
    pieces = [decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(pieces) + decoder.flush() == text


@settings(max_examples=300)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans())
def test_incremental_decoding_equals_full_decoding_for_any_ids(ids, skip_special):
    decoder = IncrementalDecoder(TOKENIZER, skip_special=skip_special)
    pieces = [decoder.push([i]) for i in ids]
    assert "".join(pieces) + decoder.flush() == TOKENIZER.decode(ids, skip_special=skip_special)


def test_half_a_character_is_never_emitted():
    ids = TOKENIZER.encode("🐋")
    assert len(ids) == 4  # the corpus has no whale: one token per byte
    decoder = IncrementalDecoder(TOKENIZER)
    assert [decoder.push([i]) for i in ids] == ["", "", "", "🐋"]


def test_special_tokens_come_first_and_are_one_id_each():
    assert [TOKENIZER.encode(token) for token in SPECIAL_TOKENS] == [[i] for i in range(7)]
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1)
    assert TOKENIZER.encode(f"a{THINK}\nb{END_THINK}").count(TOKENIZER.token_id(END_THINK)) == 1
    assert TOKENIZER.decode(TOKENIZER.encode(f"{BOS}a{EOS}"), skip_special=True) == "a"


def test_encoding_adds_no_beginning_of_sentence():
    assert TOKENIZER.bos_id not in TOKENIZER.encode("15*4=60")
    assert TOKENIZER.encode("") == []


def test_half_a_surrogate_pair_is_refused_by_its_place():
    for encode in (TOKENIZER.encode, TOKENIZER.encode_raw, lambda text: TOKENIZER.encode_documents(["a", text])):
        with pytest.raises(ValueError, match=r"holds half a surrogate pair, '\\udc00' at character 2"):
            encode("15\udc00")
    assert TOKENIZER.decode(TOKENIZER.encode("\U0001f40b")) == "\U0001f40b"


def test_digits_are_split_into_groups_of_at_most_three():
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode("1234567890" * 3)]
    assert max(len(piece) for piece in pieces) <= 3
    assert TOKENIZER.decode(TOKENIZER.encode("60")[:1]) == "60"


def test_batches_encode_as_single_texts_do():
    assert TOKENIZER.encode_batch(CORPUS[:50]) == [TOKENIZER.encode(text) for text in CORPUS[:50]]


def test_a_long_text_is_encoded_as_it_would_be_whole_and_other_threads_run_meanwhile():
    line, started, ended = "1 + 1 = 2, é 名\n", Event(), Event()
    assert TOKENIZER.encode(line * 1000) == TOKENIZER.backend.encode(line * 1000, add_special_tokens=False).ids
    text = "a" * 500_000

    def encode() -> None:
        started.set()
        TOKENIZER.encode(text)
        ended.set()

    thread, turns = Thread(target=encode), 0
    thread.start()
    started.wait()
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 10


def test_the_trained_vocabulary_is_the_same_every_time(tmp_path):
    again = train_bpe(iter(CORPUS), 600)
    assert again.backend.get_vocab() == TOKENIZER.backend.get_vocab()
    assert MIN_VOCAB_SIZE < again.vocab_size <= 600


@pytest.mark.parametrize("text", ["a" * 2_000_000, " " * 2_000_000, "=" * 2_000_000, "ACGGT" * 400_000])
def test_training_takes_no_longer_for_a_word_that_goes_on_and_on(text):
    """Merging takes the square of a word's length: of each of these hours."""
    trained = train_bpe([text, *CORPUS], 600)
    assert trained.decode(trained.encode(text[:5000])) == text[:5000]
    assert max(map(len, trained.backend.get_vocab())) > 16, "runs are still learned"


def test_texts_of_words_of_any_usual_length_are_learned_as_they_are():
    words = ["x" * 511, "y" * 512, "\n" * 300]
    texts = [*CORPUS, " ".join(words), words[1]]
    assert list(cut_long_runs(texts)) == texts
    assert list(cut_long_runs(["é" * 513, "a b", " " * 1030])) == ["é" * 512, "é", "a b", *[" " * 512] * 2, " " * 6]


@pytest.mark.parametrize("size", [-5, MIN_VOCAB_SIZE - 1, MAX_VOCAB_SIZE + 1, 10**10])
def test_a_vocabulary_too_small_or_too_large_to_train_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size={size}: .* at (least|most)"):
        train_bpe(["a"], size)


def test_saved_tokenizer_loads_the_same(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.config == TOKENIZER.config
    assert loaded.vocab_size == TOKENIZER.vocab_size
    assert [loaded.encode(text) for text in CORPUS] == [TOKENIZER.encode(text) for text in CORPUS]


def test_a_tokenizer_that_adds_bos_by_itself_does_not_here(tmp_path):
    """DeepSeek's own files carry a post-processor that prepends BOS to every encoding."""
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
    path.write_text(json.dumps(data))
    assert Backend.from_file(str(path)).encode("15").ids[0] == 0
    assert Tokenizer.load(tmp_path).encode("15") == TOKENIZER.encode("15")


def test_added_token_tables_in_the_config_are_understood(tmp_path):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(TOKENIZER.config | {"eos_token": {"content": EOS, "lstrip": False}}))
    assert Tokenizer.load(tmp_path).eos_id == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "copy them there"),
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer.json", "[]", "not a tokenizer.json"),
        ("tokenizer_config.json", None, "copy them there"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: "),
        ("tokenizer_config.json", "{}", "eos_token=None"),
        ("tokenizer_config.json", "[]", "a JSON list, not an object"),
        ("tokenizer_config.json", "[" * 100_000, "not JSON"),
        ("tokenizer_config.json", "{" + " " * 1_000_000 + "}", "larger than 1,000,000 bytes"),
        ("tokenizer_config.json", json.dumps({"bos_token": 7, "eos_token": EOS}), "bos_token=7: must be"),
        ("tokenizer_config.json", json.dumps({"bos_token": BOS, "eos_token": "<eos>"}), "'<eos>' is not in the vocab"),
    ],
)
def test_missing_or_broken_files_are_named(tmp_path, name, content, message):
    TOKENIZER.save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(error.value)


def test_a_truncated_tokenizer_file_is_an_error(tmp_path):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=262.*at least 263"):
        train_bpe(CORPUS, 262)
