"""A tokenizer.json from anywhere: what its steps may do, how much they may take, and what becomes of a panic."""

import json
import time

import pytest
from tokenizer_families import LLAMA2, QWEN3, SPLIT, write_llama2, write_qwen
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from kogia.text.patterns import pattern_shape
from kogia.text.tokenizer import Tokenizer, train_bpe
from kogia.text.tokenizer_file import panics_as_errors

PUBLISHED = [
    SPLIT,  # Llama 3, with one digit at a time Qwen 2 and 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # o200k
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+(?i:'s|'t)?|\s+(?!\S)|\s+",  # Kimi
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ]+",  # DeepSeek-LLM
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}{1,3}",
    r"\d{1,3}(?=(?:\d{3})*\b)",  # digits grouped from the right
    "▁[^▁]*",
    "(?<=a)b|[]x]+|{|a{,}",
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_the_patterns_of_published_tokenizers_are_harmless(pattern):
    pattern_shape(pattern)
    Regex(pattern)  # and the library takes them


CATASTROPHIC = [
    "(a+)+$",
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+$",
    "(?:a?){50}a{50}",
    "([a-z]+)*[0-9]",
    "(.*a){20}",
    "(?>x(a+)+y)",
    "(?=(a+)+b)",
    "(?<n>a+)+b",
    "a*a*b",
    "\\s*\\s*\\S*x",
    r"a+.*b+c",
    "a*a*a*",
    "a{0,999}a{0,999}b",
    "a{2,}{2,}b",
    "a?" * 30 + "a" * 30,
    "(a|b|ab)" * 12 + "c",
    "(?i)(a+)+b",
    "((a{100}){100}){100}",
    "a{100000}",
    r"(a)\1",
    r"\k<a>",
    r"(?<a>x\g<a>?y)",
    "(?~abc)",
    "(?(1)a|b)",
    "(*FAIL)",
    "(?x) a+ # (",
    "(" * 50 + "a" + ")" * 50,
    "[" * 50 + "a" + "]" * 50,
    "(a",
    "a)",
    "[a",
    "a" * 20_001,
]


@pytest.mark.parametrize("pattern", CATASTROPHIC, ids=lambda pattern: pattern[:20])
def test_a_pattern_that_could_take_without_end_or_is_not_understood_is_refused(pattern):
    with pytest.raises(ValueError, match="repeats|ways|open|counts|uses|nests|closes|characters"):
        pattern_shape(pattern)


@pytest.mark.parametrize("pattern", CATASTROPHIC[:3])
@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
def test_such_a_pattern_in_a_file_is_named(tmp_path, pattern, place):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    members = {"pre_tokenizer": {"pretokenizers": [split]}, "normalizer": {"normalizers": [replace]}}[place]
    change(write_qwen(tmp_path), {place: {"type": "Sequence", **members}})
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {place}: the regular expression .*simplify it"):
        Tokenizer.load(tmp_path)


def change(directory, parts):
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return directory


