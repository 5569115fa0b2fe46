"""What a request names that means nothing here."""

import pytest

pytest.importorskip("fastapi", reason="the server's libraries are not installed")

from kogia.serve.anthropic import MessagesBody
from kogia.serve.openai_chat import ChatBody
from kogia.serve.responses import ResponsesBody

TURN = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("body", "given", "unknown"),
    [
        (
            ChatBody,
            {
                "messages": [{**TURN, "hue": 1}, {**TURN, "hue": 2}],
                "stream_options": {"pace": 3},
                "mood": 1,
                "gone": None,
            },
            ["mood", "messages.hue", "stream_options.pace"],
        ),
        (
            MessagesBody,
            {
                "max_tokens": 1,
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "is_error": True}]}
                ],
            },
            ["messages.content.is_error"],
        ),
        (ResponsesBody, {"input": "x", "text": {"verbosity": "low"}}, ["text.verbosity"]),
        (ChatBody, {"messages": [TURN]}, []),
    ],
)
def test_names_without_a_meaning_are_told_with_where_they_stand_and_each_once(body, given, unknown):
    assert sorted(body.model_validate({"model": "m", **given}).unknown) == sorted(unknown)
