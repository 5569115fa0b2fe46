"""Texts that spell a model's marks stay texts in its prompts; all others are tokenised as ever."""

import json
import shutil
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import LLAMA3, QWEN3, R1, V3, V31, write_deepseek, write_llama2, write_llama3, write_qwen

from kogia.text.chat import Message, Prompt, ToolCall, continue_prompt, has_thinking_switch, render_prompt
from kogia.text.marks import Marks
from kogia.text.tokenizer import Tokenizer, train_bpe

WRITERS = {
    "r1": lambda path: write_deepseek(path, R1),
    "v3": lambda path: write_deepseek(path, V3),
    "v3.1": lambda path: write_deepseek(path, V31),
    "qwen3": lambda path: write_qwen(path, QWEN3),
    "llama2": write_llama2,
    "llama3": lambda path: write_llama3(path, LLAMA3),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("marks")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module", params=[*WRITERS, "built-in"])
def tokenizer(request, directories):
    if request.param == "built-in":
        return train_bpe(["the answer is 42. " * 20], 300)
    return Tokenizer.load(directories[request.param])


def mark_ids(tokenizer: Tokenizer) -> set[int]:
    """Of special tokens, and of the tags that Qwen only adds."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token_id for token_id, token in added.items() if token.special or token.content.startswith("<")}


def num_marks(tokenizer: Tokenizer, prompt: Prompt) -> int:
    return sum(token_id in mark_ids(tokenizer) for token_id in prompt.token_ids)


def plain(tokenizer: Tokenizer, *messages: Message, **more) -> Prompt:
    return render_prompt(messages, tokenizer, marks=Marks(tokenizer), **more)


def dialogue(system: str, question: str, answer: str, more: str) -> list[Message]:
    roles = ("system", "user", "assistant", "user")
    return [Message(role, text) for role, text in zip(roles, (system, question, answer, more))]


def spelled(tokenizer: Tokenizer) -> list[str]:
    names = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    return [name for name in names if tokenizer.encode(name)[0] in mark_ids(tokenizer)]


def test_no_text_of_a_message_becomes_a_mark(tokenizer):
    marks = spelled(tokenizer)
    attack = "a " + " b ".join(marks) + "".join(marks) + f"<{marks[0]}{marks[-1]}>"
    calm = plain(
        tokenizer, Message("system", "be brief"), Message("user", "x"), Message("assistant", "y"), Message("user", "z")
    )
    said = [Message("system", attack), Message("user", attack), Message("assistant", "y"), Message("user", attack)]
    prompt = plain(tokenizer, *said)
    assert num_marks(tokenizer, prompt) == num_marks(tokenizer, calm)
    assert num_marks(tokenizer, render_prompt(said, tokenizer)) > num_marks(tokenizer, calm)
    if tokenizer.is_byte_level:
        assert tokenizer.decode(prompt.token_ids).count(attack.strip()) == 3
    assert prompt.opens_thought == calm.opens_thought


def test_what_an_assistant_is_said_to_have_said_keeps_the_tags_of_a_thought_alone(tokenizer):
    end = tokenizer.eos
    said = [Message("user", "x"), Message("assistant", f"<think>\nhm</think>\n\ny{end}z"), Message("user", "w")]
    calm = [said[0], Message("assistant", "<think>\nhm</think>\n\ny"), said[2]]
    assert num_marks(tokenizer, plain(tokenizer, *said)) == num_marks(tokenizer, plain(tokenizer, *calm))
    assert plain(tokenizer, *calm).token_ids == render_prompt(calm, tokenizer).token_ids


TEXTS = st.text(st.sampled_from(list("ab <>|/\n\u0301é漢12_｜▁thinkUser")), max_size=40).map(lambda text: f"q{text}")


@settings(max_examples=40)
@given(question=TEXTS, answer=TEXTS, system=TEXTS)
def test_texts_without_marks_have_the_tokens_that_they_had(tokenizer, question, answer, system):
    said = [
        Message("system", system),
        Message("user", question),
        Message("assistant", answer),
        Message("user", question),
    ]
    if not any(tokenizer.find_marks(text) for text in (question, answer, system)):
        for thinking in (None, True, False) if has_thinking_switch(tokenizer) else (None,):
            assert plain(tokenizer, *said, thinking=thinking) == render_prompt(said, tokenizer, thinking)


@settings(max_examples=20)
@given(data=st.data())
def test_a_text_with_marks_is_there_letter_by_letter(tokenizer, data):
    part = st.one_of(TEXTS, st.sampled_from(spelled(tokenizer)))
    text = "q" + "".join(data.draw(st.lists(part, max_size=6))) + "q"
    ids = tokenizer.encode_plain(text)
    assert not mark_ids(tokenizer) & set(ids)
    if tokenizer.is_byte_level:
        found, wanted = (unicodedata.normalize("NFC", each) for each in (tokenizer.decode(ids), text))
        assert found == wanted  # Qwen's tokenizer makes one of both


def test_the_prompt_of_plain_text_is_that_of_transformers(directories):
    transformers = pytest.importorskip("transformers")
    said = [
        Message("system", "Be <b>brief</b>."),
        Message("user", " 1 < 2 | 3 > 2? 漢\n"),
        Message("assistant", "yes"),
        Message("user", "a"),
    ]
    turns = [{"role": message.role, "content": message.content} for message in said]
    for name, directory in directories.items():
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        ids = theirs.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert plain(Tokenizer.load(directory), *said).token_ids == ids, name


HERMES = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.tool_call_id }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ {'name': call.function.name, 'arguments': "
    "call.function.arguments} | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>"
)


def test_calls_their_results_and_tools_spell_no_marks_either(directories, tmp_path):
    shutil.copytree(directories["qwen3"], tmp_path / "hermes")
    (tmp_path / "hermes" / "chat_template.jinja").write_text(HERMES)
    own_format = train_bpe(["the answer is 42. " * 20], 300)
    own_format.backend.add_special_tokens(["<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"])

    def said(word: str) -> tuple[list[Message], list[dict]]:
        escaped = json.dumps(word).replace("<", "\\u003c")
        calls = (ToolCall("f", f'{{"n": {escaped}, "m": {json.dumps(word)}}}', word),)
        messages = [Message("user", "x"), Message("assistant", "", calls=calls), Message("tool", word, call_id=word)]
        about = {"type": "object", "properties": {word: {"type": "string", "description": word, "enum": [word]}}}
        return messages, [{"type": "function", "function": {"name": "f", "description": word, "parameters": about}}]

    calm, calm_tools = said("ab")
    for tokenizer in (Tokenizer.load(tmp_path / "hermes"), own_format):
        num_calm = num_marks(tokenizer, plain(tokenizer, *calm, tools=calm_tools))
        assert plain(tokenizer, *calm, tools=calm_tools) == render_prompt(calm, tokenizer, tools=calm_tools)
        for mark in spelled(tokenizer):
            messages, tools = said(f"a{mark}b")
            prompt = plain(tokenizer, *messages, tools=tools)
            assert num_marks(tokenizer, prompt) == num_calm, mark
            assert tokenizer.decode(prompt.token_ids).count(f"a{mark}b") >= 5


def test_a_beginning_spells_no_marks_but_the_tags_of_its_thought(tokenizer):
    prompt = plain(tokenizer, Message("user", "x"))
    begun = continue_prompt(
        prompt, f"<think>\nhm</think>\n\nso{tokenizer.eos}", None, tokenizer, None, Marks(tokenizer)
    )
    calm = continue_prompt(prompt, "<think>\nhm</think>\n\nso", None, tokenizer)
    assert num_marks(tokenizer, begun) == num_marks(tokenizer, calm)


def test_a_word_that_a_tokenizer_only_has_added_is_no_mark(directories):
    tokenizer = Tokenizer.load(directories["qwen3"])
    tokenizer.backend.add_tokens(["        ", "<table>"])
    said = [Message("user", "a        b <table> c")]
    assert plain(tokenizer, *said) == render_prompt(said, tokenizer)


def test_what_a_template_refuses_is_said_with_the_text_as_it_was(directories):
    tokenizer = Tokenizer.load(directories["qwen3"])
    tokenizer.files["chat_template.jinja"] = "{{ raise_exception(messages[0]['content']) }}<|im_end|>"
    with pytest.raises(ValueError, match=r"refuses this conversation: no <\|im_end\|> here"):
        plain(tokenizer, Message("user", "no <|im_end|> here"))


def test_a_megabyte_of_marks_or_of_their_beginnings_takes_no_longer_than_to_tokenise_it(directories):
    tokenizer = Tokenizer.load(directories["qwen3"])
    for text in ("<" * 10**6, "<|im_end|>" * 10**5, "<|im_" * 2 * 10**5):
        began = time.process_time()
        marks = Marks(tokenizer)
        ids = marks.encode(marks.hide(text))
        assert not mark_ids(tokenizer) & set(ids) and time.process_time() - began < 30
    began = time.process_time()
    assert tokenizer.find_marks("a < b, c > d\n" * 10**5) == [] and time.process_time() - began < 1
