import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizer_families import (
    LLAMA2,
    LLAMA3,
    QWEN3,
    QWEN25,
    R1,
    V3,
    write_deepseek,
    write_llama2,
    write_llama3,
    write_qwen,
)

from kogia.data.config import DataConfig, SourceConfig
from kogia.data.loader import gather_batch
from kogia.data.rows import Document, document_from_row
from kogia.data.shards import Shard, build_shards, is_held_out, join, open_shard, shard_fingerprint, tokenise
from kogia.files import exchange
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
    batch = gather_batch(shard, np.array([i]))
    return batch.tokens.token_ids.tolist(), batch.loss_mask.int().tolist()


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


@pytest.mark.parametrize(("num_words", "longest"), [(1, 4), (9, 4), (20, 64), (30, 7), (62, 64), (200, 2)])
def test_a_long_text_is_cut_so_that_every_token_is_predicted_exactly_once(tmp_path, tokenizer, num_words, longest):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(WORDS.split() * 20)[: 4 * num_words])
    data = DataConfig(files=(str(path),), batch_tokens=64, max_seqlen=longest)
    shard = build_shards(data, tokenizer, tmp_path / "data")["train"]
    whole = tokenizer.encode_documents([path.read_text()])[0]
    pieces = [sequence(shard, i) for i in range(shard.num_sequences)]
    assert [ids[0] for ids, _ in pieces[1:]] == [ids[-1] for ids, _ in pieces[:-1]]
    assert all(len(ids) == longest for ids, _ in pieces[:-1])
    assert whole[:1] + [t for ids, mask in pieces for t, on in zip(ids, mask, strict=True) if on] == whole
    assert shard.counts.loss_tokens == len(whole) - 1
    assert shard.counts.tokens == sum(len(ids) for ids, _ in pieces) == shard.source_tokens[0]


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.json", b"5"),
        ("meta.json", b"\xff"),
        ("train/meta.json", b"{}"),
        ("train/meta.json", b'{"dtype": "object", "source_ends": [1], "counts": {}}'),
        ("train/meta.json", b'{"dtype": "uint16", "source_ends": [1], "counts": {"documents": null}}'),
        ("train/meta.json", b'{"dtype": "uint16", "source_ends": [1], "counts": {"too_long": "1"}}'),
        ("train/meta.json", b'{"dtype": "uint16", "source_ends": [1], "counts": 5}'),
        ("train/tokens.bin", b"abc"),
        ("val/offsets.bin", b""),
    ],
)
def test_damaged_shards_are_named_whatever_is_damaged(tmp_path, tokenizer, name, content):
    data = DataConfig((source("stories", num=50),), batch_tokens=64, max_seqlen=32, val_share=0.3)
    build_shards(data, tokenizer, tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"data.*delete th(at|e) folder to"):
        build_shards(data, tokenizer, tmp_path / "data")


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "whole.bin", "offsets.bin"])
def test_a_bit_that_flipped_is_noticed_by_the_checksum(tmp_path, tokenizer, name):
    data = DataConfig((source("stories", num=50), source("chats")), batch_tokens=128, max_seqlen=64)
    build_shards(data, tokenizer, tmp_path / "data")
    file = tmp_path / "data" / "train" / name
    content = bytearray(file.read_bytes())
    content[-1 if name == "whole.bin" else 8] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"train: damaged or truncated \(.*(checksum|disagree)"):
        build_shards(data, tokenizer, tmp_path / "data")


def test_splits_that_were_exchanged_or_are_of_another_directory_are_noticed(tmp_path, tokenizer):
    places = [tmp_path / "data", tmp_path / "other"]
    configs = [
        DataConfig((source("stories", num=num),), batch_tokens=64, max_seqlen=32, val_share=0.3) for num in (50, 60)
    ]
    for data, place in zip(configs, places, strict=True):
        build_shards(data, tokenizer, place)
    for other in (places[0] / "val", places[1] / "train"):
        exchange(places[0] / "train", other)
        with pytest.raises(ValueError, match="not those that it was finished with"):
            build_shards(configs[0], tokenizer, places[0])
        exchange(places[0] / "train", other)
        build_shards(configs[0], tokenizer, places[0])


