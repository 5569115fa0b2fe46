"""LangChain's `ChatOpenAI`, as it is, on a served model."""

import asyncio

import pytest
from serve.asks import letters

pytest.importorskip("langchain_openai", reason="pip install langchain-openai")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict


class Pick(BaseModel):
    """Pick a number."""

    model_config = ConfigDict(extra="forbid")
    yes: bool


@tool(args_schema=Pick)
def pick(yes: bool) -> str:
    """Pick a number."""
    return "picked" if yes else "left"


@pytest.fixture
def chat(server):
    def of(**more):
        body = {**more.pop("switch", {"enable_thinking": False}), **letters(server), **more.pop("extra_body", {})}
        own = {"max_tokens": 12, "stream_usage": True, "seed": 1, "extra_body": body, **more}
        return ChatOpenAI(base_url=server.url + "/v1", api_key="none", model="tiny", max_retries=0, **own)

    return of


def test_conversations_streams_and_usage(chat):
    said = [SystemMessage("be brief"), HumanMessage("one"), AIMessage("two"), HumanMessage("three")]
    whole = chat().invoke(said)
    chunks = list(chat().stream(said))
    assert whole.content == "".join(chunk.content for chunk in chunks) != ""
    (used,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert used["output_tokens"] == whole.usage_metadata["output_tokens"] == 12
    assert asyncio.run(chat().ainvoke(said)).content == whole.content
    assert [len(each.content) > 0 for each in chat().batch(["a", "b", "c"])] == [True] * 3


def test_log_probabilities(chat):
    found = chat(logprobs=True, top_logprobs=2).invoke("hello").response_metadata["logprobs"]["content"]
    assert len(found) == 12 and all(len(each["top_logprobs"]) == 2 and each["logprob"] <= 0 for each in found)


@pytest.mark.parametrize("streams", [False, True])
def test_tools_are_called_and_their_results_taken(chat, streams):
    free = {"enable_thinking": False, "allowed_token_ids": None}
    asked = chat(max_tokens=300, extra_body=free).bind_tools([pick], tool_choice="required", parallel_tool_calls=False)
    said = [HumanMessage("hello")]
    if streams:
        first, *rest = asked.stream(said)
        for chunk in rest:
            first = first + chunk
        called = AIMessage(first.content, tool_calls=first.tool_calls)
    else:
        called = asked.invoke(said)
    (call,) = called.tool_calls
    assert call["name"] == "pick" and call["args"]["yes"] in (True, False)
    result = ToolMessage(pick.invoke(call["args"]), tool_call_id=call["id"])
    assert chat().bind_tools([pick]).invoke([*said, called, result]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_of_its_class(chat, method):
    free = chat(max_tokens=300, extra_body={"allowed_token_ids": None})
    assert isinstance(free.with_structured_output(Pick, method=method, strict=True).invoke("hello"), Pick)


def test_the_responses_api(chat):
    asked = chat(use_responses_api=True, switch={}, reasoning={"effort": "none"}, stream_usage=False, seed=None)
    whole = asked.invoke("hello")
    assert whole.text and whole.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.text for chunk in asked.stream("hello")) != ""
