import gzip
import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kogia.config import from_dict, parse_args, to_dict
from kogia.data.config import DataConfig, SourceConfig
from kogia.data.rows import Document, document_from_row
from kogia.data.sources import read_source
from kogia.text.chat import Message, parse_response
from kogia.train.config import SupervisedConfig


@dataclass(frozen=True)
class Question:
    messages: tuple[Message, ...]


def texts(num: int, seed: int, mark: str = "-") -> Iterator[str]:
    yield from (f"{seed}{mark}{i}" for i in range(num))


def pairs() -> Iterator[tuple[Question, str]]:
    yield Question((Message("user", "2+2?"),)), "easy</think>4"


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_a_jsonl_file_holds_texts_prompts_and_messages_and_gzip_changes_nothing(tmp_path):
    user = {"role": "user", "content": "hi"}
    rows = [
        {"text": "plain"},
        {"prompt": "q", "completion": "t</think>a"},
        {"messages": [user], "completion": "t</think>b"},
        {"messages": [user, {"role": "assistant", "content": "c", "reasoning": "why"}]},
    ]
    expected = [
        Document("plain"),
        Document("t</think>a", (Message("user", "q"),)),
        Document("t</think>b", (Message("user", "hi"),)),
        Document("why\n</think>\n\nc", (Message("user", "hi"),)),
    ]
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write_jsonl(tmp_path / name, rows)
        assert list(read_source(SourceConfig(str(path)))) == expected
    assert list(read_source(SourceConfig(str(path), num=2))) == expected[:2]


def test_a_reply_given_as_a_message_is_read_back_as_the_same_answer():
    for reply, thinking in (
        ({"content": "42"}, None),
        ({"content": "42", "reasoning": "6*7"}, "6*7"),
        ({"content": "<think>\n6*7\n</think>\n\n42"}, "6*7"),
    ):
        row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **reply}]}
        parsed = parse_response(document_from_row(row, "here").text)
        assert (parsed.answer, parsed.thinking, parsed.closed) == ("42", thinking, True)


def test_a_text_file_is_one_document_or_split_at_its_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\n\n\n")
    assert list(read_source(SourceConfig(str(path)))) == [Document("one\n\ntwo\n\n\n\n")]
    assert list(read_source(SourceConfig(str(path), separator="\n\n"))) == [Document("one"), Document("two")]


def test_a_generator_gets_num_seed_and_options_and_may_yield_problems():
    source = SourceConfig(f"{__name__}:texts", num=2, seed=7, options={"mark": "/"})
    assert list(read_source(source)) == [Document("7/0"), Document("7/1")]
    expected = Document("easy</think>4", (Message("user", "2+2?"),))
    assert list(read_source(SourceConfig(f"{__name__}:pairs"))) == [expected]


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"body": "x"}', ["line 2", "['body']", '{"text"}', "text_key"]),
        ("{oops", ["line 2", "not JSON"]),
        ('{"messages": [{"role": "user"}], "completion": "x"}', ["line 2", "content"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', ["line 2", "assistant"]),
    ],
)
def test_a_row_that_is_no_document_is_an_error_naming_file_line_and_rule(tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError) as error:
        list(read_source(SourceConfig(str(path))))
    assert all(word in str(error.value) for word in [str(path), *words])


def test_wrong_sources_are_errors_that_name_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl.*no such file"):
        list(read_source(SourceConfig(str(tmp_path / "nothing.jsonl"))))
    with pytest.raises(ValueError, match="neither a file"):
        list(read_source(SourceConfig("corpus.csv")))
    with pytest.raises(ValueError, match=r"colour.*texts\(num"):
        list(read_source(SourceConfig(f"{__name__}:texts", num=1, options={"colour": 1})))
    with pytest.raises(ValueError, match="weight = 0"):
        SourceConfig("a.txt", weight=0)
    with pytest.raises(ValueError, match="batch_tokens = 8"):
        DataConfig(batch_tokens=8, max_seqlen=16)


USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
ASKED = (Message("user", "2+2?"),)
ANSWER, THOUGHT = "</think>\n\n4", "two and two\n</think>\n\n4"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": [USER], "completion": "4"},
        {"prompt": "2+2?", "completion": [REPLY]},
        {"messages": [USER, REPLY]},
        {"messages": [USER, REPLY | {"reasoning_content": None, "tool_calls": None}]},
        {"messages": [USER], "completion": "</think>\n\n4"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
                REPLY,
            ]
        },
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [USER, REPLY]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "output": "4", "text": "Below is an instruction ..."},
        {"messages": [USER, REPLY], "prompt": None, "completion": None, "text": None},
        {"messages": None, "prompt": "2+2?", "completion": "4"},
        {"messages": [], "prompt": "2+2?", "completion": "4"},
        {"messages": float("nan"), "prompt": "2+2?", "completion": "4"},
        {"prompt": "", "completion": "", "messages": [USER, REPLY]},
        {"prompt": "2+2?", "completion": "four", "messages": [USER, REPLY]},
        {"instruction": None, "output": "x", "conversations": [USER, REPLY]},
    ],
)
def test_every_layout_of_a_question_and_its_answer_is_the_same_document(row):
    assert document_from_row(row, "here") == Document(ANSWER, ASKED)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "<think>\ntwo and two\n</think>\n\n4"},
        {"prompt": "2+2?", "completion": " \n<think>two and two\n</think>\n\n4"},
        {"prompt": "2+2?", "completion": "4", "reasoning_content": "two and two"},
        {"messages": [USER, REPLY | {"reasoning_content": "two and two"}]},
        {"messages": [USER, REPLY | {"reasoning": "\ntwo and two\n"}]},
        {"messages": [USER, REPLY | {"thinking": "two and two"}]},
        {"messages": [USER, REPLY | {"content": "</think>\n\n4", "reasoning_content": "two and two"}]},
        {"conversations": [USER, {"from": "gpt", "value": "<think>\ntwo and two\n</think>\n\n4"}]},
        {"instruction": "2+2?", "output": "<think>\ntwo and two\n</think>\n\n4"},
    ],
)
def test_a_thought_is_kept_in_every_layout(row):
    assert document_from_row(row, "here") == Document(THOUGHT, ASKED)


def test_a_thought_that_was_never_closed_stays_one():
    for row in (
        {"prompt": "2+2?", "completion": "<think>\ntwo and"},
        {"messages": [USER, REPLY | {"content": "\n<think>two and"}]},
    ):
        assert document_from_row(row, "here") == Document("<think>\ntwo and", ASKED)


def test_all_replies_to_a_user_are_learned_but_those_before_a_completion_or_of_weight_0():
    greeting = {"role": "assistant", "content": "Hello!"}
    long = [USER, REPLY, USER, REPLY | {"reasoning": "hm"}, USER, REPLY]
    assert document_from_row({"messages": long}, "here").learned == (1, 3)
    assert document_from_row({"messages": [greeting, *long]}, "here").learned == (2, 4)
    weighted = [USER, REPLY | {"weight": 0}, USER, REPLY | {"weight": 1}, USER, REPLY | {"weight": 0}]
    found = document_from_row({"messages": weighted}, "here")
    assert (len(found.prompt), found.learned) == (3, ())
    assert document_from_row({"messages": long[:5], "completion": "4"}, "here").learned == ()
    assert document_from_row({"prompt": long[:3], "completion": long[3:]}, "here").learned == (3,)
    alpaca = {"instruction": "2+2?", "input": "now", "output": "4", "history": [["1+1?", "2"]], "system": "Be brief."}
    assert document_from_row(alpaca, "here") == Document(
        ANSWER,
        (
            Message("system", "Be brief."),
            Message("user", "1+1?"),
            Message("assistant", "2"),
            Message("user", "2+2?\n\nnow"),
        ),
        (2,),
    )
    prompts = [[m.content for m in prompt] for prompt, _ in document_from_row({"messages": long}, "here").examples()]
    assert prompts == [["2+2?"], ["2+2?", "4", "2+2?"], ["2+2?", "4", "2+2?", "4", "2+2?"]]


