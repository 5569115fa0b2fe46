"""`kogia chat`: lines in, styled answers out."""

import io
import os
import signal

import pytest
from rich.console import Console

from kogia import cli
from kogia.engine.output import printable
from kogia.engine.request import SamplingParams
from kogia.inference import chat as chat_command
from kogia.inference.chat import ThoughtStyle
from kogia.inference.config import ChatConfig
from kogia.inference.llm import LLM
from kogia.text.chat import Message, Prompt


def test_chat_command_answers_lines_of_stdin_and_keeps_the_conversation(directory, monkeypatch, capsys, llm):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand again\n/reset\nhello\n/what\n"))
    config = ChatConfig(path=str(directory), max_tokens=9, seed=4, device="cpu")
    assert chat_command.main(config) == 0
    out = capsys.readouterr().out
    assert out.count("tokens/s") == 3
    assert "unknown command /what" in out
    params = SamplingParams(max_tokens=9, seed=4, temperature=0.6, top_p=0.95)
    (first,) = llm.chat([Message("user", "hello")], params)
    assert out.count(first.text.split("</think>")[0]) >= 2  # the same answer again after /reset


def test_chat_command_samples_with_every_filter(directory, monkeypatch, capsys, llm):
    (greedy,) = llm.chat([Message("user", "hello")], SamplingParams(temperature=0, max_tokens=9))
    for flags in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        words = ["--temperature", "5", "--max-tokens", "9", "--device", "cpu", *flags]
        assert cli.main(["chat", str(directory), *words]) == 0
        assert printable(greedy.text.split("</think>")[0]) in capsys.readouterr().out


def test_chat_command_survives_a_question_that_is_too_long(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("x " * 300 + "\nhello\n"))
    assert chat_command.main(ChatConfig(path=str(directory), max_tokens=4, seed=4, device="cpu")) == 0
    captured = capsys.readouterr()
    assert "or /reset the conversation" in captured.err.replace("\n", " ")
    assert captured.out.count("tokens/s") == 1


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n"))
    original, pressed = LLM.stream, []

    def stream(self, *args):
        for number, event in enumerate(original(self, *args)):
            if number == 3 and not pressed:
                pressed.append(True)
                os.kill(os.getpid(), signal.SIGINT)
            yield event

    monkeypatch.setattr(LLM, "stream", stream)
    config = ChatConfig(path=str(directory), max_tokens=9, seed=1, draft_tokens=0, device="cpu")
    before = signal.getsignal(signal.SIGINT)
    assert chat_command.main(config) == 0
    out = capsys.readouterr().out
    assert out.count("stopped") == 1
    assert out.count("tokens/s") == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_command_stops_drafting_when_drafts_are_hardly_ever_right(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n"))
    config = ChatConfig(path=str(directory), max_tokens=90, seed=4, device="cpu", single=True)
    assert chat_command.main(config) == 0
    summaries = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert ["drafts" in line for line in summaries] == [True, False, False]


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, color_system="standard", width=200), file


@pytest.mark.parametrize(
    ("pieces", "dim", "normal"),
    [
        (("\n<th", "ink>", "\na", "b</think>", "c"), "ab", "\nc\n"),
        (("<thin", " air>"), "", "<thin air>\n"),
        (("a</think>",), "", "a</think>\n"),
        (("<think",), "", "<think\n"),
    ],
)
def test_an_answer_to_a_prompt_that_opens_no_thought_is_dimmed_only_if_it_opens_one(pieces, dim, normal):
    file = io.StringIO()
    style = ThoughtStyle(
        Console(file=file, force_terminal=True, color_system="standard", width=200), Prompt([], opens_thought=False)
    )
    for piece in pieces:
        style.write(piece)
    style.close()
    parts = file.getvalue().split("\x1b[0m")
    assert "".join(part.removeprefix("\x1b[2m") for part in parts[:-1]) == dim
    assert parts[-1] == normal


def test_thoughts_are_dimmed_until_the_mark_even_in_pieces():
    file = io.StringIO()
    style = ThoughtStyle(
        Console(file=file, force_terminal=True, color_system="standard", width=200), Prompt([], opens_thought=True)
    )
    for piece in ("let me <", "think", "</", "thi", "nk>the answer", " </think>"):
        style.write(piece)
    style.close()
    dim, normal = file.getvalue().rsplit("\x1b[0m", 1)
    assert dim.replace("\x1b[2m", "").replace("\x1b[0m", "") == "let me <think"
    assert normal == "\nthe answer </think>\n"
