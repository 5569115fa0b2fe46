"""Anthropic's messages: an answer is a list of blocks, of thought, text and calls of tools."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kogia.engine.request import Completion
from kogia.serve.access import Caller, authenticate
from kogia.serve.chat import Chat, Turn, start, turn_prompt
from kogia.serve.errors import ApiError, wrong_value
from kogia.serve.fields import MOST_MESSAGES, MOST_TOOLS, Body, Count, Flag, Metadata, Name, Part, Stops, Text, items
from kogia.serve.generation import new_id, usage
from kogia.serve.openai_chat import ThinkingSwitch
from kogia.serve.prompts import CalledFunction, CalledTool, ChatMessage
from kogia.serve.sampling import EFFORTS, Effort, SamplingBody, Thinking, schema_format
from kogia.serve.segments import Segment, Step, segments
from kogia.serve.sse import EventStream, encode
from kogia.serve.state import ServerState
from kogia.serve.strict import StrictRoute
from kogia.serve.tools import Function, Tool
from kogia.serve.tools import Name as ToolName

router = APIRouter(route_class=StrictRoute, tags=["Anthropic"])


class Block(Part):
    """A part of a message; which of the fields it has follows from its type."""

    type: Name
    text: Text | None = None
    thinking: Text | None = None
    id: Name | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: "Text | Blocks | None" = None


Blocks = Annotated[list[Block], items(MOST_MESSAGES)]


class AnthropicMessage(Part):
    role: Literal["user", "assistant"]
    content: Text | Blocks


class AnthropicTool(Part):
    name: ToolName
    description: Text | None = None
    input_schema: dict[str, Any]

    @property
    def tool(self) -> Tool:
        function = Function(name=self.name, description=self.description, parameters=self.input_schema)
        return Tool(type="function", function=function)


class AnthropicChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: Flag | None = None


class OutputFormat(Part):
    type: Literal["json_schema"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class OutputConfig(Part):
    effort: Effort | None = None
    format: OutputFormat | None = None


class Conversed(Body):
    """What counts as input."""

    instead = {  # noqa: RUF012 - as in SamplingBody
        "container": "no code is run here; leave it out",
        "mcp_servers": "no other server is asked from here; send tools",
        "functions": "send tools",
        "prefill": "end messages with the beginning of the answer, of the role assistant",
        "output_format": "send output_config.format",
    }

    model: Name | None = None
    messages: Annotated[list[AnthropicMessage], items(MOST_MESSAGES, 1)]
    system: Text | Blocks | None = None
    tools: Annotated[list[AnthropicTool], items(MOST_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: ThinkingSwitch | None = None
    output_config: OutputConfig | None = None

    @property
    def thinks(self) -> Thinking:
        effort = None if self.output_config is None else self.output_config.effort
        if self.thinking is None:
            return Thinking(False if effort == "none" else None, EFFORTS.get(effort or ""))
        enabled = {"enabled": True, "disabled": False}.get(self.thinking.type)
        return Thinking(enabled, self.thinking.budget_tokens or EFFORTS.get(effort or ""))

    @property
    def turn(self) -> Turn:
        choice = self.tool_choice or AnthropicChoice(type="auto")
        if choice.type == "tool" and choice.name is None:
            raise ApiError("tool_choice.name is missing", param="tool_choice.name")
        form = None if self.output_config is None else self.output_config.format
        return Turn(
            messages=self._chat_messages(),
            goes_on=self.messages[-1].role == "assistant",
            thinking=self.thinks,
            tools=() if choice.type == "none" else [tool.tool for tool in self.tools or ()],
            must_call=choice.type in ("any", "tool"),
            tool_name=choice.name if choice.type == "tool" else None,
            schema_name="input_schema",
            parallel=not choice.disable_parallel_tool_use,
            response_format=None if form is None else schema_format(form.schema_, "output_config.format"),
        )

    def _chat_messages(self) -> list[ChatMessage]:
        system = []
        if self.system is not None:
            system = [ChatMessage(role="system", content=_text(self.system, "system")).at("system", "system")]
        each = [_chat_messages(message, f"messages.{i}") for i, message in enumerate(self.messages)]
        return system + [message for own in each for message in own]


class MessagesBody(Conversed, SamplingBody):
    instead = {  # noqa: RUF012 - as in SamplingBody
        **SamplingBody.instead,
        **Conversed.instead,
        "response_format": "send output_config.format",
        "reasoning_effort": "send output_config.effort",
    }
    max_tokens: Count  # type: ignore[assignment]
    stop_sequences: Stops | None = None
    metadata: Metadata | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (*super().stops, *(self.stop_sequences or ()))

    @property
    def called(self) -> dict[str, str]:
        own = {"prompt": "messages", "stop": "stop_sequences"}
        if self.thinking_token_budget is None and self.output_config is not None:
            own["thinking_token_budget"] = "output_config.effort"
        if self.thinking_token_budget is None and self.thinking is not None and self.thinking.budget_tokens:
            own["thinking_token_budget"] = "thinking.budget_tokens"
        return super().called | own


@router.post("/v1/messages")
@router.post("/anthropic/v1/messages")
async def messages(body: MessagesBody, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    state: ServerState = request.app.state.server
    state.note_ignored("/v1/messages", body)
    if (body.n or 1) != 1:
        raise ApiError(f"n = {body.n}: must be 1 here", param="n")
    reply = MessageReply(await start(state, body, body.turn, caller, new_id("msg_")), body)
    if body.stream:
        return EventStream(reply.chunks(), state.config.keep_alive_seconds)
    return JSONResponse(await reply.whole())


@router.post("/v1/messages/count_tokens")
@router.post("/anthropic/v1/messages/count_tokens")
async def count_tokens(body: Conversed, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, int]:
    body.passed_over()
    served = await request.app.state.server.find(body.model)
    return {"input_tokens": len((await turn_prompt(served, body.turn, caller)).token_ids)}


ROLES = {"tool_result": "user", **dict.fromkeys(("tool_use", "thinking", "redacted_thinking"), "assistant")}
"""In whose messages blocks of a type are; others are in both."""


def _chat_messages(message: AnthropicMessage, name: str) -> list[ChatMessage]:
    """One message in OpenAI's form; the results of tools come first, each as a message of its own."""
    content = f"{name}.content"
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content).at(name, content)]
    blocks = {f"{content}.{index}": block for index, block in enumerate(message.content)}
    turns, calls, thoughts, spoken = [], [], [], {}
    for place, block in blocks.items():
        own = ROLES.get(block.type, message.role)
        if own != message.role:
            raise wrong_value(f"{place}.type", block.type, f"must be in a message of the role {own}")
        if block.type == "tool_result":
            result = ChatMessage(
                role="tool", content=_text(block.content or "", f"{place}.content"), tool_call_id=block.tool_use_id
            )
            turns.append(result.at(place, f"{place}.content", f"{place}.tool_use_id"))
        elif block.type == "tool_use":
            calls.append(_call(block, place))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            spoken[place] = block
    if len(calls) > MOST_TOOLS:
        raise ApiError(f"{content} has {len(calls)} calls of tools: must have at most {MOST_TOOLS}", param=content)
    if spoken or calls or any(thoughts) or not turns:
        turn = ChatMessage(role=message.role, content=_texts(spoken), tool_calls=calls or None)
        turn.reasoning = "\n".join(thoughts) or None
        turns.append(turn.at(name, content))
    return turns


