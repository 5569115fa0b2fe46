"""`kogia generate`: prompts from anywhere, completions as rows or as text."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from e2e.kogia_cli import start

from kogia import cli
from kogia.engine.request import SamplingParams
from kogia.inference.config import GenerateConfig
from kogia.inference.generate import read_prompts
from kogia.inference.llm import LLM
from kogia.inference.prompts import Question
from kogia.text.chat import Message

ONE_TWO = [Question.of("one"), Question.of("two")]


def test_answers_in_a_format_with_short_thoughts_and_the_log_probability_of_each_token(directory, tmp_path):
    pytest.importorskip("llguidance", reason="formats take llguidance: pip install 'kogia[grammars]'")
    schema, out = tmp_path / "schema.json", tmp_path / "out.jsonl"
    schema.write_text('{"enum": [17, 18]}')
    flags = ["--json-schema", str(schema), "--thinking-token-budget", "5", "--logprobs", "--max-tokens", "20"]
    command = ["generate", str(directory), "--prompt", "one", "--seed", "1", "--device", "cpu", "--out", str(out)]
    assert cli.main([*command, *flags]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["answer"] in ("17", "18")
    assert len(row["logprobs"]) == row["num_tokens"] <= 5 + 4


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    "text, flags, said",
    [
        (None, [], "cannot be read"),
        ('{"type":', [], "response_format.json is no JSON"),
        ("{}", ["--thinking-token-budget", "0"], "thinking_token_budget = 0: must be at least 1"),
    ],
)
def test_a_format_or_a_budget_that_is_none_is_refused_before_the_model_is_loaded(
    directory, tmp_path, capsys, command, text, flags, said
):
    schema = tmp_path / "schema.json"
    if text is not None:
        schema.write_text(text)
    prompt = ["--prompt", "one"] if command == "generate" else []
    try:
        code = cli.main([command, str(directory), *prompt, "--json-schema", str(schema), *flags])
    except SystemExit as end:  # a mistake in a flag
        code = end.code
    assert code == 2
    err = " ".join(capsys.readouterr().err.split())
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("own", "flags", "expected"),
    [
        ({"do_sample": False}, [], {"temperature": 0.0, "top_p": 0.95}),
        ({"do_sample": True, "temperature": 1.0, "top_k": 3}, [], {"temperature": 1.0, "top_k": 3, "top_p": 0.95}),
        ({"do_sample": False, "top_p": 0.5}, ["--temperature", "1.0"], {"temperature": 1.0, "top_p": 0.5}),
    ],
)
def test_generate_samples_as_the_model_says_where_nothing_is_asked(directory, tmp_path, capsys, own, flags, expected):
    model = shutil.copytree(directory, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | own))
    asked = ["--prompt", "the answer", "--max-tokens", "8", "--seed", "1", "--device", "cpu"]
    assert cli.main(["generate", str(model), *asked, *flags]) == 0
    params = SamplingParams(max_tokens=8, seed=1, **expected)
    (completion,) = LLM(model, device="cpu").chat([Message("user", "the answer")], params)
    assert capsys.readouterr().out == completion.text + "\n"


def test_generate_command_refuses_what_a_model_says_of_sampling_that_cannot_be(directory, tmp_path, capsys):
    model = shutil.copytree(directory, tmp_path / "model")
    (model / "generation_config.json").write_text('{"top_p": 2.0, "eos_token_id": 1}')
    assert cli.main(["generate", str(model), "--prompt", "a"]) == 2
    assert "generation_config.json of the model: top_p = 2.0" in " ".join(capsys.readouterr().err.split())
    assert (
        cli.main(["generate", str(model), "--prompt", "a", "--top-p", "1", "--max-tokens", "2", "--device", "cpu"]) == 0
    )


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
    assert "bad.jsonl, line 2: keys ['question']: must be a JSON object with a 'prompt'" in capsys.readouterr().err
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
        assert read_prompts(GenerateConfig(path="m", file=str(tmp_path / name))) == ONE_TWO
    for text in ("\ufeffone\ntwo\n", '\ufeff{"prompt": "one"}\n{"prompt": "two"}\n'):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert read_prompts(GenerateConfig(path="m")) == ONE_TWO


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]


def test_rows_with_messages_are_asked_as_conversations_and_keep_their_columns(directory, tmp_path, monkeypatch, llm):
    rows = [
        {"id": 7, "prompt": CHAT, "answer": "2", "meta": {"level": [1]}},
        {"messages": CHAT[1:], "text": "a", "input_text": "b"},
        {"prompt": "two", "messages": []},
    ]
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in rows)))
    flags = ["--max-tokens", "8", "--temperature", "0", "--device", "cpu", "--system", "be brief"]
    assert cli.main(["generate", str(directory), "--out", str(out), *flags]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    (expected,) = llm.chat(CHAT, SamplingParams(max_tokens=8, temperature=0))
    assert [row["text"] for row in written] == [expected.text] * 3
    kept = {"id": 7, "prompt": CHAT, "input_answer": "2", "meta": {"level": [1]}}
    assert kept.items() <= written[0].items()
    assert written[0]["answer"] == expected.answer
    assert {"messages": CHAT[1:], "input_input_text": "a", "input_text": "b"}.items() <= written[1].items()
    assert written[2]["prompt"] == "two"


def test_rows_come_from_any_file_of_rows(tmp_path):
    rows = [{"prompt": "one"}, {"prompt": CHAT, "day": 3}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.prompts").write_text(lines)
    (tmp_path / "d.txt").write_text(lines)
    for name in ("a.json", "b.jsonl.gz", "c.prompts", "d.txt"):
        first, second = read_prompts(GenerateConfig(path="m", file=str(tmp_path / name)))
        assert first == Question.of("one")
        assert second == Question((Message("system", "be brief"), Message("user", "two")), rows[1])


def test_text_that_only_looks_like_json_stays_text(monkeypatch):
    for text in ('{"a": 1}', "[1, 2]", '{"prompt": ', '"prompt"', "[" * 20_000):
        monkeypatch.setattr("sys.stdin", io.StringIO(f'{text}\n{{"prompt": "x"}}\n'))
        assert [question.asked for question in read_prompts(GenerateConfig(path="m"))] == [text, '{"prompt": "x"}']


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": 5}', r"prompt is 5 \(int\): must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "the last must be"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\] has only \['content'\]"),
        ('{"messages": "hello"}', "messages is 'hello' .str.: must be a list"),
        ('{"prompt": "\\ud800"}', "prompt"),
        ('{"prompt": ""}', "must be a JSON object with a 'prompt'"),
        ("[]", "a list: must be a JSON object"),
        ('{"prompt"', "not JSON"),
    ],
)
def test_a_row_that_asks_nothing_is_named_by_its_line(row, reason, tmp_path, monkeypatch):
    text = f'{{"prompt": "fine"}}\n\n{row}\n'
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{reason}"):
        read_prompts(GenerateConfig(path="m", file=str(tmp_path / "rows.jsonl")))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(ValueError, match=f"stdin, line 3: .*{reason}"):
        read_prompts(GenerateConfig(path="m"))


def test_a_place_that_cannot_be_written_is_said_before_the_model_is_opened(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path / "no-model"), "--prompt", "x", "--out", str(tmp_path)]) == 2
    assert "is a directory; name a file" in " ".join(capsys.readouterr().err.split())


def test_completions_go_through_a_link(directory, tmp_path, capsys):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    flags = ["--prompt", "x", "--max-tokens", "2", "--device", "cpu", "--out", str(tmp_path / "link.jsonl")]
    assert cli.main(["generate", str(directory), *flags]) == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert json.loads((tmp_path / "real.jsonl").read_text())["prompt"] == "x"


def test_completions_on_standard_output_leave_the_file_that_the_shell_sends_it_to(directory, tmp_path):
    words = [
        "generate",
        str(directory),
        "--prompt",
        "x",
        "--max-tokens",
        "2",
        "--device",
        "cpu",
        "--out",
        "/dev/stdout",
    ]
    with (tmp_path / "log.txt").open("a") as file:
        before = os.fstat(file.fileno())
        for _ in range(2):
            subprocess.run([sys.executable, "-m", "kogia.cli", *words], stdout=file, check=True, timeout=100)
    assert os.path.samestat(before, (tmp_path / "log.txt").stat())
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["x", "x"]


def test_messages_are_not_continued_as_raw_text(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"messages": CHAT}) + "\n"))
    assert cli.main(["generate", str(directory), "--raw", "--device", "cpu"]) == 2
    assert "leave out --raw" in capsys.readouterr().err


def flags_of(directory, prompts, out, *more) -> list[str]:
    """Four prompts, one after the other, that never end by themselves."""
    return ["generate", str(directory), "--file", str(prompts), "--out", str(out), "--n", "2", "--max-tokens", "100",
            "--seed", "1", "--device", "cpu", "--engine.max-sequences", "2", *more]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"the answer is {i}", "day": [i]}) + "\n" for i in range(6)))
    return file


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_has_written_what_was_there_and_goes_on_to_the_same_file(
    directory, prompts, tmp_path, number, capsys
):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert cli.main(flags_of(directory, prompts, whole)) == 0
    process = start(tmp_path, *flags_of(directory, prompts, parts))
    while not (parts.exists() and parts.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert "the same command with --resume goes on" in " ".join(err.split())
    num_kept = parts.read_bytes().count(b"\n") // 2
    assert 1 <= num_kept < 6
    assert whole.read_bytes().startswith(b"\n".join(parts.read_bytes().split(b"\n")[: 2 * num_kept]))
    capsys.readouterr()
    assert cli.main(flags_of(directory, prompts, parts)) == 2
    assert "--resume goes on with them" in " ".join(capsys.readouterr().err.split())
    assert cli.main(flags_of(directory, prompts, parts, "--temperature", "1", "--resume")) == 2
    assert "was begun with temperature = 0.6, and now it is 1.0" in " ".join(capsys.readouterr().err.split())
    assert cli.main(flags_of(directory, prompts, parts, "--resume")) == 0
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.jsonl", "prompts.jsonl", "whole.jsonl"]


def test_a_run_that_is_complete_or_was_never_begun_is_told_apart_on_resume(directory, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert cli.main(flags_of(directory, prompts, out, "--resume")) == 2
    assert "nothing was begun" in capsys.readouterr().err
    assert cli.main(flags_of(directory, prompts, out)) == 0
    before = out.read_bytes()
    assert cli.main(flags_of(directory, prompts, out, "--resume")) == 0
    assert "is complete" in capsys.readouterr().err
    for change in (lambda text: text.replace("is 3", "is 33"), lambda text: text + '{"prompt": "more"}\n'):
        prompts.write_text(change(prompts.read_text()))
        assert cli.main(flags_of(directory, prompts, out, "--resume")) == 2
    assert out.read_bytes() == before
    with pytest.raises(ValueError, match="name it with --out"):
        GenerateConfig(str(directory), resume=True)


def test_a_thinking_switch_that_is_not_there_is_said_before_the_model_is_loaded(directory, tmp_path, capsys):
    copy = shutil.copytree(directory, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    assert cli.main(["generate", str(copy), "--prompt", "x", "--thinking", "false"]) == 2
    assert "thinking = False: this model's chat template has no such switch" in " ".join(
        capsys.readouterr().err.split()
    )
