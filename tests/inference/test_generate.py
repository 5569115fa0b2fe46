"""`kogia generate`: prompts from anywhere, completions as rows or as text."""

import io
import json

import pytest

from kogia import cli
from kogia.engine.request import SamplingParams
from kogia.inference.config import GenerateConfig
from kogia.inference.generate import read_prompts
from kogia.inference.llm import LLM
from kogia.text.chat import Message


def test_generate_command_writes_one_json_line_per_completion(directory, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    out = tmp_path / "out.jsonl"
    flags = ["--n", "2", "--max-tokens", "8", "--seed", "1", "--device", "cpu", "--engine.num-draft-tokens", "1"]
    assert cli.main(["generate", str(directory), "--file", str(prompts), "--out", str(out), *flags]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["prompt"], row["index"]) for row in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    llm = LLM(directory, device="cpu")
    params = SamplingParams(n=2, max_tokens=8, seed=1, temperature=0.6, top_p=0.95)
    expected = llm.chat([Message("user", "two")], params)
    assert [row["text"] for row in rows[2:]] == [completion.text for completion in expected]
    assert [row["num_tokens"] for row in rows[2:]] == [len(completion.token_ids) for completion in expected]
    assert "tokens/s" in capsys.readouterr().err


def test_generate_command_continues_raw_text_on_stdout(directory, capsys):
    flags = ["--raw", "--max-tokens", "8", "--temperature", "0", "--device", "cpu"]
    assert cli.main(["generate", str(directory), "--prompt", "the answer", *flags]) == 0
    (expected,) = LLM(directory, device="cpu").generate("the answer", SamplingParams(max_tokens=8, temperature=0))[0]
    assert capsys.readouterr().out == expected.text + "\n"


def test_generate_command_names_what_is_missing(directory, tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    assert cli.main(["generate", str(directory), "--file", str(bad)]) == 2
    assert "bad.jsonl, line 2: must be a JSON object with a 'prompt'" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ValueError, match="stdin holds no prompt"):
        read_prompts(GenerateConfig(path=str(directory)))


def test_generate_command_reads_answers_of_a_model_that_opens_no_thought(qwen, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--prompt", "one", "--max-tokens", "8", "--seed", "1", "--device", "cpu", "--thinking", "False"]
    assert cli.main(["generate", str(qwen), "--out", str(out), *flags]) == 0
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    params = SamplingParams(max_tokens=8, seed=1, temperature=0.6, top_p=0.95)
    (expected,) = LLM(qwen, device="cpu").chat([Message("user", "one")], params, thinking=False)
    assert row["text"] == expected.text
    assert (row["thinking"], row["answer"]) == (None, expected.text.strip())


def test_a_byte_order_mark_before_prompts_is_no_part_of_the_first(tmp_path, monkeypatch):
    for name, content in (("a.txt", "one\ntwo\n"), ("a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_prompts(GenerateConfig(path="m", file=str(tmp_path / name))) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffone\ntwo\n"))
    assert read_prompts(GenerateConfig(path="m")) == ["one", "two"]
