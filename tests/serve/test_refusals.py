"""Whatever will not do is refused by the name that it has in the body of its own route."""

import json
import re

import httpx2 as httpx
import pytest
from fastapi.routing import APIRoute
from serve.asks import HELLO, post

from kogia.serve.app import ROUTERS
from kogia.serve.errors import is_anthropic

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
LEAST = {
    CHAT: {"messages": HELLO, "max_tokens": 1},
    TEXT: {"prompt": "a", "max_tokens": 1},
    RESPONSES: {"input": "a", "max_output_tokens": 1},
    MESSAGES: {"messages": HELLO, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/page/render": {"texts": ["a"]},
}
VALUES = [-1, 10**9, "x", True, ["x"], [[10**9]], {"type": "x"}, [{"type": "x", "role": "y"}], []]
OF_TWO = ("continue_final_message", "messages")
"""Field that is wrong because of another one, which may be named instead."""


def named(path: str, response: httpx.Response) -> str:
    """The field that a refusal names, which must be in its message, too."""
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    if is_anthropic(path):
        return re.match(r"[\w.]+", error["message"])[0].rstrip(".")
    assert error["param"] is not None and error["param"].split(".")[0] in error["message"], error
    return error["param"]


def bodies() -> dict[str, type]:
    """The body of each route that takes one, by its path."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return {route.path: route.body_field.field_info.annotation for route in routes if route.body_field}


def test_every_route_with_a_body_is_swept():
    aliases = r"(/beta|/beta/v1)?/(chat/)?completions|/anthropic/.*|/page/(conversations/.*|chat|trace)"
    assert {path for path in bodies() if not re.fullmatch(aliases, path)} == set(LEAST)


@pytest.mark.parametrize("path", LEAST)
def test_a_wrong_value_of_any_field_is_refused_by_the_name_of_that_field(server, path):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post(path, json=LEAST[path]).status_code == 200
        for name, field in bodies()[path].model_fields.items():
            field_name = field.alias or name
            for value in VALUES:
                response = client.post(path, json={**LEAST[path], field_name: value})
                if response.status_code != 200:
                    told = field_name, named(path, response).split(".")[0]
                    assert told[0] == told[1] or told == OF_TWO, (value, response.text)
            if field.is_required():
                body = {key: given for key, given in LEAST[path].items() if key != field_name}
                assert named(path, client.post(path, json=body)) == field_name
    assert server.engine.num_unfinished == 0 and not server.state.running


WRONG = {"type": "object", "properties": {"n": {"type": "wrong"}}}
LARGE = {"type": "object", "description": "x" * 2**20}
DEEP = {"type": "object"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"n": DEEP}}
OK = {"type": "object", "properties": {}}
LONG = "x " * 5000


def chat_tools(*schemas: object) -> dict:
    functions = [{"name": f"tool{i}", "parameters": schema} for i, schema in enumerate(schemas)]
    return {"tools": [{"type": "function", "function": each} for each in functions], "tool_choice": "required"}


def response_tools(*schemas: object) -> dict:
    tools = [{"type": "function", "name": f"tool{i}", "parameters": schema} for i, schema in enumerate(schemas)]
    return {"tools": tools, "tool_choice": "required"}


def message_tools(*schemas: object) -> dict:
    tools = [{"name": f"tool{i}", "input_schema": schema} for i, schema in enumerate(schemas)]
    return {"tools": tools, "tool_choice": {"type": "any"}}


def user(*blocks: dict) -> dict:
    return {"messages": [*HELLO, {"role": "user", "content": list(blocks)}]}


def said_by_assistant(*blocks: dict) -> dict:
    return {"messages": [{"role": "assistant", "content": list(blocks)}, *HELLO]}


def schema(value: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def text_format(value: object) -> dict:
    return {"text": {"format": {"type": "json_schema", "name": "x", "schema": value}}}


def output(value: object) -> dict:
    return {"output_config": {"format": {"type": "json_schema", "schema": value}}}


CALLS = [{"type": "tool_use", "id": str(i), "name": "x", "input": {}} for i in range(129)]
CASES = [
    *((path, {"structured_outputs": {"regex": "("}}, "structured_outputs.regex") for path in list(LEAST)[:4]),
    *((path, {"structured_outputs": {}}, "structured_outputs") for path in list(LEAST)[:4]),
    (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    (CHAT, {"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    (CHAT, {"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
    (CHAT, {"structured_outputs": {"regex": "a"}, **schema(OK)}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regex": "a"}, **chat_tools(OK)}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    *((CHAT, schema(each), "response_format.json_schema.schema") for each in (WRONG, LARGE, DEEP, None)),
    *((TEXT, schema(each), "response_format.json_schema.schema") for each in (WRONG, LARGE, DEEP, None)),
    *((RESPONSES, text_format(each), "text.format.schema") for each in (WRONG, LARGE, DEEP, None)),
    *((MESSAGES, output(each), "output_config.format.schema") for each in (WRONG, LARGE, DEEP, None)),
    (CHAT, chat_tools(OK, WRONG), "tools.1.function.parameters"),
    (RESPONSES, response_tools(OK, WRONG), "tools.1.parameters"),
    (MESSAGES, message_tools(OK, WRONG), "tools.1.input_schema"),
    (CHAT, {**chat_tools(OK), **schema(OK)}, "tool_choice"),
    (CHAT, chat_tools(OK) | {"tool_choice": {"type": "function", "function": 5}}, "tool_choice.function"),
    (RESPONSES, response_tools(OK) | {"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    (MESSAGES, message_tools(OK) | {"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    (MESSAGES, user({"type": "tool_result", "tool_use_id": "x"}), "messages.1.content.0.tool_use_id"),
    (
        MESSAGES,
        user(
            {"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}
        ),
        "messages.1.content.1.content.0.type",
    ),
    (MESSAGES, user({"type": "text", "text": "a"}, {"type": "image"}), "messages.1.content.1.type"),
    (MESSAGES, user({"type": "text"}), "messages.1.content.0.text"),
    (MESSAGES, said_by_assistant(CALLS[0] | {"name": None}), "messages.0.content.0.name"),
    (MESSAGES, said_by_assistant({"type": "tool_result", "tool_use_id": "x"}), "messages.0.content.0.type"),
    (MESSAGES, user({"type": "text", "text": "a"}, CALLS[0]), "messages.1.content.1.type"),
    (MESSAGES, user({"type": "thinking", "thinking": "a"}), "messages.1.content.0.type"),
    (
        CHAT,
        {"messages": [HELLO[0] | {"tool_calls": [{"function": {"name": "x", "arguments": ""}}]}]},
        "messages.0.tool_calls",
    ),
    (CHAT, user({"type": "text"}), "messages.1.content.0.text"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
    (MESSAGES, {"messages": [{"role": "assistant", "content": CALLS}, *HELLO]}, "messages.0.content"),
    (MESSAGES, {"messages": [*HELLO, {"role": "assistant", "content": CALLS[:1]}]}, "messages.1"),
    (MESSAGES, {"system": [{"type": "text", "text": "a"}, {"type": "image"}]}, "system.1.type"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "x", "output": "a"}]}, "input.0.call_id"),
    (RESPONSES, {"input": [{"role": "user", "content": "a"}, {"role": "user"}]}, "input.1.content"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
    (RESPONSES, {"input": [{"type": "function_call", "call_id": "x", "name": "y"}]}, "input.0.arguments"),
    (RESPONSES, {"input": [*HELLO, {"role": "assistant", "content": "x"}]}, "input"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [*HELLO, {"role": "user", "content": "x", "prefix": True}]}, "messages.1"),
    *((path, {"messages": [{"role": "user", "content": LONG}]}, "messages") for path in (CHAT, MESSAGES)),
    (RESPONSES, {"input": LONG}, "input"),
    (TEXT, {"prompt": LONG}, "prompt"),
    (TEXT, {"prompt": [[1], [10**6]]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 257}, "prompt"),
    (TEXT, {"prompt": [[1]] * 257}, "prompt"),
    (TEXT, {"prompt": [1, "a"]}, "prompt.1"),
    (TEXT, {"prompt": ["a", [1]]}, "prompt.1"),
    (CHAT, {"max_completion_tokens": 5, "min_tokens": 9}, "min_tokens"),
    (CHAT, {"stop_token_ids": [10**6]}, "stop_token_ids"),
    (CHAT, {"metadata": {"x" * 300: "y"}}, "metadata"),
    (CHAT, {"metadata": {"k": 5}}, "metadata.k"),
]


@pytest.mark.parametrize("path, more, field", CASES)
def test_what_only_the_model_or_another_field_rules_out_is_refused_by_its_place(server, path, more, field):
    response = post(server, path, {**LEAST[path], **more})
    assert named(path, response) == field, response.text
    assert len(response.text) < 600 and "arguments0" not in response.text
    assert server.engine.num_unfinished == 0 and not server.state.running


def test_the_rule_is_the_one_that_was_broken(server):
    for path, more, rule in (
        (TEXT, {"prompt": ["a"] * 300}, "at most 256 items, not 300"),
        (TEXT, {"prompt": 5}, "prompt = 5: must be a text or a list"),
        (RESPONSES, {"input": 5}, "input = 5: must be a text or a list"),
        (RESPONSES, {"max_output_tokens": 5, "min_tokens": 9}, "more than max_output_tokens = 5"),
        (CHAT, {"tool_choice": "sometimes"}, "must be 'none', 'auto' or 'required'"),
    ):
        assert rule in post(server, path, {**LEAST[path], **more}).json()["error"]["message"]


INSTEAD = [
    (CHAT, {"functions": [{"name": "f"}]}, "tools"),
    (CHAT, {"function_call": "auto"}, "tool_choice"),
    (CHAT, {"modalities": ["text", "audio"]}, "'text'"),
    (CHAT, {"audio": {"voice": "x", "format": "wav"}}, "text"),
    (CHAT, {"best_of": 3}, "must be n"),
    (CHAT, {"top_logprobs": 3}, "logprobs = true"),
    (CHAT, {"web_search_options": {"size": 1}}, "leave it out"),
    (CHAT, {"stop_sequences": ["x"]}, "send stop"),
    (CHAT, {"add_generation_prompt": False}, "continue_final_message"),
    *((path, {"guided_regex": "a"}, "structured_outputs") for path in list(LEAST)[:4]),
    (TEXT, {"truncate_prompt_tokens": 5}, "shorten"),
    (TEXT, {"tools": [{}]}, CHAT),
    (RESPONSES, {"conversation": "c"}, "input"),
    (RESPONSES, {"prompt": {"id": "p"}}, "input"),
    (RESPONSES, {"response_format": {"type": "json_object"}}, "text.format"),
    (RESPONSES, {"top_logprobs": 3}, CHAT),
    (MESSAGES, {"container": "x"}, "leave it out"),
    (MESSAGES, {"mcp_servers": [{"url": "x"}]}, "tools"),
    ("/v1/messages/count_tokens", {"mcp_servers": [{"url": "x"}]}, "tools"),
    ("/tokenize", {"prompt": None, "messages": HELLO, "add_generation_prompt": False}, "continue_final_message"),
]


@pytest.mark.parametrize("path, more, advice", INSTEAD)
def test_what_would_change_the_meaning_is_not_passed_over(server, path, more, advice):
    response = post(server, path, {**LEAST[path], **more})
    assert named(path, response).split(".")[0] in more and advice in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "more", [{"functions": []}, {"modalities": ["text"]}, {"best_of": 1}, {"use_beam_search": False}]
)
def test_values_that_ask_for_nothing_are_passed_over(server, more):
    assert post(server, CHAT, {**LEAST[CHAT], **more}).status_code == 200


def test_anthropics_formats_and_efforts_are_obeyed(server):
    only = {"type": "object", "properties": {"n": {"enum": [4]}}, "required": ["n"], "additionalProperties": False}
    body = {**LEAST[MESSAGES], "max_tokens": 200, "thinking": {"type": "disabled"}, **output(only)}
    (block,) = post(server, MESSAGES, body).json()["content"]
    assert json.loads(block["text"]) == {"n": 4}
    never = {str(server.tokenizer.token_id("</think>")): -100}
    body = {**LEAST[MESSAGES], "max_tokens": 600, "output_config": {"effort": "minimal"}, "ignore_eos": True}
    used = post(server, MESSAGES, {**body, "logit_bias": never}).json()["usage"]
    assert used["output_tokens_details"]["thinking_tokens"] == 512


@pytest.mark.parametrize("stream", [False, True])
def test_a_length_that_the_context_has_no_room_for_is_cut_and_the_answer_says_so(server, stream):
    for path, name in ((CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens"), (MESSAGES, "max_tokens")):
        body = {**LEAST[path], name: 10**6, "stop": ["e"], "stream": stream}
        note = post(server, path, body).headers["x-kogia-notes"]
        assert re.fullmatch(rf"{name} = 1000000: the context leaves 40\d\d", note)
    assert "x-kogia-notes" not in post(server, CHAT, LEAST[CHAT]).headers


def test_a_thought_that_only_another_server_can_read_is_passed_over(server):
    said = [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, {"role": "user", "content": "hello"}]
    asked = [{"input": each, "max_output_tokens": 1} for each in (said, said[1:])]
    one, other = (post(server, RESPONSES, body).json()["usage"]["input_tokens"] for body in asked)
    assert one == other


def test_tokens_that_the_model_has_not_are_refused_wherever_they_come_in(server):
    for path, body in (
        ("/page/trace", {"messages": HELLO, "token_ids": [1, 10**6]}),
        ("/detokenize", {"tokens": [10**6]}),
    ):
        assert named(path, post(server, path, body)) == list(body)[-1]