def _call(block: Block, place: str) -> CalledTool:
    missing = next((field for field in ("id", "name") if getattr(block, field) is None), None)
    if missing is not None or block.name is None:
        raise ApiError(f"{place}.{missing} is missing: a tool_use has one", param=f"{place}.{missing}")
    arguments = json.dumps(block.input or {}, ensure_ascii=False)
    return CalledTool(id=block.id, function=CalledFunction(name=block.name, arguments=arguments))


def _text(content: str | Sequence[Block], name: str) -> str:
    if isinstance(content, str):
        return content
    return _texts({f"{name}.{index}": block for index, block in enumerate(content)})


def _texts(blocks: Mapping[str, Block]) -> str:
    """The text of blocks by their place. Raises 400 for those that are none."""
    for place, block in blocks.items():
        if block.type != "text":
            raise ApiError(
                f"{place}.type = {block.type!r:.40}: must be text, which is all that this model reads; leave images "
                "and documents out",
                param=f"{place}.type",
            )
        if block.text is None:
            raise ApiError(f"{place}.text is missing", param=f"{place}.text")
    return "\n".join(block.text or "" for block in blocks.values())


class MessageReply:
    """One message, in events or put together of them."""

    def __init__(self, chat: Chat, body: MessagesBody) -> None:
        self._chat, self._running, self._body = chat, chat.running, body
        self._has_called = False

    async def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {}
        async with aclosing(self._events()) as events:
            async for event in events:
                message = _fold(message, event)
        for block in message["content"]:
            if block["type"] == "tool_use":
                block["input"] = _object(block.pop("json", ""))
        return message

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    yield encode(event, event["type"])
        except ApiError as error:
            yield encode(error.anthropic_body, "error")

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"type": "message_start", "message": self._message()}
            async with aclosing(segments(self._chat.pieces())) as steps:
                async for step in steps:
                    for event in self._events_of(step):
                        yield event
            yield {"type": "message_stop"}
        finally:
            self._chat.state.end(self._running)

    def _message(self) -> dict[str, Any]:
        running = self._running
        return {
            "id": running.id,
            "type": "message",
            "role": "assistant",
            "model": running.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": len(running.prompt_ids), "output_tokens": 0},
        }

    def _events_of(self, step: Step) -> list[dict[str, Any]]:
        if step.completion is not None:
            reason, sequence = self._stop(step.completion)
            delta = {"stop_reason": reason, "stop_sequence": sequence}
            return [{"type": "message_delta", "delta": delta, "usage": self._usage(step.completion)}]
        assert step.segment is not None
        place = {"index": step.segment.index}
        if step.does == "begins":
            return [{"type": "content_block_start", **place, "content_block": self._block(step.segment)}]
        if step.does == "grows":
            return [{"type": "content_block_delta", **place, "delta": _delta(step.segment, step.fresh)}]
        return [{"type": "content_block_stop", **place}]

    def _block(self, segment: Segment) -> dict[str, Any]:
        if segment.kind == "thought":
            return {"type": "thinking", "thinking": "", "signature": ""}
        if segment.kind == "text":
            return {"type": "text", "text": ""}
        self._has_called = True
        return {"type": "tool_use", "id": new_id("toolu_"), "name": segment.name, "input": {}}

    def _usage(self, completion: Completion) -> dict[str, Any]:
        """Cached tokens are not counted as input, but beside it."""
        used = usage([self._running], [completion])
        return {
            "input_tokens": used["prompt_cache_miss_tokens"],
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": used["completion_tokens_details"]["reasoning_tokens"]},
            "cache_read_input_tokens": used["prompt_cache_hit_tokens"],
            "cache_creation_input_tokens": 0,
        }

    def _stop(self, completion: Completion) -> tuple[str, str | None]:
        if completion.finish_reason == "length":
            return "max_tokens", None
        served = self._running.model
        if completion.token_ids and completion.token_ids[-1] in served.tokenizer.eos_ids:
            return ("tool_use" if self._has_called else "end_turn"), None
        rest = served.tokenizer.decode(completion.token_ids)[len(completion.text) :]
        found = next((stop for stop in self._body.stops if rest.startswith(stop)), None)
        if found is not None:
            return "stop_sequence", found
        return ("tool_use" if self._has_called else "end_turn"), None


def _delta(segment: Segment, fresh: str) -> dict[str, Any]:
    if segment.kind == "thought":
        return {"type": "thinking_delta", "thinking": fresh}
    if segment.kind == "text":
        return {"type": "text_delta", "text": fresh}
    return {"type": "input_json_delta", "partial_json": fresh}


def _fold(message: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """The message with what an event adds to it, as a client of the stream has it."""
    if event["type"] == "message_start":
        return event["message"]
    if event["type"] == "content_block_start":
        message["content"].append(event["content_block"])
    elif event["type"] == "content_block_delta":
        name, fresh = list(event["delta"].items())[1]
        block, name = message["content"][event["index"]], {"partial_json": "json"}.get(name, name)
        block[name] = block.get(name, "") + fresh
    elif event["type"] == "message_delta":
        message |= event["delta"]
        message["usage"] |= event["usage"]
    return message


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; none where they were cut off."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
