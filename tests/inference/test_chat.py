"""`kogia chat`: lines in, styled answers out."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from rich.console import Console

from kogia import cli
from kogia.checkpoint.hf import save_model
from kogia.checkpoint.open import open_model
from kogia.engine.draft_switch import DraftSwitch
from kogia.engine.output import printable
from kogia.engine.request import SamplingParams
from kogia.inference import chat as chat_command
from kogia.inference.chat import ThoughtStyle
from kogia.inference.config import ChatConfig
from kogia.inference.conversation import Conversation
from kogia.inference.llm import LLM
from kogia.text.chat import Message, Prompt
from kogia.text.tokenizer import Tokenizer


def test_chat_command_answers_lines_of_stdin_and_keeps_the_conversation(directory, monkeypatch, capsys, llm):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand again\n/reset\nhello\n/what\n"))
    config = ChatConfig(path=str(directory), max_tokens=9, seed=4, device="cpu")
    assert chat_command.main(config) == 0
    out = capsys.readouterr().out
    assert out.count("tokens/s") == 3
    assert "unknown command /what" in out
    params = SamplingParams(max_tokens=9, seed=4, temperature=0.6, top_p=0.95)
    (first,) = llm.chat([Message("user", "hello")], params)
    assert out.count(first.text.split("</think>")[0].strip()) >= 2  # the same answer again after /reset


def test_a_loaded_model_begins_to_answer_within_a_second(directory):
    loaded = LLM(directory, device="cpu", num_draft_tokens=None, max_sequences=1)
    conversation = Conversation(loaded, SamplingParams(max_tokens=50), turns=[Message("user", "hello")])
    started = time.process_time()  # of this process alone: the machine may have other things to do
    next(loaded.stream(conversation.prompt(), conversation.params))
    assert time.process_time() - started < 1


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
    """By the clock, which here says what a large model's would: a step with drafts takes a half more."""
    note = DraftSwitch.note
    monkeypatch.setattr(DraftSwitch, "note", lambda *it: note(*it[:3], 1.5 if it[2] else 1.0, it[4]))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\nd\ne\nf\n"))
    config = ChatConfig(path=str(directory), max_tokens=90, seed=4, device="cpu", single=True)
    assert chat_command.main(config) == 0
    summaries = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    drafted = ["drafts" in line for line in summaries]
    assert len(drafted) == 6 and drafted[0] and not all(drafted)


@pytest.mark.parametrize(
    ("own", "flags", "expected"),
    [
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {}, (0.7, 20, 0.8, 0.0)),
        ({"temperature": 0.7, "top_k": 20}, {"temperature": 0.0, "min_p": 0.5}, (0.0, 20, 0.95, 0.5)),
        ({"temperature": None, "min_p": 0.25, "max_new_tokens": 3}, {}, (0.6, 0, 0.95, 0.25)),
        ({"do_sample": False, "temperature": 0.9}, {}, (0.0, 0, 0.95, 0.0)),
        ({"do_sample": False}, {"temperature": 0.5}, (0.5, 0, 0.95, 0.0)),
    ],
)
def test_what_the_models_makers_say_is_the_default_and_flags_come_first(own, flags, expected):
    sampling = ChatConfig("m", **flags).sampling(own)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == expected
    assert sampling.max_tokens == 2048


def test_values_of_the_model_that_will_not_do_are_named_with_their_file():
    for own in ({"temperature": -1}, {"top_k": -1}, {"top_p": 1.5}):
        with pytest.raises(
            ValueError, match=r"generation_config.json of the model: (temperature|top_k|top_p) = .*must"
        ):
            ChatConfig("m").sampling(own)
    assert ChatConfig("m", temperature=0.5).sampling({"temperature": -1}).temperature == 0.5


def test_chat_samples_as_the_model_asks_and_a_saved_model_still_does(directory, tmp_path, monkeypatch, capsys):
    model, tokenizer, _ = open_model(directory, device="cpu")
    own = {"temperature": 5.0, "top_k": 1, "repetition_penalty": 1.1}
    tokenizer.generation = {**tokenizer.generation, **own}
    first = save_model(model, tmp_path / "first", tokenizer)
    again = save_model(model, tmp_path / "again", Tokenizer.load(first))
    written = json.loads((again / "generation_config.json").read_text())
    assert own.items() <= written.items() and written["eos_token_id"] == tokenizer.eos_id
    greedy = SamplingParams(temperature=0, max_tokens=9)
    (expected,) = LLM(again, device="cpu").chat([Message("user", "hello")], greedy)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", str(again), "--max-tokens", "9", "--device", "cpu"]) == 0
    assert printable(expected.text.split("</think>")[0]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--temperature", "-1"], "temperature = -1.0: must be"),
        (["--top-k", "-1"], "top_k = -1: must be"),
        (["--draft-tokens", "-1"], "num_draft_tokens = -1: must be at least 0"),
        (["--engine.block-size", "0"], "engine.block_size = 0"),
        (["--thinking", "True"], "thinking = True: this model's chat template has no such switch"),
        (["--device", "nowhere"], "device = 'nowhere'"),
    ],
)
def test_what_will_not_do_is_said_before_the_weights_are_read(directory, tmp_path, flags, reason, capsys):
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="2"):
        sys.exit(cli.main(["chat", str(tmp_path / "model"), *flags]))
    captured = capsys.readouterr()
    assert reason in " ".join((captured.out + captured.err).replace("│", " ").split())