def test_a_named_text_column_comes_before_every_layout_and_the_plain_one_after(tmp_path):
    row = {"story": "s", "text": "t", "prompt": "2+2?", "completion": "4"}
    assert document_from_row(row, "here", "story") == Document("s")
    assert document_from_row(row, "here") == Document(ANSWER, ASKED)
    assert document_from_row(row | {"story": None}, "here", "story") == Document(ANSWER, ASKED)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": 5}, ["text is 5 (int)", "must be text"]),
        ({"text": ["a"]}, ["text is ['a'] (list)"]),
        ({"text": None, "prompt": None}, ["keys []"]),
        ({"prompt": "q", "completion": None}, ["keys ['prompt']"]),
        ({"prompt": "q", "completion": {"a": 1}}, ["the completion is {'a': 1} (dict)"]),
        ({"prompt": 7, "completion": "a"}, ["prompt is 7 (int)", "must be a list"]),
        ({"messages": "hi"}, ["messages is 'hi' (str)", "must be a list"]),
        ({"messages": ["hi", "ho"]}, ["messages[0] is 'hi'", '"role" and "content"']),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ["messages[1] has only ['role'] filled"]),
        ({"messages": [USER, REPLY | {"content": 4}]}, ["messages[1].content is 4 (int)"]),
        ({"messages": [USER, REPLY | {"role": 4}]}, ["messages[1].role is 4 (int)"]),
        ({"messages": [USER, REPLY | {"role": "tool"}]}, ["role='tool'", "system, user, assistant"]),
        ({"messages": [USER, REPLY | {"tool_calls": [{"id": 1}]}]}, ["messages[1] calls tools"]),
        ({"messages": [USER, REPLY | {"reasoning_content": 4}]}, ["reasoning_content is 4 (int)"]),
        ({"messages": [USER, REPLY | {"content": [{"type": "image"}]}]}, ["messages[1].content, a part is None"]),
        ({"messages": [USER, REPLY, REPLY]}, ["two messages of the assistant in a row"]),
        ({"messages": [USER, REPLY, USER]}, ["ends with a message of the user"]),
        ({"messages": [USER, REPLY | {"weight": 0}]}, ["no reply to learn"]),
        ({"messages": [REPLY]}, ["no reply to learn"]),
        ({"prompt": [USER], "completion": []}, ["completion is empty"]),
        ({"text": "a\ud800b"}, ["text holds half a surrogate pair, '\\ud800' at character 1"]),
        ({"prompt": "\udfff", "completion": "a"}, ["prompt holds half a surrogate"]),
        ({"messages": [USER, REPLY | {"reasoning": "\ud800"}]}, ["reasoning holds half a surrogate"]),
        ({"messages": [USER, REPLY | {"role": "\ud800"}]}, ["messages[1].role holds half a surrogate"]),
        ({"instruction": "a", "output": "b", "history": ["x"]}, ["history holds 'x'", "pairs"]),
        (["text"], ["a list is no document"]),
        (5, ["a int is no document"]),
        (None, ["a NoneType is no document"]),
    ],
)
def test_every_value_of_a_row_is_checked_and_named_with_file_and_line(tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + json.dumps(row))
    with pytest.raises(ValueError) as error:
        list(read_source(SourceConfig(str(path))))
    assert all(word in str(error.value) for word in [f"{path}, line 3: ", *words]), error.value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2: byte 10 is 0xff", "UTF-8"]),
        (b'{"text": "a"}\n' + b'{"a":' * 5000 + b"1" + b"}" * 5000, ["line 2: not JSON", "recursion"]),
        (b'{"text": "a"}\n' + b"[" * 5000 + b"]" * 5000, ["line 2: not JSON"]),
        (b'{"text": ' + b"9" * 5000 + b"}", ["line 1: not JSON", "digits"]),
        ('{"text": "a"}\n'.encode("utf-16"), ["line 1: byte 0 is 0xff", "UTF-8"]),
    ],
)
def test_bytes_that_are_no_rows_are_named_with_file_and_line(tmp_path, content, words):
    for name, data in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content))):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            list(read_source(SourceConfig(str(path))))
        assert all(word in str(error.value) for word in [f"{path}, ", *words]), error.value


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.json.gz"])
def test_a_damaged_archive_is_named_with_file_and_line(tmp_path, name):
    path = tmp_path / name
    whole = gzip.compress("".join(f'{{"text": "{i * 7919 % 99991}"}}\n' for i in range(9000)).encode())
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:-8] + bytes(8), b"no archive"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}, after line \d+: damaged or cut off .*copy the file again"):
            list(read_source(SourceConfig(str(path))))


