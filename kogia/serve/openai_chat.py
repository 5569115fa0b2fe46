"""OpenAI's chat completions, with the thoughts of DeepSeek's API and vLLM's further fields."""

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kogia.engine.request import Completion
from kogia.serve.access import Caller, authenticate
from kogia.serve.chat import Chat, Turn, start
from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_COMPLETIONS, MOST_LOGPROBS, Count, Flag, Metadata, Part, Text, Whole, items
from kogia.serve.generation import Answer, Piece, collect, new_id, timings, usage
from kogia.serve.logprobs import chat_logprobs, prompt_logprobs, routed_experts
from kogia.serve.prompts import Messages, check_generation_prompt
from kogia.serve.sampling import EFFORTS, Effort, Format, SamplingBody, Thinking, check_best_of, format_of
from kogia.serve.sse import DONE, EventStream, encode
from kogia.serve.state import ServerState
from kogia.serve.strict import StrictRoute
from kogia.serve.tools import Choice, NamedTool, Tools
from kogia.text.tools import CallPiece

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


class ThinkingSwitch(Part):
    """DeepSeek's and Anthropic's."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Count | None = None


class TemplateSwitches(Part):
    """vLLM's: what may be said to a chat template is whether to think."""

    thinking: Flag | None = None
    enable_thinking: Flag | None = None


class StreamOptions(Part):
    include_usage: Flag | None = None


def wants_usage(options: StreamOptions | None) -> bool:
    """Whether a stream ends with what it has used, whose thoughts take longer to count than many a chunk to send."""
    return options is not None and bool(options.include_usage)


def last_chunk(head: dict[str, Any], end: dict[str, Any]) -> bytes:
    """What ends a stream, without a choice; nothing where there is nothing that concerns all choices."""
    return encode({**head, "choices": [], **end}) if end else b""


class ChatBody(SamplingBody):
    instead = {  # noqa: RUF012 - as in SamplingBody
        **SamplingBody.instead,
        "functions": "is OpenAI's older word; send tools",
        "function_call": "is OpenAI's older word; send tool_choice",
        "audio": "this model writes text; leave it out",
        "web_search_options": "nothing is looked up here; leave it out",
        "echo": "a conversation is not repeated; ask /v1/completions",
        "prompt": "send messages, or ask /v1/completions",
        "input": "send messages, or ask /v1/responses",
        "system": "send a message of the role system",
        "instructions": "send a message of the role system",
        "stop_sequences": "send stop",
        "max_output_tokens": "send max_completion_tokens",
    }
    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: Format | None = None
    stream_options: StreamOptions | None = None
    tools: Tools | None = None
    tool_choice: Choice | NamedTool | None = None
    parallel_tool_calls: Flag | None = None
    reasoning_effort: Effort | None = None
    thinking: ThinkingSwitch | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    include_reasoning: Flag | None = None
    """False thinks, and does not show it."""
    continue_final_message: Flag | None = None
    """Go on with the last message, an assistant's."""
    add_generation_prompt: Flag | None = None
    """vLLM's; that of `continue_final_message` says it all."""
    user: Text | None = None
    store: Flag | None = None
    metadata: Metadata | None = None
    modalities: Annotated[list[Literal["text"]], items(8)] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=MOST_COMPLETIONS)] | None = None

    @property
    def thinks(self) -> Thinking:
        """What its many words for one thing say. Raises 400 where they contradict each other."""
        switches = self.chat_template_kwargs or TemplateSwitches()
        said = [self.enable_thinking, switches.thinking, switches.enable_thinking]
        if self.thinking is not None:
            said.append({"enabled": True, "disabled": False}.get(self.thinking.type))
        if self.reasoning_effort == "none":
            said.append(False)
        known = {each for each in said if each is not None}
        if len(known) > 1:
            raise ApiError("thinking is turned on and off at once: say it in one way", param="thinking")
        budget = EFFORTS.get(self.reasoning_effort or "")
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            budget = self.thinking.budget_tokens
        return Thinking(next(iter(known), None), budget)

    @property
    def called(self) -> dict[str, str]:
        own = {"prompt": "messages", "logprobs": "logprobs" if self.top_logprobs is None else "top_logprobs"}
        if self.max_completion_tokens is not None:
            own["max_tokens"] = "max_completion_tokens"
        if self.thinking_token_budget is None and self.reasoning_effort is not None:
            own["thinking_token_budget"] = "reasoning_effort"
        if self.thinking_token_budget is None and self.thinking is not None and self.thinking.budget_tokens:
            own["thinking_token_budget"] = "thinking.budget_tokens"
        return super().called | own

    @property
    def turn(self) -> Turn:
        choice = self.tool_choice or "auto"
        name = choice.function.name if isinstance(choice, NamedTool) else None
        return Turn(
            messages=self.messages,
            goes_on=bool(self.continue_final_message),
            thinking=self.thinks,
            tools=() if choice == "none" else self.tools or (),
            must_call=choice == "required" or name is not None,
            tool_name=name,
            parallel=self.parallel_tool_calls is not False,
            response_format=format_of(self.response_format),
            logprobs=(self.top_logprobs or True) if self.logprobs else False,
            max_tokens=self.max_completion_tokens,
        )


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    state: ServerState = request.app.state.server
    reply = ChatReply(await start_chat(state, body, caller), body)
    if body.stream:
        return EventStream(reply.chunks(), state.config.keep_alive_seconds)
    return JSONResponse(await reply.whole())