def test_drafts_that_a_model_cannot_make_are_refused_before_its_weights_are_read(directory, tmp_path, capsys):
    shutil.copytree(directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    (tmp_path / "model" / "model.safetensors").unlink()
    for flag in ("--draft-tokens", "--engine.num-draft-tokens"):
        assert cli.main(["chat", str(tmp_path / "model"), flag, "2"]) == 2
        assert "the model has no MTP module to draft with" in " ".join(capsys.readouterr().err.split())


def test_engine_flags_reach_the_engine_of_a_chat(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    flags = ["--engine.num-blocks", "1", "--engine.block-size", "32", "--max-tokens", "90", "--device", "cpu"]
    assert cli.main(["chat", str(directory), "--seed", "1", *flags]) == 0
    captured = capsys.readouterr()
    assert "the whole cache holds 32 tokens" in " ".join(captured.err.split())
    assert "cut off" in captured.out


SPOKEN = [
    ("one\ntwo\n", [("one", False), ("two", False)]),
    ("a \\\nb\\\n\nc\n", [("a \nb", False), ("c", False)]),
    ('"""a\n\n  b"""\nc\n', [("a\n\n  b", False), ("c", False)]),
    ('"""\n/exit\n"""\n', [("/exit", False)]),
    ('"""/exit"""\n/exit\n', [("/exit", False), ("/exit", True)]),
    ('"""open\nend', [("open\nend", False)]),
    ("a\\", [("a", False)]),
    (" \n\n/help\n", [("/help", True)]),
]


@pytest.mark.parametrize(("text", "said"), SPOKEN)
def test_questions_may_have_several_lines(text, said, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert list(chat_command._questions(Console())) == said


def test_help_and_exit_are_obeyed(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\nhello\n/exit\nhello\n"))
    assert cli.main(["chat", str(directory), "--max-tokens", "4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "/reset" in out and "/exit" in out
    assert out.count("tokens/s") == 1


@contextlib.contextmanager
def talk(directory, home, *flags):
    """A terminal with a chat in it that waits for a question; left with /exit."""
    words = ["chat", str(directory), "--temperature", "0", "--max-tokens", "9", "--single", "--device", "cpu", *flags]
    keyboard, screen = pty.openpty()
    command = [sys.executable, "-m", "kogia.cli", *words]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "NO_COLOR": "1", "XDG_STATE_HOME": str(home)}
    chat = subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen, env=environment)
    os.close(screen)
    try:
        wait_for(keyboard, "> ")
        yield keyboard
        os.write(keyboard, b"/exit\r")
        assert chat.wait(timeout=60) == 0
    finally:
        chat.kill()
        os.close(keyboard)


def test_lines_are_edited_and_brought_back_in_a_terminal(directory, tmp_path, llm):
    pytest.importorskip("readline")
    (expected,) = llm.chat([Message("user", "hello")], SamplingParams(temperature=0, max_tokens=9))
    with talk(directory, tmp_path) as keyboard:
        os.write(keyboard, b"helo\x1b[Dl\r")  # left, then the letter that was missing
        answers = [wait_for(keyboard, "tokens/s")]
        os.write(keyboard, b"\x1b[A\r")  # up: the same again
        answers.append(wait_for(keyboard, "tokens/s"))
    with talk(directory, tmp_path) as keyboard:
        os.write(keyboard, b"\x1b[A\x1b[A\r")  # up in the next chat, and past its predecessor's /exit
        answers.append(wait_for(keyboard, "tokens/s"))
    shown = printable(expected.text.split("</think>")[0]).split()[0]
    for answer in answers:
        assert shown in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", answer)
    path = tmp_path / "kogia" / "chat_history"
    assert path.read_text() == "hello\n/exit\nhello\n/exit\n"
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)


def test_a_chat_that_keeps_no_history_touches_none(directory, tmp_path):
    pytest.importorskip("readline")
    path = tmp_path / "kogia" / "chat_history"
    path.parent.mkdir()
    path.write_text("a secret\n")
    with talk(directory, tmp_path, "--no-history") as keyboard:
        os.write(keyboard, b"\x1b[Ahello\r")
        assert "a secret" not in wait_for(keyboard, "tokens/s")
    assert path.read_text() == "a secret\n"


def wait_for(terminal: int, text: str) -> str:
    """What a terminal shows up to `text`."""
    shown = b""
    while text.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, shown
        shown += os.read(terminal, 4096)
    return shown.decode(errors="replace")


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
