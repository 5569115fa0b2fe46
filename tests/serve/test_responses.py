"""OpenAI's responses, asked by the `openai` package as it is, and the cases of the Open Responses compliance suite."""

import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.asks import events, letters, post, refusal

from kogia.serve.responses import ResponsesBody
from kogia.text.tools import DEEPSEEK

URL = "/v1/responses"
PICK = {
    "type": "function",
    "name": "pick",
    "parameters": {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "strict": True,
}
OFF = {"effort": "none"}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_basic_text(client, server):
    kwargs = {"reasoning": OFF, "extra_body": letters(server)}
    answer = client.responses.create(model="tiny", input="hello", max_output_tokens=9, **kwargs)
    (message,) = answer.output
    assert answer.object == "response" and message.type == "message" and message.content[0].text == answer.output_text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 9 and answer.usage.total_tokens == 9 + answer.usage.input_tokens


def test_system_prompt_and_several_turns(client, server):
    items = [
        {"type": "message", "role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two", "annotations": []}],
        },
        {"role": "user", "content": "three"},
    ]
    answer = client.responses.create(model="tiny", input=items, max_output_tokens=2)
    said = [{"role": role, "content": text} for role, text in
            (("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three"))]  # fmt: skip
    assert answer.usage.input_tokens == post(server, "/tokenize", {"messages": said}).json()["count"]
    short = client.responses.create(model="tiny", input="three", instructions="be brief", max_output_tokens=2)
    said = [said[0], said[-1]]
    assert short.usage.input_tokens == post(server, "/tokenize", {"messages": said}).json()["count"]


def spoken(role, text):
    return {"role": role, "content": [{"type": "input_text", "text": text}]}


CALL = {"type": "function_call", "call_id": "c", "name": "pick", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "4"}


def thought(text):
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


@pytest.mark.parametrize(
    "items, turns",
    [
        ([spoken("assistant", "one"), spoken("assistant", "two")], [("one", None, 0), ("two", None, 0)]),
        ([thought("a"), spoken("assistant", "one"), CALL], [("one", "a", 1)]),
        ([spoken("assistant", "one"), CALL, OUTPUT, spoken("assistant", "two")], [("one", None, 1), ("two", None, 0)]),
        ([thought("a"), thought("b"), spoken("assistant", "one")], [(None, "a", 0), ("one", "b", 0)]),
        ([spoken("assistant", "one"), thought("b"), spoken("assistant", "two")], [("one", None, 0), ("two", "b", 0)]),
    ],
)
def test_nothing_that_was_said_is_lost_where_items_of_an_assistant_follow_each_other(items, turns):
    messages = ResponsesBody(input=[spoken("user", "x"), *items, spoken("user", "y")]).turn.messages
    own = [each for each in messages if each.role == "assistant"]
    found = [(each.content and each.content[0].text, each.thought, len(each.tool_calls or ())) for each in own]
    assert found == turns


def test_a_thought_is_an_item_of_its_own(client, server):
    kwargs = {"model": "tiny", "input": "hello", "max_output_tokens": 12, "extra_body": letters(server)}
    kwargs["extra_body"] |= {"thinking_token_budget": 3}
    answer = client.responses.create(**kwargs)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.usage.output_tokens_details.reasoning_tokens == 3 and answer.output[0].content[0].text


def test_tool_calling_and_its_results(client, server):
    kwargs = {"model": "tiny", "tools": [PICK], "reasoning": OFF, "max_output_tokens": 200}
    for choice in ("required", {"type": "function", "name": "pick"}):
        answer = client.responses.create(
            input="hello", tool_choice=choice, parallel_tool_calls=False, extra_body={"seed": 1}, **kwargs
        )
        (call,) = answer.output
        assert (call.type, call.name, answer.status) == ("function_call", "pick", "completed")
        assert json.loads(call.arguments)["n"] in (1, 2)
    said = [{"role": "user", "content": "hello"}, call.model_dump(exclude_none=True)]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "picked"}
    after = client.responses.create(
        input=[*said, result], extra_body=letters(server), **{**kwargs, "max_output_tokens": 3}
    )
    assert after.output[0].type == "message"
    with pytest.raises(openai.BadRequestError, match=r"input\.2\.call_id"):
        client.responses.create(input=[*said, {**result, "call_id": "x"}], **kwargs)


def test_a_schema_is_followed(client):
    schema = PICK["parameters"]
    format_ = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    answer = client.responses.create(
        model="tiny",
        input="hello",
        text={"format": format_},
        reasoning=OFF,
        max_output_tokens=100,
        extra_body={"seed": 1},
    )
    assert json.loads(answer.output_text)["n"] in (1, 2)


def test_the_client_follows_a_stream(client, server):
    with client.responses.stream(
        model="tiny", input="hello", max_output_tokens=8, reasoning=OFF, extra_body=letters(server)
    ) as stream:
        seen = list(stream)
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[0].type == "response.created" and seen[-1].type == "response.incomplete"
    assert seen[-1].response.output[0].content[0].text == text


PARTS = st.sampled_from(
    ["so ", "42", "\n\n", DEEPSEEK.before, DEEPSEEK.after, DEEPSEEK.write("pick", '{"n": 1}'), " é"]
)


@settings(max_examples=8)
@given(st.lists(PARTS, min_size=1, max_size=5).map("".join), st.booleans())
def test_streaming_equals_not_streaming(server, text, thinks):
    body = {
        "input": "hello",
        "max_output_tokens": 200,
        "tools": [PICK],
        "structured_outputs": {"choice": [text]},
        "seed": 1,
    }
    body |= {"thinking_token_budget": 2} if thinks else {"reasoning": OFF}
    whole = post(server, URL, body).json()
    chunks = list(events(server, URL, {**body, "stream": True}))
    assert shape(chunks[-1]["response"]["output"]) == shape(whole["output"])
    grown = {}
    for event in chunks:
        if event["type"].endswith(".delta"):
            grown[event["item_id"]] = grown.get(event["item_id"], "") + event["delta"]
    for item in chunks[-1]["response"]["output"]:
        done = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert grown.get(item["id"], "") == done
    added = [event["item"]["id"] for event in chunks if event["type"] == "response.output_item.added"]
    ended = [event["item"]["id"] for event in chunks if event["type"] == "response.output_item.done"]
    assert added == ended == [item["id"] for item in chunks[-1]["response"]["output"]]


def shape(output):
    """The items without what is drawn anew each time."""
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in output]


@pytest.mark.parametrize("change, param", [
    ({"input": []}, "input"), ({"input": None}, "input"), ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"), ({"n": 2}, "n"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"), ({"tool_choice": "required"}, "tool_choice"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
    ({"input": [{"type": "item_reference"}]}, "input.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, None),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
])  # fmt: skip
def test_what_will_not_do_is_refused(server, change, param):
    error = refusal(post(server, URL, {"input": "hello", "max_output_tokens": 2, **change}))
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "items",
    [
        [{"type": "message", "role": "assistant", "content": None}],
        [{"type": "message", "role": "assistant", "content": None, "summary": [{"type": "", "text": None}]}],
        [{"type": "reasoning", "summary": []}],
    ],
    ids=["no content", "no text in its summary", "an empty thought"],
)
def test_input_that_says_nothing_is_refused(server, items):
    assert refusal(post(server, "/v1/responses", {"input": items}))["param"] == "input"