def test_text_files_keep_their_bytes_but_for_the_byte_order_mark(tmp_path):
    text = "one\r\ntwo\rthree\u2028\n\x0c\ufeff\n"
    for mark in ("", "\ufeff"):
        for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
            (tmp_path / name).write_bytes(pack((mark + text).encode()))
            assert list(read_source(SourceConfig(str(tmp_path / name)))) == [Document(text)]
    pieces = list(read_source(SourceConfig(str(tmp_path / "a.txt"), separator="\r\n")))
    assert [piece.text for piece in pieces] == text.split("\r\n")
    (tmp_path / "a.txt").write_bytes(b"one\r\n\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: byte 0 is 0xe9"):
        list(read_source(SourceConfig(str(tmp_path / "a.txt"))))


def test_rows_of_json_files_may_begin_with_a_byte_order_mark_and_end_in_any_way(tmp_path):
    rows = [{"text": "a\r"}, {"text": "b\u2028"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name, content in (("a.jsonl", lines), ("a.json", json.dumps(rows))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert list(read_source(SourceConfig(str(tmp_path / name)))) == [Document("a\r"), Document("b\u2028")]


def test_a_json_file_holds_one_list_of_rows(tmp_path):
    path = tmp_path / "a.json"
    for content, words in (
        ('{"text": "a"}', r"a\.json: holds a dict; a \.json file holds one list"),
        ('[{"text": "a"}, {"text": 5}]', r"a\.json, row 2: text is 5"),
        ('[{"text": "a"},\n]', r"a\.json: not JSON .*line 2"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            list(read_source(SourceConfig(str(path))))


def test_a_generated_item_is_checked_as_a_row_is():
    with pytest.raises(ValueError, match=rf"{__name__}:unpaired, item 1: the text holds half a surrogate"):
        list(read_source(SourceConfig(f"{__name__}:unpaired")))


def unpaired() -> Iterator[str]:
    yield from ("fine", "\ud800")


def test_parquet_rows_are_read_where_pyarrow_is_there(tmp_path):
    path = tmp_path / "a.parquet"
    source = SourceConfig(str(path))
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"takes pyarrow; pip install 'kogia\[parquet\]'"):
            list(read_source(source))
        return
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    rows = [
        {"messages": [USER, REPLY], "text": None},
        {"messages": None, "text": "t"},
        {"messages": None, "text": None},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows[:2]), path)
    assert list(read_source(source)) == [Document(ANSWER, ASKED), Document("t")]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 3: keys \[\]"):
        list(read_source(source))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet, after row 0: not readable as parquet"):
        list(read_source(source))


def test_files_named_on_the_command_line_take_the_place_of_a_recipes_sources(tmp_path):
    recipe = tmp_path / "a.toml"
    recipe.write_text('out = "o"\n[data]\nmax_seqlen = 9\n[[data.sources]]\nspec = "old.txt"\n')
    expected = DataConfig((SourceConfig("a.jsonl"), SourceConfig("m:f")), max_seqlen=9)
    for flags in (["--data", "a.jsonl", "m:f"], ["--data.files", "a.jsonl", "m:f"]):
        config = parse_args(SupervisedConfig, [str(recipe), *flags], prog="p", description="d")
        assert config.data == expected
        assert from_dict(SupervisedConfig, to_dict(config)) == config
    assert parse_args(SupervisedConfig, [str(recipe)], prog="p", description="d").data.sources[0].spec == "old.txt"


COLUMNS = ("messages", "prompt", "completion", "conversations", "instruction", "input", "output", "history", "text")
KEYS = (*COLUMNS, "system", "role", "content", "from", "value", "reasoning_content", "weight", "tool_calls", "type")
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "text", "", "<think>", "</think>", "a\ud800"]) | st.text(
    max_size=5
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(COLUMNS), VALUES) | VALUES)
def test_any_row_is_a_document_of_sound_text_or_an_error_that_begins_with_its_place(row):
    try:
        document, message = document_from_row(row, "file, line 7"), "file, line 7: none"
    except ValueError as error:
        document, message = Document("none"), str(error)
    assert message.startswith("file, line 7: ")
    for prompt, reply in document.examples():
        for text in (reply, *(message.content for message in prompt)):
            assert text.encode().decode() == text
        assert not prompt or prompt[-1].role == "user"