@router.post("/v1/chat/completions/{completion_id}/stop_thinking")
async def stop_thinking(completion_id: str, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    """Close the thoughts of an answer that is under way: what follows is the answer."""
    running = request.app.state.server.running.get(completion_id)
    if running is None or running.caller != caller:
        raise ApiError(f"{completion_id[:80]!r}: no answer of that id is under way", 404, param="completion_id")
    running.stream.stop_thinking()
    return JSONResponse({"id": completion_id, "object": "chat.completion.stop_thinking", "stopped": True})


async def start_chat(state: ServerState, body: ChatBody, caller: Caller) -> Chat:
    """Begin to answer a conversation. Raises 400 for what will not do."""
    state.note_ignored("/v1/chat/completions", body)
    check_best_of(body.best_of, body.n)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(f"top_logprobs = {body.top_logprobs}: takes logprobs = true beside it", param="top_logprobs")
    check_generation_prompt(body.add_generation_prompt, body.continue_final_message)
    return await start(state, body, body.turn, caller, new_id("chatcmpl-"))


class ChatReply:
    """One request's answer, whole or in chunks."""

    def __init__(self, chat: Chat, body: ChatBody) -> None:
        self._chat, self._running, self._body = chat, chat.running, body
        self._created = int(time.time())
        self._num_calls: dict[int, int] = {}
        """Calls that have come, by answer."""

    async def whole(self) -> dict[str, Any]:
        answers = await collect(self._chat.pieces())
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            **self._end([answer.completion for answer in answers], has_usage=True),
        }

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        completions: list[Completion] = []
        try:
            for index in range(len(self._running.stream.request_ids)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async with contextlib.aclosing(self._chat.pieces()) as parts:
                async for piece in parts:
                    if piece.completion is not None:
                        completions.append(piece.completion)
                    if not piece.is_empty or self._shows_tokens:
                        yield self._piece(piece)
            end = self._end(completions, has_usage=wants_usage(self._body.stream_options))
            yield last_chunk(self._head(), end) + DONE
        except ApiError as error:
            yield encode(error.body)
        finally:
            self._chat.state.end(self._running)

    @property
    def _shows_tokens(self) -> bool:
        return bool(self._body.logprobs or self._body.return_token_ids)

    def _head(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        running = self._running
        return {"id": running.id, "object": kind, "created": self._created, "model": running.model.name}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        completion, calls = answer.completion, [call_object(call.name, call.arguments) for call in answer.calls]
        message = {"role": "assistant", "content": answer.content if answer.content or not calls else None}
        return {
            "index": index,
            "message": message | self._thought(answer.reasoning) | ({"tool_calls": calls} if calls else {}),
            "finish_reason": self._chat.finish_reason(completion.finish_reason, len(calls)),
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs, completion.top_logprobs),
            **({"token_ids": completion.token_ids} if self._body.return_token_ids else {}),
            **routed_experts(completion),
        }

    def _piece(self, piece: Piece) -> bytes:
        delta = ({"content": piece.content} if piece.content else {}) | self._thought(piece.reasoning)
        if piece.calls:
            delta["tool_calls"] = [_call_delta(call) for call in piece.calls]
            self._num_calls[piece.index] = piece.calls[-1].index + 1
        more: dict[str, Any] = {}
        if self._body.logprobs:
            more["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs, piece.top_logprobs)
        if self._body.return_token_ids:
            more["token_ids"] = piece.token_ids
        return self._chunk(piece.index, delta, piece.completion, more)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        completion: Completion | None = None,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        reason = None
        if completion is not None:
            reason = self._chat.finish_reason(completion.finish_reason, self._num_calls.get(index, 0))
            more = {**(more or {}), **routed_experts(completion)}
        choice = {"index": index, "delta": delta, "finish_reason": reason, **(more or {})}
        return encode({**self._head(), "choices": [choice]})

    def _end(self, completions: list[Completion], *, has_usage: bool) -> dict[str, Any]:
        body, running = self._body, self._running
        extras: dict[str, Any] = {"usage": usage([running], completions)} if has_usage else {}
        if body.timings:
            extras["timings"] = timings(running)
        if body.return_token_ids:
            extras["prompt_token_ids"] = list(running.prompt_ids)
        if body.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(running.model.tokenizer, running.prompt_ids, completions[0])
        return extras

    def _thought(self, reasoning: str) -> dict[str, Any]:
        """Under both names that clients look for."""
        if not reasoning or self._body.include_reasoning is False:
            return {}
        return {"reasoning_content": reasoning, "reasoning": reasoning}

    def _logprobs(self, token_ids: list[int], logprobs: list[float] | None, top: Any) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": chat_logprobs(self._running.model.tokenizer, token_ids, logprobs or [], top)}


def call_object(name: str, arguments: str) -> dict[str, Any]:
    return {"id": new_id("call_"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_delta(call: CallPiece) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **call_object(call.name, call.arguments)}
