"""A text of so many bytes has at least so many tokens, for tokenizers that leave nothing of a text out."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from kogia.text.token_lengths import longest_token
from kogia.text.tokenizer import LONG_CHARS, train_bpe


def llama() -> Tokenizer:
    """SentencePiece's kind: blanks are written as ▁, and what is unknown as bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "▁▁": 257, "a": 258, "▁a": 259}
    backend = Tokenizer(models.BPE(vocab, [("▁", "▁"), ("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


BACKENDS = [train_bpe(["the answer is 42. " * 20, "ｆｕｌｌ ｗｉｄｔｈ " * 20], 400).backend, llama()]
TEXTS = st.lists(st.sampled_from(["the answer", " ", "▁", "a", "ｆｕｌｌ", "<｜User｜>", "\x00", "é", "🐋"])).map(
    "".join
)


@pytest.mark.parametrize("backend", BACKENDS, ids=["byte-level", "byte fallback"])
@given(text=st.one_of(st.text(), TEXTS))
def test_no_text_has_fewer_tokens_than_its_bytes_say(backend, text):
    longest = longest_token(backend)
    assert longest is not None
    assert len(backend.encode(text, add_special_tokens=False).ids) * longest >= len(text.encode())


def altered(change) -> Tokenizer:
    backend = Tokenizer.from_str(BACKENDS[0].to_str())
    change(backend)
    return backend


def removes_blanks(backend):
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.ByteLevel(False)]
    )


def knows_words(backend):
    backend.model = models.WordLevel({"a": 0, "?": 1}, unk_token="?")


def lacks_bytes(backend):
    backend.model = models.BPE({"a": 0}, [])


@pytest.mark.parametrize(
    "change",
    [
        removes_blanks,
        knows_words,
        lacks_bytes,
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: setattr(backend, "normalizer", normalizers.Strip()),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("ab", "a")),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
        lambda backend: backend.add_tokens([AddedToken("<m>", lstrip=True)]),
    ],
)
def test_nothing_is_said_of_tokenizers_that_leave_parts_of_a_text_out(change):
    assert longest_token(altered(change)) is None


def test_a_text_that_is_far_too_long_is_refused_without_being_encoded():
    tokenizer = train_bpe(["the answer is 42. " * 20], 400)
    text = "the answer is 42. " * 400_000
    started = time.process_time()
    with pytest.raises(ValueError, match=r"at least [\d,]+ tokens, where 4,096 fit"):
        tokenizer.encode(text, 4096)
    assert time.process_time() - started < 0.5
    assert tokenizer.encode("the", 0) and len(tokenizer.encode("a b " * LONG_CHARS, 2**20)) > LONG_CHARS
