"""OpenAI's responses, without a store: an answer is a list of items, of thought, message and calls of tools.

Every event carries what it changes, and the last one the whole response: what a client gets that does not stream.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kogia.engine.grammar import ResponseFormat
from kogia.engine.request import Completion
from kogia.serve.access import Caller, authenticate
from kogia.serve.chat import Chat, Turn, start
from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_MESSAGES, MOST_TOOLS, Count, Flag, Metadata, Name, Part, Text, items
from kogia.serve.generation import new_id, usage
from kogia.serve.prompts import CalledFunction, CalledTool, ChatMessage, Content
from kogia.serve.sampling import EFFORTS, AskedFormat, Effort, SamplingBody, Thinking, schema_format
from kogia.serve.segments import Segment, Step, segments
from kogia.serve.sse import EventStream, encode
from kogia.serve.state import ServerState
from kogia.serve.strict import StrictRoute
from kogia.serve.tools import Choice, Function, Tool
from kogia.serve.tools import Name as ToolName

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


class Item(Part):
    """A turn, or part of one; which of the fields it has follows from its type."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: Content | None = None
    summary: Content | None = None


class ResponseTool(Part):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class ChosenTool(Part):
    type: Literal["function"]
    name: ToolName


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def shown(self) -> dict[str, Any]:
        """As an answer tells it; whatever was asked, a schema is strict."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {**self.known, "strict": True}


class TextOptions(Part):
    format: TextFormat | None = None


class Reasoning(Part):
    effort: Effort | None = None
    summary: Name | None = None


STORED = "nothing is stored here; send all of it in input"


class ResponsesBody(SamplingBody):
    instead = {  # noqa: RUF012 - as in SamplingBody
        **SamplingBody.instead,
        "conversation": STORED,
        "prompt": STORED,
        "messages": "send input",
        "system": "send instructions",
        "response_format": "send text.format",
        "reasoning_effort": "send reasoning.effort",
        "stop_sequences": "send stop",
        "max_completion_tokens": "send max_output_tokens",
        "top_logprobs": "log-probabilities are in answers of /v1/chat/completions",
    }
    input: Text | Annotated[list[Item], items(MOST_MESSAGES, 1)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[ResponseTool], items(MOST_TOOLS)] | None = None
    tool_choice: Choice | ChosenTool | None = None
    parallel_tool_calls: Flag | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    previous_response_id: Name | None = None
    background: Flag | None = None
    store: Flag | None = None
    """Nothing is stored, whatever it says."""
    metadata: Metadata | None = None
    include: Annotated[list[Name], items(MOST_TOOLS)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: Text | None = None
    max_tool_calls: Count | None = None
    """Of tools that a server runs itself: here there are none."""
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None

    @property
    def turn(self) -> Turn:
        choice = self.tool_choice or "auto"
        name = choice.name if isinstance(choice, ChosenTool) else None
        effort = None if self.reasoning is None else self.reasoning.effort
        return Turn(
            messages=self._messages(),
            name="input",
            thinking=Thinking(False if effort == "none" else None, EFFORTS.get(effort or "")),
            tools=() if choice == "none" else [_tool(tool) for tool in self.tools or ()],
            must_call=choice == "required" or name is not None,
            tool_name=name,
            schema_name="parameters",
            parallel=self.parallel_tool_calls is not False,
            response_format=self._format(),
            max_tokens=self.max_output_tokens,
        )

    @property
    def called(self) -> dict[str, str]:
        own = {} if self.max_output_tokens is None else {"max_tokens": "max_output_tokens"}
        return super().called | {"prompt": "input"} | own

    def _format(self) -> AskedFormat | None:
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return AskedFormat(ResponseFormat(json={"type": "object"}), {"response_format": "text.format"})
        return schema_format(asked.schema_, "text.format")

    def _messages(self) -> list[ChatMessage]:
        system = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*system, ChatMessage(role="user", content=self.input)]
        turns: list[ChatMessage] = []
        for index, item in enumerate(self.input):
            _add(turns, item, f"input.{index}")
        # a thought that only OpenAI can read leaves a turn with nothing in it
        return system + [turn for turn in turns if turn.role != "assistant" or turn.says_something]


def _tool(tool: ResponseTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters)
    return Tool(type="function", function=function)


def _add(turns: list[ChatMessage], item: Item, name: str) -> None:
    """Add an item to the turns: thought, text and calls of an assistant that follow each other are one turn."""
    if item.type == "function_call_output":
        turn = ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)
        turns.append(turn.at(name, f"{name}.output", f"{name}.call_id"))
        return
    if item.type == "message" and item.role != "assistant":
        turns.append(ChatMessage(role=item.role or "user", content=item.content).at(name, f"{name}.content"))
        return
    if not turns or turns[-1].role != "assistant" or _is_said(turns[-1], item):
        turns.append(ChatMessage(role="assistant").at(name, f"{name}.content"))
    turn = turns[-1]
    if item.type == "message":
        turn.content = item.content
        turn.at(name, f"{name}.content")
    elif item.type == "reasoning":
        turn.reasoning = _thought(item.content or item.summary)
    else:
        values = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        missing = next((field for field, value in values.items() if value is None), None)
        if missing is not None or item.name is None or item.arguments is None:
            raise ApiError(f"{name}.{missing} is missing: a function_call has one", param=f"{name}.{missing}")
        function = CalledFunction(name=item.name, arguments=item.arguments)
        turn.tool_calls = [*(turn.tool_calls or []), CalledTool(id=item.call_id, function=function)]


def _is_said(turn: ChatMessage, item: Item) -> bool:
    """Whether a turn already has what an item would be to it: one text, and a thought before it."""
    is_spoken = turn.content is not None
    return is_spoken if item.type == "message" else item.type == "reasoning" and (is_spoken or bool(turn.thought))


def _thought(content: Content | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text or "" for part in content) or None


@router.post("/v1/responses")
async def responses(body: ResponsesBody, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    state: ServerState = request.app.state.server
    state.note_ignored("/v1/responses", body)
    _check(body)
    reply = ResponseReply(await start(state, body, body.turn, caller, new_id("resp_")), body)
    if body.stream:
        return EventStream(reply.chunks(), state.config.keep_alive_seconds)
    return JSONResponse(await reply.whole())


def _check(body: ResponsesBody) -> None:
    """Raise 400 for what takes a store, which there is none of."""
    if body.previous_response_id is not None:
        raise ApiError(
            f"previous_response_id = {body.previous_response_id!r:.80}: nothing is stored here; send the items again",
            param="previous_response_id",
        )
    if body.background:
        raise ApiError("background = true: nothing is stored here; leave it out, and stream", param="background")
    if (body.n or 1) != 1:
        raise ApiError(f"n = {body.n}: must be 1 here", param="n")


class ResponseReply:
    """One response, in events or as the last of them has it."""

    def __init__(self, chat: Chat, body: ResponsesBody) -> None:
        self._chat, self._running, self._body = chat, chat.running, body
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []

    async def whole(self) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async with aclosing(self._events()) as events:
            async for event in events:
                last = event
        return last["response"]

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        number = 0
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    yield encode({**event, "sequence_number": number}, event["type"])
                    number += 1
        except ApiError as error:
            failed = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
            yield encode({"type": "response.failed", "response": failed, "sequence_number": number}, "response.failed")

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"type": "response.created", "response": self._response("in_progress")}
            yield {"type": "response.in_progress", "response": self._response("in_progress")}
            async with aclosing(segments(self._chat.pieces())) as steps:
                async for step in steps:
                    for event in self._events_of(step):
                        yield event
        finally:
            self._chat.state.end(self._running)

    def _events_of(self, step: Step) -> list[dict[str, Any]]:
        if step.completion is not None:
            return [self._end(step.completion)]
        assert step.segment is not None
        if step.does == "begins":
            return self._begin(step.segment)
        item = self._output[step.segment.index]
        place = {"item_id": item["id"], "output_index": step.segment.index}
        return _grow(step, place) if step.does == "grows" else _finish(step.segment, item, place)

    def _begin(self, segment: Segment) -> list[dict[str, Any]]:
        item = _new_item(segment)
        self._output.append(item)
        shown = {**item, "content": []} if "content" in item else item
        events = [{"type": "response.output_item.added", "output_index": segment.index, "item": shown}]
        if segment.kind != "call":
            place = {"item_id": item["id"], "output_index": segment.index, "content_index": 0}
            events.append({"type": "response.content_part.added", **place, "part": dict(item["content"][0])})
        return events

    def _end(self, completion: Completion) -> dict[str, Any]:
        is_cut = completion.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        if self._output and is_cut:
            self._output[-1]["status"] = status
        response = self._response(status)
        used = usage([self._running], [completion])
        response["usage"] = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": used["prompt_cache_hit_tokens"]},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": used["completion_tokens_details"],
            "total_tokens": used["total_tokens"],
        }
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return {"type": f"response.{status}", "response": response}

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self._body, self._running
        reasoning = body.reasoning or Reasoning()
        text = body.text.format if body.text is not None and body.text.format is not None else TextFormat(type="text")
        return {
            "id": params.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status in ("completed", "incomplete") else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "frequency_penalty": params.params.frequency_penalty,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": params.model.name,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "presence_penalty": params.params.presence_penalty,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": params.params.temperature,
            "text": {"format": text.shown()},
            "tool_choice": _dumped(body.tool_choice or "auto"),
            "tools": [tool.known for tool in body.tools or ()],
            "top_logprobs": 0,
            "top_p": params.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


def _dumped(choice: str | ChosenTool) -> Any:
    return choice if isinstance(choice, str) else choice.known


def _new_item(segment: Segment) -> dict[str, Any]:
    if segment.kind == "thought":
        parts = [{"type": "reasoning_text", "text": ""}]
        return {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": [], "content": parts}
    if segment.kind == "text":
        parts = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        own = {"id": new_id("msg_"), "type": "message", "status": "in_progress"}
        return {**own, "role": "assistant", "content": parts}
    own = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress"}
    return {**own, "call_id": new_id("call_"), "name": segment.name, "arguments": ""}


NAMES = {"thought": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}


def _grow(step: Step, place: dict[str, Any]) -> list[dict[str, Any]]:
    assert step.segment is not None
    kind = step.segment.kind
    more = {} if kind == "call" else {"content_index": 0}
    more |= {"logprobs": []} if kind == "text" else {}
    return [{"type": f"response.{NAMES[kind]}.delta", **place, **more, "delta": step.fresh}]


def _finish(segment: Segment, item: dict[str, Any], place: dict[str, Any]) -> list[dict[str, Any]]:
    item["status"] = "completed"
    name = f"response.{NAMES[segment.kind]}.done"
    done = {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}
    if segment.kind == "call":
        item["arguments"] = segment.text
        return [{"type": name, **place, "name": segment.name, "arguments": segment.text}, done]
    part = item["content"][0]
    part["text"] = segment.text
    more = {"logprobs": []} if segment.kind == "text" else {}
    return [
        {"type": name, **place, "content_index": 0, **more, "text": segment.text},
        {"type": "response.content_part.done", **place, "content_index": 0, "part": part},
        done,
    ]
