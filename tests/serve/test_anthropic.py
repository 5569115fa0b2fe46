"""Anthropic's messages, asked by the `anthropic` package as it is."""

import json

import anthropic
import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.asks import HELLO, events, letters, post

from kogia.text.tools import DEEPSEEK

PICK = {
    "name": "pick",
    "description": "picks",
    "input_schema": {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_the_client_asks_and_streams_thought_and_text(client, server):
    kwargs = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 20,
        "system": "be brief",
        "extra_body": {"seed": 3, **letters(server)},
    }
    kwargs["thinking"] = {"type": "enabled", "budget_tokens": 4}
    message = client.messages.create(**kwargs)
    assert [block.type for block in message.content] == ["thinking", "text"] and message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 20 and message.role == "assistant"
    with client.messages.stream(**kwargs) as stream:
        kinds = [event.type for event in stream]
    again = stream.get_final_message()
    assert [block.model_dump() for block in again.content] == [block.model_dump() for block in message.content]
    assert again.stop_reason == message.stop_reason and again.usage.output_tokens == 20
    details = message.usage.output_tokens_details
    assert details is not None and 0 < details.thinking_tokens <= 5 and again.usage.output_tokens_details == details
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def test_tokens_are_counted_as_they_are_used(client):
    kwargs = {"model": "tiny", "messages": HELLO, "system": [{"type": "text", "text": "be brief"}], "tools": [PICK]}
    counted = client.messages.count_tokens(**kwargs).input_tokens
    usage = client.messages.create(max_tokens=1, **kwargs).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "pick"}])
def test_a_tool_is_called_and_its_result_goes_back(client, server, choice):
    choice = {**choice, "disable_parallel_tool_use": True}
    kwargs = {"model": "tiny", "max_tokens": 200, "tools": [PICK], "thinking": {"type": "disabled"}}
    message = client.messages.create(messages=HELLO, tool_choice=choice, extra_body={"seed": 2}, **kwargs)
    (call,) = message.content
    assert message.stop_reason == "tool_use" and call.type == "tool_use" and call.input["n"] in (1, 2)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "picked"}]}
    said = [*HELLO, {"role": "assistant", "content": [call.model_dump(exclude_none=True)]}]
    answer = client.messages.create(
        messages=[*said, {"role": "user", "content": [result]}],
        extra_body=letters(server),
        **{**kwargs, "max_tokens": 3},
    )
    assert answer.content[0].type == "text"
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.2\.content\.0\.tool_use_id"):
        client.messages.create(
            messages=[*said, {"role": "user", "content": [{**result, "tool_use_id": "x"}]}], **kwargs
        )


PARTS = st.sampled_from(
    ["so ", "42", "\n\n", DEEPSEEK.before, DEEPSEEK.after, DEEPSEEK.write("pick", '{"n": 1}'), " é"]
)


@settings(max_examples=8)
@given(st.lists(PARTS, min_size=1, max_size=5).map("".join), st.booleans())
def test_streaming_equals_not_streaming(server, text, thinks):
    body = {"messages": HELLO, "max_tokens": 200, "tools": [PICK], "structured_outputs": {"choice": [text]}, "seed": 1}
    body["thinking"] = {"type": "enabled", "budget_tokens": 2} if thinks else {"type": "disabled"}
    message = post(server, "/v1/messages", body).json()
    blocks, delta = [], {}
    for event in events(server, "/v1/messages", {**body, "stream": True}):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"parts": ""})
        elif event["type"] == "content_block_delta":
            blocks[-1]["parts"] += list(event["delta"].values())[1]
        elif event["type"] == "message_delta":
            delta = event["delta"]
    assert delta == {"stop_reason": message["stop_reason"], "stop_sequence": None}
    assert len(blocks) == len(message["content"])
    for block, own in zip(blocks, message["content"]):
        assert block["type"] == own["type"]
        value = json.loads(block["parts"]) if own["type"] == "tool_use" else block["parts"]
        assert own["input" if own["type"] == "tool_use" else own["type"]] == value


def test_a_stop_sequence_is_named_and_an_answer_goes_on(client, server):
    kwargs = {"model": "tiny", "max_tokens": 50, "thinking": {"type": "disabled"}}
    forced = {"extra_body": {"structured_outputs": {"choice": ["one two three"]}}}
    message = client.messages.create(messages=HELLO, stop_sequences=["zzz", " three"], **kwargs, **forced)
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == (
        "one two",
        "stop_sequence",
        " three",
    )
    ended = client.messages.create(messages=HELLO, **kwargs, **forced)
    assert (ended.content[0].text, ended.stop_reason) == ("one two three", "end_turn")
    begun = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    assert client.messages.create(messages=begun, extra_body=letters(server), **kwargs).content[0].type == "text"


@pytest.mark.parametrize("change, says", [
    ({"max_tokens": None}, "max_tokens"), ({"messages": []}, "messages"), ({"n": 2}, "n = 2"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ({"messages": [{"role": "system", "content": "x"}]}, "role"), ({"tool_choice": {"type": "any"}}, "no tools"),
    ({"tool_choice": {"type": "tool"}, "tools": [PICK]}, "tool_choice.name"), ({"temperature": -1}, "temperature"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "0.id is missing"),
])  # fmt: skip
def test_what_will_not_do_is_refused_in_anthropics_shape(server, change, says):
    body = {"messages": HELLO, "max_tokens": 2, **change}
    response = httpx.post(server.url + "/v1/messages", json={k: v for k, v in body.items() if v is not None})
    assert response.status_code == 400
    error = response.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert says in error["error"]["message"]