def test_a_pattern_is_its_files_in_the_order_of_their_names_and_a_row_says_which(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.jsonl", "a.jsonl", "more/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "more" / "notes.md").write_text("no data")
    found = [document.text for document in read_source(SourceConfig(str(tmp_path / "*.jsonl")))]
    assert found == ["a.jsonl", "b.jsonl"]
    deep = list(read_source(SourceConfig(str(tmp_path / "**"), num=3)))
    assert [document.text for document in deep] == ["a.jsonl", "b.jsonl", "more/c.jsonl"]
    assert deep[2].where.endswith("more/c.jsonl, line 1")
    with pytest.raises(ValueError, match=r"no file of this pattern \(looked in .*more\)"):
        list(read_source(SourceConfig(str(tmp_path / "more" / "*.txt"))))


def test_a_template_makes_a_text_of_several_columns_and_names_one_that_is_missing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "2+2?", "solution": "{4}"}\n{"question": "3+3?"}\n')
    plain = read_source(SourceConfig(str(path), template="{question} = {solution}"))
    assert next(plain) == Document("2+2? = {4}")
    with pytest.raises(
        ValueError, match=r"line 2: template .* needs the column 'solution'; there is only \['question'\]"
    ):
        next(plain)


def test_a_data_set_of_the_hub_is_its_files_in_the_cache_and_else_says_how_to_get_them(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "datasets--deep--songs"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    for name in ("data/b.jsonl", "data/a.jsonl", "readme.md"):
        (place / "snapshots" / revision / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "snapshots" / revision / name).write_text(json.dumps({"text": name}) + "\n")
    for spec in ("hf:deep/songs", "hf:deep/songs/data/*.jsonl"):
        assert [d.text for d in read_source(SourceConfig(spec))] == ["data/a.jsonl", "data/b.jsonl"]
    with pytest.raises(ValueError, match="hf download --repo-type dataset deep/dives"):
        list(read_source(SourceConfig("hf:deep/dives")))
    with pytest.raises(ValueError, match="write it as hf:org/name"):
        list(read_source(SourceConfig("hf:songs")))


@pytest.mark.parametrize("name", ["books.txt", "rows.jsonl", "rows.json.gz", "rows.parquet"])
def test_what_git_lfs_has_not_fetched_is_no_data(tmp_path: Path, name: str):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"{name}: stands for a file that Git LFS has not fetched"):
        list(read_source(SourceConfig(str(tmp_path / name))))
