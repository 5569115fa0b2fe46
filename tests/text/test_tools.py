"""Thoughts and calls told from text that comes in pieces: whatever the pieces, the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.text.thoughts import ThoughtSplitter
from kogia.text.tools import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    DEEPSEEK,
    DEEPSEEK_V31,
    HERMES,
    LLAMA,
    tool_format,
)

FORMATS = (DEEPSEEK, DEEPSEEK_V31, HERMES, LLAMA)
NESTED = '{"city": "K\\"}{öln", "days": [1, {"a": "</tool_call>"}], "none": null}'


def read(form, pieces):
    """(content, calls) of the pieces, joined."""
    reader, content, calls = form.reader(), "", {}
    for part in [*map(reader.push, pieces), reader.finish()]:
        content += part.content
        for piece in part.calls:
            name, arguments = calls.get(piece.index, (None, ""))
            calls[piece.index] = (piece.name or name, arguments + piece.arguments)
    return content, [calls[index] for index in range(len(calls))]


def split(pieces, opens):
    splitter = ThoughtSplitter(opens)
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("arguments", ["{}", NESTED])
def test_what_a_format_writes_it_reads(form, arguments):
    before = "" if form is LLAMA else "I will look. "
    calls = [("weather", arguments), ('a"b', "{}")][: form.most_calls]
    text = before + form.before + form.between.join(form.write(*call) for call in calls) + form.after
    if form in (DEEPSEEK, DEEPSEEK_V31):
        calls = [(json.dumps(name)[1:-1], own) for name, own in calls]  # names are no JSON there
    assert read(form, [text]) == (before, calls)
    assert read(form, list(text)) == (before, calls)


FRAGMENTS = st.sampled_from(
    [CALLS_BEGIN, CALL_BEGIN, CALL_SEP, CALL_END, CALLS_END, "function", "f\n```json\n", "{}", "\n```", "`", " ", "\n",
     "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": "}"}', "}", ";", "<|python_tag|>", "text",
     '{"name": "g", "parameters": {"x": [1]}}', "<tool", "<｜tool▁", '"', "{", "\\", "<think>", "</think>", "x" * 401]
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=12).map("".join), st.data())
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_same_is_read_however_the_text_is_cut(form, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    whole = read(form, [text])
    assert read(form, pieces) == whole == read(form, list(text))
    if not whole[1]:
        assert whole[0] == text or form in (DEEPSEEK, DEEPSEEK_V31, LLAMA)  # where there is no call, all is content


@given(st.lists(FRAGMENTS, max_size=8).map("".join), st.booleans(), st.data())
def test_a_thought_is_the_same_however_the_text_is_cut(text, opens, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    assert split(pieces, opens) == split([text], opens) == split(list(text), opens)


@pytest.mark.parametrize(
    "opens, text, thought, answer",
    [
        (True, "\nso it is\n</think>\n\n42\n", "so it is", "42\n"),
        (True, "never ends </thin", "never ends </thin", ""),
        (True, "</think>42", "", "42"),
        (False, "  42 ", "", "  42 "),
        (False, "\n<think>\nhm\n\n</think>\n42", "hm", "42"),
        (False, "<thin", "", "<thin"),
        (False, "a <think> b </think> c", "", "a <think> b </think> c"),
        (True, "one</think>two</think>three", "one", "two</think>three"),
    ],
)
def test_where_a_thought_ends(opens, text, thought, answer):
    assert split([text], opens) == (thought, answer)


@pytest.mark.parametrize(
    "form, text, content, calls",
    [
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, "<tool_call>no json</tool_call> x", "<tool_call>no json</tool_call> x", []),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": ', "", [("f", '{"a": ')]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n\n', "", [("f", "{}")]),
        (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        (LLAMA, 'see {"name": "f", "parameters": {}}', 'see {"name": "f", "parameters": {}}', []),
        (DEEPSEEK, f"{CALLS_BEGIN}{CALL_BEGIN}function{CALL_SEP}f\n```json\n{{}}", "", [("f", "{}")]),
        (DEEPSEEK, f"a{CALL_BEGIN}b", f"a{CALL_BEGIN}b", []),
    ],
)
def test_what_is_broken_or_unusual(form, text, content, calls):
    assert read(form, [text]) == (content, calls)


def test_the_format_follows_from_the_template():
    assert tool_format(None) is DEEPSEEK
    assert tool_format(f"{CALLS_BEGIN} ```json tools") is DEEPSEEK
    assert tool_format(f"{CALLS_BEGIN} tools") is DEEPSEEK_V31
    assert tool_format("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert tool_format("{% if tools %}<|python_tag|>{% endif %}") is LLAMA
    assert tool_format("{{ messages }}") is None
