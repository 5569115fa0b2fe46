"""The cases of the Open Responses compliance suite (openresponses.org/compliance), rebuilt.

What each asks is the suite's; what a small random model says is fixed by a format, which changes nothing else. Fields
that its schema requires are listed by the type of object.
"""

import json

import httpx2 as httpx
import pytest
from serve.asks import refusal

from kogia.text.tools import DEEPSEEK

RESPONSE = set(
    "id object created_at completed_at status incomplete_details model previous_response_id instructions output error "
    "tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs "
    "temperature reasoning user usage max_output_tokens max_tool_calls store background service_tier metadata "
    "safety_identifier prompt_cache_key".split()
)
USAGE = {"input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details", "total_tokens"}
PARTS = {
    "message": {"id", "status", "role", "content"},
    "function_call": {"id", "call_id", "name", "arguments", "status"},
    "reasoning": {"id", "summary"},
    "output_text": {"text", "annotations", "logprobs"},
    "reasoning_text": {"text"},
    "function": {"name", "description", "parameters", "strict"},
}
PLACE = {"item_id", "output_index", "sequence_number"}
EVENTS = {
    "response.created": {"response", "sequence_number"},
    "response.in_progress": {"response", "sequence_number"},
    "response.completed": {"response", "sequence_number"},
    "response.incomplete": {"response", "sequence_number"},
    "response.output_item.added": {"item", "output_index", "sequence_number"},
    "response.output_item.done": {"item", "output_index", "sequence_number"},
    "response.content_part.added": PLACE | {"content_index", "part"},
    "response.content_part.done": PLACE | {"content_index", "part"},
    "response.output_text.delta": PLACE | {"content_index", "delta", "logprobs"},
    "response.output_text.done": PLACE | {"content_index", "text", "logprobs"},
    "response.reasoning_text.delta": PLACE | {"content_index", "delta"},
    "response.reasoning_text.done": PLACE | {"content_index", "text"},
    "response.function_call_arguments.delta": PLACE | {"delta"},
    "response.function_call_arguments.done": PLACE | {"arguments"},
}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}},
        "required": ["location"],
    },
}
CALL = DEEPSEEK.before + DEEPSEEK.write("get_weather", '{"location": "San Francisco, CA"}') + DEEPSEEK.after
ASKED = {
    "basic-response": {"input": [{"type": "message", "role": "user", "content": "Say hello in exactly 3 words."}]},
    "streaming-response": {
        "input": [{"type": "message", "role": "user", "content": "Count from 1 to 5."}],
        "stream": True,
    },
    "system-prompt": {
        "input": [
            {"type": "message", "role": "system", "content": "You are a pirate. Always respond in pirate speak."},
            {"type": "message", "role": "user", "content": "Say hello."},
        ]
    },
    "multi-turn": {
        "input": [
            {"type": "message", "role": "user", "content": "My name is Alice."},
            {
                "type": "message",
                "role": "assistant",
                "content": "Hello Alice! Nice to meet you. How can I help you today?",
            },
            {"type": "message", "role": "user", "content": "What is my name?"},
        ]
    },
}
ASKS_WEATHER = [{"type": "message", "role": "user", "content": "What's the weather like in San Francisco?"}]


def answered(server, body, says):
    """(final response, events) of a request; the answer is `says`, behind a thought of three tokens."""
    fixed = {"structured_outputs": {"choice": [says]}, "thinking_token_budget": 3, "seed": 1}
    response = httpx.post(server.url + "/v1/responses", json={"model": "tiny", **body, **fixed}, timeout=60)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json(), []
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        found.append(json.loads(lines["data"]))
        assert lines["event"] == found[-1]["type"], "the event is named twice"
    return found[-1]["response"], found


def check_response(response):
    assert response.keys() >= RESPONSE and response["object"] == "response"
    for item in [*response["output"], *response["tools"]]:
        check_part(item)
    assert response["usage"].keys() >= USAGE
    for name in ("top_p", "temperature", "presence_penalty", "frequency_penalty", "top_logprobs"):
        assert isinstance(response[name], int | float)


def check_part(part):
    assert part.keys() >= PARTS[part["type"]], part
    for inner in part.get("content") or ():
        check_part(inner)


def check_events(events):
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    for event in events:
        assert event.keys() >= EVENTS[event["type"]] | {"type"}, event
        for name in ("item", "part"):
            if name in event:
                check_part(event[name])


@pytest.mark.parametrize("case", ASKED)
def test_what_is_asked_is_answered_as_the_schema_says(server, case):
    response, events = answered(server, ASKED[case], "hello there, you")
    check_response(response)
    assert response["status"] == "completed" and response["error"] is response["incomplete_details"] is None
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["output"][-1]["content"][0]["text"] == "hello there, you"
    if case == "streaming-response":
        check_events(events)


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_is_called(server, streams):
    response, events = answered(server, {"input": ASKS_WEATHER, "tools": [WEATHER], "stream": streams}, CALL)
    check_response(response)
    call = response["output"][-1]
    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert json.loads(call["arguments"]) == {"location": "San Francisco, CA"}
    if streams:
        check_events(events)
        of_call = [event["type"].removeprefix("response.") for event in events if event.get("item_id") == call["id"]
                   or event.get("item", {}).get("id") == call["id"]]  # fmt: skip
        assert of_call[0] == "output_item.added" and of_call[-1] == "output_item.done"
        assert set(of_call[1:-2]) == {"function_call_arguments.delta"} and of_call[-2] == "function_call_arguments.done"


def test_an_image_is_refused_by_name(server):
    """The one case of the suite that no text model passes."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    said = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is it?"}, image]}]
    response = httpx.post(server.url + "/v1/responses", json={"model": "tiny", "input": said})
    assert "input_image" in refusal(response)["message"] and "text" in response.text


def test_what_was_asked_is_told(server):
    given = {"max_tool_calls": 3, "safety_identifier": "u1", "prompt_cache_key": "k", "presence_penalty": 0.5,
             "metadata": {"a": "b"}, "instructions": "be brief", "user": "me", "max_output_tokens": 400}  # fmt: skip
    schema = {"type": "json_schema", "name": "n", "schema": {"enum": [1]}, "strict": True}
    body = {"input": "x", **given, "text": {"format": schema}, "thinking_token_budget": 3}
    response = httpx.post(server.url + "/v1/responses", json=body, timeout=60).json()
    check_response(response)
    assert {name: response[name] for name in given} == given
    assert response["text"]["format"] == {**schema, "description": None}