def test_one_directory_of_texts_serves_any_context_and_chats_above_it_are_left_out(tmp_path, tokenizer):
    data = DataConfig((source("stories", num=3), source("chats")), batch_tokens=256, max_seqlen=256)
    whole = build_shards(data, tokenizer, tmp_path / "data")["train"]
    short = open_shard(tmp_path / "data" / "train", 12)
    assert whole.num_sequences == 6
    assert (short.counts.too_long, short.counts.loss_tokens) == (3, 3 * (whole.lengths[0] - 1))
    assert short.source_ends[0] == short.source_ends[1] == short.num_sequences > 3
    assert short.lengths.max() == 12


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


def test_documents_of_blanks_are_left_out_and_counted_and_replies_of_none_are_not(tmp_path, tokenizer, capsys):
    rows = [{"text": ""}, {"text": " \n\t"}, {"text": "the fox"}, {"prompt": "one?", "completion": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig((SourceConfig(str(tmp_path / "rows.jsonl")),), batch_tokens=64, max_seqlen=64)
    train = build_shards(data, tokenizer, tmp_path / "data")["train"]
    assert train.counts.documents == train.num_sequences == 2
    assert "2 documents of blanks alone were left out" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "  "}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: no document in it"):
        build_shards(data, tokenizer, tmp_path / "none")


FAMILIES = {
    "r1": lambda path: write_deepseek(path, R1),
    "v3": lambda path: write_deepseek(path, V3),
    "qwen2.5": lambda path: write_qwen(path, QWEN25),
    "qwen3": lambda path: write_qwen(path, QWEN3),
    "llama2": lambda path: write_llama2(path, LLAMA2),
    "llama3": lambda path: write_llama3(path, LLAMA3),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(FAMILIES[request.param](tmp_path_factory.mktemp("families") / request.param))


@pytest.mark.parametrize("text", ["The answer is 12.", "", "  a\n", "<think>x</think>"])
def test_a_text_begins_as_prompts_do_and_ends_once_whatever_it_was_given(family, text):
    bos, eos = family.bos or "", family.eos
    plain = [*family.encode_raw(text), family.eos_id]
    given = [text, text + eos, text + eos + "\n"] + [bos + text, bos + text + eos] * family.adds_bos
    rows = [ids for _, [(ids, _)] in tokenise([Document(each) for each in given], family)]
    assert rows[0] == plain
    for each, ids in zip(given, rows, strict=True):
        assert ids[: len(plain)] == plain, each
        assert ids.count(family.eos_id) == 1


def test_a_bos_that_is_named_but_never_added_begins_no_row(tmp_path):
    directory = write_qwen(tmp_path)
    config = (
        (directory / "tokenizer_config.json").read_text().replace('"bos_token": null', '"bos_token": "<|im_start|>"')
    )
    (directory / "tokenizer_config.json").write_text(config)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.bos_id is not None
    ((_, [(ids, mask)]),) = tokenise([Document("The answer")], tokenizer)
    assert ids == [*tokenizer.encode_raw("The answer"), tokenizer.eos_id] == [*tokenizer.encode("The answer"), 2]
    assert mask == [0] + [1] * (len(ids) - 1)


def test_any_of_several_end_tokens_ends_a_text(tmp_path):
    tokenizer = Tokenizer.load(write_llama3(tmp_path))
    texts = [f"a{end}" for end in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>")]
    assert [ids[-1] for ids in tokenizer.encode_documents(texts)] == [1, 2, 3, tokenizer.eos_id]
    assert [len(ids) for ids in tokenizer.encode_documents(texts)] == [3, 3, 3, 4]


DIALOGUE = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


def learned(tokenizer: Tokenizer, examples: list[tuple[list[int], list[int]]]) -> list[list[str]]:
    """The learned stretches of every sequence, as text."""
    found = []
    for ids, mask in examples:
        edges = [i for i in range(1, len(ids)) if mask[i] != mask[i - 1]] + [len(ids)] * mask[-1]
        found.append([tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)])
    return found


def test_every_reply_of_a_conversation_is_learned_after_the_prompt_that_it_answers(family):
    document = document_from_row({"messages": DIALOGUE}, "here")
    ((_, examples),) = tokenise([document], family)
    user = tuple(Message(m["role"], m["content"]) for m in DIALOGUE)
    assert examples == [render_example(user[:1], "1", family), render_example(user[:3], "2", family)]
    joined = join(examples)
    answers = [stretch for stretches in learned(family, joined) for stretch in stretches]
    opens = "</think>\n\n" if family.decode(examples[0][0]).count("<think>") else ""
    assert [answer.removeprefix(opens) for answer in answers] == [f"{n}{family.eos}" for n in "12"]


@pytest.mark.parametrize(("name", "sequences"), [("r1", 2), ("v3", 1), ("qwen2.5", 1), ("qwen3", 1), ("llama3", 1)])
def test_replies_share_a_sequence_where_the_next_prompt_continues_the_text_so_far(tmp_path, name, sequences):
    tokenizer = Tokenizer.load(FAMILIES[name](tmp_path))
    ((_, examples),) = tokenise([document_from_row({"messages": DIALOGUE}, "here")], tokenizer)
    joined = join(examples)
    assert len(joined) == sequences
    assert sum(sum(mask) for _, mask in joined) == sum(sum(mask) for _, mask in examples)
    assert joined[-1][0] == examples[-1][0]


def test_earlier_thoughts_are_learned_where_they_stand_and_gone_from_later_prompts(family):
    thoughtful = [m | ({"reasoning_content": "hm"} if m["role"] == "assistant" else {}) for m in DIALOGUE]
    tagged = [
        m | ({"content": f"<think>\nhm\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else {})
        for m in DIALOGUE
    ]
    documents = [document_from_row({"messages": rows}, "here") for rows in (thoughtful, tagged)]
    (_, first), (_, second) = tokenise(documents, family)
    assert first == second
    assert len(join(first)) == 2
    for (ids, mask), answer in zip(first, "12", strict=True):
        prompt, reply = (family.decode([t for t, on in zip(ids, mask, strict=True) if on == side]) for side in (0, 1))
        assert prompt.count("hm") == 0
        assert (prompt + reply).count("<think>") == 1
        assert reply.endswith(f"hm\n</think>\n\n{answer}{family.eos}")


def test_a_conversation_is_held_out_with_its_opening_and_too_long_replies_alone_are_left_out(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, *DIALOGUE[1:]]} for i in range(40)]
    whole = [document_from_row(row, "here") for row in rows]
    begun = [document_from_row({"messages": row["messages"][:2]}, "here") for row in rows]
    assert [is_held_out(d, 0.5) for d in whole] == [is_held_out(d, 0.5) for d in begun]
    long = [*DIALOGUE, {"role": "user", "content": WORDS * 9}, {"role": "assistant", "content": "3"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": long}]))
    data = DataConfig((SourceConfig(str(path)),), batch_tokens=64, max_seqlen=64)
    counts = build_shards(data, tokenizer, tmp_path / "data")["train"].counts
    assert (counts.documents, counts.replies, counts.too_long, counts.sequences) == (1, 2, 1, 2)
    last = DataConfig((SourceConfig(str(path), replies="last"),), batch_tokens=512, max_seqlen=512)
    assert build_shards(last, tokenizer, tmp_path / "last")["train"].counts.replies == 1


def test_what_counts_is_said(tmp_path, tokenizer, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": DIALOGUE}) + "\n" + json.dumps({"text": "x"}))
    data = DataConfig(files=(str(path),), batch_tokens=64, max_seqlen=64)
    build_shards(data, tokenizer, tmp_path / "data")
    assert "2 replies of the assistant count in the loss, and none of what they answer" in capsys.readouterr().err


def test_a_conversation_that_the_template_refuses_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"messages": DIALOGUE}, {"messages": [DIALOGUE[0], *DIALOGUE]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(files=(str(path),), batch_tokens=64, max_seqlen=64)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*roles must alternate"):
        build_shards(data, Tokenizer.load(write_llama2(tmp_path / "llama2")), tmp_path / "data")


def test_shards_of_another_rule_for_the_ends_are_not_taken_for_these(tmp_path):
    data = DataConfig((source("stories", num=2),), batch_tokens=64, max_seqlen=64)
    directory = write_qwen(tmp_path)
    before = shard_fingerprint(data, Tokenizer.load(directory))
    (directory / "generation_config.json").write_text("{}")
    assert shard_fingerprint(data, Tokenizer.load(directory)) != before
