import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizer_families import QWEN25, write_qwen

from kogia.data.config import DataConfig, SourceConfig
from kogia.data.shards import Shard, build_shards, cut, is_held_out, shard_fingerprint
from kogia.data.sources import Document
from kogia.text.chat import Message, render_example
from kogia.text.tokenizer import Tokenizer, train_bpe

WORDS = "the quick brown fox jumps over the lazy dog and the cat sat on the mat"
calls: list[str] = []


def stories(num: int) -> Iterator[str]:
    calls.append("stories")
    yield from (f"{WORDS} {i}" for i in range(num))


def broken(num: int) -> Iterator[str]:
    yield from stories(num)
    raise RuntimeError("the corpus server went away")


def chats() -> Iterator[dict]:
    for question in ("one?", "two?", WORDS * 9):
        yield {"prompt": question, "completion": f"{WORDS}</think>yes"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([f"{WORDS} {i} one? two? yes" for i in range(50)], 320)


def source(name: str, **fields) -> SourceConfig:
    return SourceConfig(f"{__name__}:{name}", **fields)


def sequence(shard: Shard, i: int) -> tuple[list[int], list[int]]:
    rows = slice(shard.offsets[i], shard.offsets[i + 1])
    return shard.tokens[rows].tolist(), shard.mask[rows].tolist()


def test_texts_become_bos_text_eos_and_chats_count_only_their_completion(tmp_path, tokenizer):
    data = DataConfig((source("stories", num=2), source("chats")), batch_tokens=128, max_seqlen=64)
    shard = build_shards(data, tokenizer, tmp_path / "data")["train"]
    ids, mask = sequence(shard, 1)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(f"{WORDS} 1"), tokenizer.eos_id]
    assert mask == [0] + [1] * (len(ids) - 1)
    expected = render_example([Message("user", "two?")], f"{WORDS}</think>yes", tokenizer)
    assert sequence(shard, 3) == expected
    assert shard.source_ends == (2, 4)
    assert shard.counts.too_long == 1, "the third chat is longer than max_seqlen and must not be cut"
    assert shard.tokens.dtype == np.uint16


def test_a_tokenizer_without_bos_and_its_own_template_are_used(tmp_path):
    data = DataConfig((source("stories", num=2), source("chats")), batch_tokens=128, max_seqlen=128)
    qwen = Tokenizer.load(write_qwen(tmp_path / "qwen"))
    shard = build_shards(data, qwen, tmp_path / "data")["train"]
    ids, mask = sequence(shard, 1)
    assert ids == [*qwen.encode(f"{WORDS} 1"), qwen.eos_id]
    assert mask == [0] + [1] * (len(ids) - 1)
    example = "".join(qwen.decode(sequence(shard, 2)[0]))
    assert example == f"<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n{WORDS}</think>yes<|im_end|>"
    other = Tokenizer.load(write_qwen(tmp_path / "other", QWEN25))
    assert shard_fingerprint(data, other) != shard_fingerprint(data, qwen)


def test_a_long_text_is_cut_so_that_every_token_is_predicted_exactly_once():
    ids, mask = list(range(10)), [0] + [1] * 9
    pieces = list(cut(ids, mask, 4))
    assert [p for p, _ in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [t for piece, m in pieces for t, on in zip(piece, m, strict=True) if on] == list(range(1, 10))
    assert list(cut(ids[:4], mask[:4], 4)) == [([0, 1, 2, 3], [0, 1, 1, 1])]
    assert [p for p, _ in cut(ids[:5], mask[:5], 4)] == [[0, 1, 2, 3], [3, 4]]


def test_held_out_documents_are_chosen_by_prompt_in_about_the_asked_share():
    documents = [Document(f"text {i}") for i in range(4000)]
    share = sum(is_held_out(d, 0.2) for d in documents) / 4000
    assert abs(share - 0.2) < 0.03
    prompt = (Message("user", "same question"),)
    assert len({is_held_out(Document(f"answer {i}", prompt), 0.5) for i in range(20)}) == 1


def test_a_document_is_in_training_or_held_out_never_both(tmp_path, tokenizer):
    data = DataConfig((source("stories", num=100),), batch_tokens=64, max_seqlen=64, val_share=0.3)
    shards = build_shards(data, tokenizer, tmp_path / "data")
    found = {name: {tuple(sequence(s, i)[0]) for i in range(s.num_sequences)} for name, s in shards.items()}
    assert not found["train"] & found["val"]
    assert len(found["train"]) + len(found["val"]) == 100


def test_tokens_are_written_once_and_other_settings_are_refused(tmp_path, tokenizer):
    data = DataConfig((source("stories", num=5),), batch_tokens=64, max_seqlen=64)
    calls.clear()
    first = build_shards(data, tokenizer, tmp_path / "data")["train"]
    again = build_shards(data, tokenizer, tmp_path / "data")["train"]
    assert calls == ["stories"]
    assert first.tokens.tolist() == again.tokens.tolist()
    other = DataConfig((source("stories", num=6),), batch_tokens=64, max_seqlen=64)
    with pytest.raises(ValueError, match="other data settings.*delete"):
        build_shards(other, tokenizer, tmp_path / "data")


def test_runs_share_tokens_in_a_cache_folder(tmp_path, tokenizer):
    sources = (source("stories", num=5),)
    data = DataConfig(sources, batch_tokens=64, max_seqlen=64, cache_dir=str(tmp_path / "cache"))
    calls.clear()
    build_shards(data, tokenizer, tmp_path / "run1")
    build_shards(data, tokenizer, tmp_path / "run2")
    assert calls == ["stories"]
    assert not (tmp_path / "run1").exists()


def test_a_source_that_fails_half_way_leaves_nothing_behind(tmp_path, tokenizer):
    data = DataConfig((source("broken", num=2000),), batch_tokens=64, max_seqlen=64)
    with pytest.raises(RuntimeError, match="server went away"):
        build_shards(data, tokenizer, tmp_path / "data")
    assert os.listdir(tmp_path) == []


def test_truncated_and_empty_shards_are_errors_that_name_the_fix(tmp_path, tokenizer):
    data = DataConfig((source("stories", num=5),), batch_tokens=64, max_seqlen=64)
    build_shards(data, tokenizer, tmp_path / "data")
    tokens: Path = tmp_path / "data" / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match="disagree.*delete"):
        build_shards(data, tokenizer, tmp_path / "data")
    short = DataConfig((source("chats"),), batch_tokens=8, max_seqlen=8)
    with pytest.raises(ValueError, match="no training sequence.*3 chat examples above data.max_seqlen = 8"):
        build_shards(short, tokenizer, tmp_path / "short")
    assert not (tmp_path / "short").exists()  # nothing stale is left for a second try
    (tmp_path / "none.jsonl").write_text("")
    nothing = DataConfig((SourceConfig(str(tmp_path / "none.jsonl")),), batch_tokens=64, max_seqlen=64)
    with pytest.raises(ValueError, match=r"none\.jsonl: no document in it"):
        build_shards(nothing, tokenizer, tmp_path / "none")