def replacing(text, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


def sequence(part, steps):
    key = {"normalizer": "normalizers", "decoder": "decoders", "post_processor": "processors"}[part]
    return {part: {"type": "Sequence", key: steps}}


def bos_template(times, ids=(0,), key="single"):
    pieces = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}] * times
    plain = [{"Sequence": {"id": "A", "type_id": 0}}]
    table = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": list(ids), "tokens": ["<|endoftext|>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": plain, "pair": plain, key: pieces + plain, "special_tokens": table}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (sequence("normalizer", [replacing("a", "aa")] * 30), "normalizer may make a text 1.07e.09 times as long"),
        (sequence("normalizer", [replacing("a", "b" * 9), replacing("b", "a" * 9)]), "81 times"),
        (sequence("normalizer", [replacing("x", "y")] * 33), "33 steps, more than 32"),
        (sequence("normalizer", [replacing("", "a")]), "must not be empty"),
        (sequence("normalizer", [replacing("x*", "ab", "Regex")] * 3), "27 times"),
        (sequence("normalizer", [replacing("a", "b" * 65)]), "at most 64 characters"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 65}}, "at most 64 characters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "'Precompiled' is not supported"),
        ({"normalizer": "NFC"}, "normalizer holds 'NFC'"),
        ({"pre_tokenizer": {"type": "Lua"}}, "pre_tokenizer 'Lua' is not supported; known are ByteLevel"),
        (sequence("decoder", [replacing("▁", "▁▁")] * 30 + [{"type": "Fuse"}]), "decoder may make a text"),
        ({"decoder": {"type": "CTC"}}, "decoder 'CTC' is not supported"),
        ({"post_processor": bos_template(200_000)}, "may add 200000 tokens|may add 200001 tokens"),
        ({"post_processor": bos_template(3, ids=[0] * 100)}, "may add 400 tokens"),
        ({"post_processor": bos_template(100, key="pair")}, "may add 101 tokens"),
        (sequence("post_processor", [bos_template(1)] * 40), "40 steps"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [], "pair": []}}, "special_tokens None"),
        ({"added_tokens": [{"id": 0, "content": "a" * 10_001}]}, "has 10001 characters"),
        ({"added_tokens": 5}, "added_tokens is 5"),
        ({"model": {"type": "BPE", "vocab": {"a" * 10_001: 0}, "merges": []}}, "has 10001 characters"),
    ],
)
@pytest.mark.parametrize("write", [write_qwen, write_llama2])
def test_steps_that_are_unknown_or_of_unbounded_size_are_refused(tmp_path, write, parts, message):
    change(write(tmp_path), parts)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert time.process_time() - start < 15  # half of it reads the file


def test_sequences_inside_sequences_are_counted_through(tmp_path):
    step = {"type": "Sequence", "normalizers": [replacing("a", "aa")] * 3}
    change(write_qwen(tmp_path), sequence("normalizer", [step] * 3))
    with pytest.raises(ValueError, match="512 times as long"):
        Tokenizer.load(tmp_path)
    for _ in range(9):
        step = {"type": "Sequence", "normalizers": [step]}
    change(tmp_path, sequence("normalizer", [step]))
    with pytest.raises(ValueError, match="in at most 8 sequences"):
        Tokenizer.load(tmp_path)


def test_every_known_step_is_taken_as_the_library_writes_it(tmp_path):
    write_qwen(tmp_path, QWEN3)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence(
        [
            *(normalizers.NFKC(), normalizers.Strip(), normalizers.StripAccents(), normalizers.Lowercase()),
            *(normalizers.Prepend("_"), normalizers.Replace("``", '"'), normalizers.Replace(Regex(" {2,}"), " ")),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Digits(True), pre_tokenizers.Punctuation(), pre_tokenizers.UnicodeScripts()),
            *(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("|", "removed"), pre_tokenizers.ByteLevel(False)),
        ]
    )
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing(("<|im_end|>", 2), ("<|endoftext|>", 0))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in ("The  answer", "a``b|3"):
        assert Tokenizer.load(tmp_path).encode(text) == backend.encode(text, add_special_tokens=False).ids
    llama = Backend.from_file(str(write_llama2(tmp_path / "llama", LLAMA2) / "tokenizer.json"))
    assert (
        Tokenizer.load(tmp_path / "llama").encode("The  answer")
        == llama.encode("The  answer", add_special_tokens=False).ids
    )


def test_a_panic_of_the_library_is_an_error():
    own = train_bpe(["a b"], 263)
    own.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    for encode in (own.encode, lambda text: own.encode_batch([text]), own.encode_raw):
        with pytest.raises(ValueError, match=r"encoding: the tokenizers library gave up"):
            encode("a" * 60 + "b")
    assert own.decode(own.encode("b")) == "b"


def test_a_panic_over_the_post_processor_is_an_error(tmp_path):
    template = bos_template(1) | {"special_tokens": {}}
    tokenizer = Tokenizer.load(change(write_llama2(tmp_path), {"post_processor": template}))
    tokenizer.config.pop("add_bos_token")
    with pytest.raises(ValueError, match="the post_processor of tokenizer.json: the tokenizers library gave up"):
        tokenizer.encode_raw("a")


def test_an_interrupt_is_no_panic():
    with pytest.raises(KeyboardInterrupt), panics_as_errors("encoding"):
        raise KeyboardInterrupt


def test_decoders_of_the_library_are_bounded_too(tmp_path):
    write_llama2(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("The answer")) == " The answer"
