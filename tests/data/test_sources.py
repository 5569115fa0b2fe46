import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kogia.data.config import DataConfig, SourceConfig
from kogia.data.sources import Document, document_from_row, read_source
from kogia.text.chat import Message, parse_response


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
        list(read_source(SourceConfig("corpus.parquet")))
    with pytest.raises(ValueError, match=r"colour.*texts\(num"):
        list(read_source(SourceConfig(f"{__name__}:texts", num=1, options={"colour": 1})))
    with pytest.raises(ValueError, match="weight = 0"):
        SourceConfig("a.txt", weight=0)
    with pytest.raises(ValueError, match="batch_tokens = 8"):
        DataConfig(batch_tokens=8, max_seqlen=16)
