"""The commands of a chat: what they change, what they tell, and what they refuse."""

import json

import pytest
from tokenizer_families import V31, write_deepseek

from kogia.data.rows import conversation as read_conversation
from kogia.engine.request import SamplingParams
from kogia.inference.conversation import COMMANDS, HELP, Conversation
from kogia.inference.llm import LLM
from kogia.text.chat import Message
from kogia.text.tokenizer import Tokenizer


@pytest.fixture
def chat(llm: LLM) -> Conversation:
    return Conversation(llm, SamplingParams(max_tokens=4))


def spoken(chat: Conversation) -> Conversation:
    chat.turns += [Message("user", "2+2?"), Message("assistant", "4", "two and two")]
    return chat


def test_every_command_is_in_the_help_and_fits_80_columns():
    assert all(command.usage in HELP for command in COMMANDS.values()) and "/exit" in HELP
    assert max(map(len, HELP.splitlines())) <= 80


def test_the_system_message_is_set_shown_and_removed(chat):
    assert chat.obey("/system") == "no system message"
    assert chat.obey("/system  be brief ") == "system message: be brief"
    spoken(chat)
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "be brief"), ("user", "2+2?"), ("assistant", "4"),
    ]  # fmt: skip
    chat.obey("/system none")
    assert [m.role for m in chat.messages] == ["user", "assistant"]


def test_a_reset_forgets_what_was_said_and_keeps_the_settings(chat):
    chat.obey("/system be brief")
    spoken(chat).obey("/reset")
    assert [m.role for m in chat.messages] == ["system"]


def test_thoughts_are_switched_where_the_template_can(chat, llm, tmp_path):
    for command in ("/think", "/nothink"):
        with pytest.raises(ValueError, match="chat template has no switch for thoughts"):
            chat.obey(command)
    hybrid = Tokenizer.load(write_deepseek(tmp_path, V31))
    chat.llm = type("LLM", (), {"tokenizer": hybrid})()
    assert chat.obey("/nothink") == "from now on without thoughts" and chat.thinking is False
    assert chat.obey("/think") == "from now on with thoughts" and chat.thinking is True
    chat.turns.append(Message("user", "2+2?"))
    assert chat.prompt().opens_thought


def test_a_saved_conversation_reads_back_with_its_thoughts(chat, tmp_path):
    chat.obey("/system be brief")
    path = tmp_path / "chat.jsonl"
    assert str(path) in spoken(chat).obey(f"/save {path}")
    row = json.loads(path.read_text())
    assert read_conversation(row["messages"], "messages") == chat.messages


def test_nothing_is_saved_over_a_file_or_without_a_name_or_words(chat, tmp_path):
    with pytest.raises(ValueError, match="nothing was said yet"):
        chat.obey(f"/save {tmp_path / 'a.jsonl'}")
    spoken(chat)
    with pytest.raises(ValueError, match="name a file"):
        chat.obey("/save")
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        chat.obey(f"/save {tmp_path / 'a.jsonl'}")
    with pytest.raises((ValueError, OSError), match="a.jsonl"):
        chat.obey(f"/save {tmp_path / 'a.jsonl' / 'b.jsonl'}")
    assert (tmp_path / "a.jsonl").read_text() == "mine"


def test_experts_are_shown_and_changed_for_the_answers_that_follow(chat):
    assert chat.obey("/experts") == "2 of 4 routed experts per token; trained with 2"
    assert chat.obey("/experts 1") == "1 of 4 routed experts per token; trained with 2"
    assert chat.params.active_experts == 1
    for wrong in ("0", "5", "-1", "many"):
        with pytest.raises(ValueError, match="experts"):
            chat.obey(f"/experts {wrong}")
    assert chat.params.active_experts == 1


def test_stats_tell_tokens_speed_and_context(chat, llm):
    llm.chat([Message("user", "hello")], SamplingParams(max_tokens=3))
    chat.num_tokens = 12
    shown = chat.obey("/stats")
    assert f"{llm.engine.stats.num_generated_tokens:,} tokens generated" in shown
    assert f"12 of the context's {llm.model.config.max_position:,} tokens" in shown


@pytest.mark.parametrize("line", ["/what", "/systematic", "/Save x", "/"])
def test_what_is_no_command_is_said_with_those_there_are(chat, line):
    with pytest.raises(ValueError, match="unknown command /"):
        chat.obey(line)
