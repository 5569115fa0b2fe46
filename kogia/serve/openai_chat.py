"""OpenAI's chat completions, with the thoughts of DeepSeek's API and vLLM's further fields."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kogia.engine.grammar import ResponseFormat
from kogia.engine.request import Completion
from kogia.serve.access import Caller, authenticate
from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_LOGPROBS, Count, Flag, Name, Part, Whole
from kogia.serve.generation import Answer, Piece, collect, new_id, pieces, run, usage
from kogia.serve.logprobs import chat_logprobs
from kogia.serve.prompts import Messages, conversation, render
from kogia.serve.sampling import EFFORTS, Effort, SamplingBody, Thinking, sampling_params
from kogia.serve.sse import DONE, EventStream, encode, until_gone
from kogia.serve.state import Running, ServedModel, ServerState
from kogia.serve.strict import StrictRoute
from kogia.text.chat import Prompt

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


class JsonSchema(Part):
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    name: Name | None = None
    strict: Flag | None = None


class Format(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


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


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: Format | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    thinking: ThinkingSwitch | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    include_reasoning: Flag | None = None
    """False thinks, and does not show it."""

    @property
    def thinks(self) -> Thinking:
        """What its many words for one thing say. Raises 400 where they contradict each other."""
        said = [self.enable_thinking, *(vars(self.chat_template_kwargs or TemplateSwitches()).values())]
        if self.thinking is not None:
            said.append({"enabled": True, "disabled": False}.get(self.thinking.type))
        if self.reasoning_effort is not None:
            said.append(False if self.reasoning_effort == "none" else None)
        known = {each for each in said if each is not None}
        if len(known) > 1:
            raise ApiError("thinking is turned on and off at once: say it in one way", param="thinking")
        budget = EFFORTS.get(self.reasoning_effort or "")
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            budget = self.thinking.budget_tokens
        return Thinking(next(iter(known), None), budget)

    @property
    def format(self) -> ResponseFormat | None:
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return ResponseFormat(json={"type": "object"})
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            raise ApiError("response_format.json_schema.schema is missing", param="response_format.json_schema.schema")
        try:
            return ResponseFormat(json=asked.json_schema.schema_)
        except ValueError as error:
            raise ApiError(str(error), param="response_format.json_schema.schema") from None


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    state: ServerState = request.app.state.server
    reply = _Reply(state, body, await start_chat(state, body, caller))
    if body.stream:
        return EventStream(reply.chunks(), state.config.keep_alive_seconds)
    whole = await until_gone(request.receive, reply.whole())
    return JSONResponse(whole or {})


@router.post("/v1/chat/completions/{completion_id}/stop_thinking")
async def stop_thinking(completion_id: str, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    """Close the thoughts of an answer that is under way: what follows is the answer."""
    running = request.app.state.server.running.get(completion_id)
    if running is None or running.caller != caller:
        raise ApiError(f"{completion_id[:80]!r}: no answer of that id is under way", 404, param="completion_id")
    running.stream.stop_thinking()
    return JSONResponse({"id": completion_id, "object": "chat.completion.stop_thinking", "stopped": True})


async def chat_prompt(served: ServedModel, body: ChatBody) -> Prompt:
    """What the model is given of a conversation. Raises 400 for messages that will not do."""
    return await asyncio.to_thread(render, conversation(body.messages), served, body.thinks)


async def start_chat(state: ServerState, body: ChatBody, caller: Caller) -> Running:
    """Begin to answer a conversation. Raises 400 for what will not do."""
    served = state.find(body.model)
    state.note_ignored("/v1/chat/completions", body.unknown)
    prompt = await chat_prompt(served, body)
    params = sampling_params(
        body,
        served,
        caller,
        prompt,
        logprobs=(body.top_logprobs or True) if body.logprobs else False,
        response_format=body.format,
        thinking_budget=body.thinks.budget,
        max_tokens=body.max_completion_tokens,
    )
    return await run(state, served, caller, prompt, params, new_id("chatcmpl-"))


class _Reply:
    """One request's answer, whole or in chunks."""

    def __init__(self, state: ServerState, body: ChatBody, running: Running) -> None:
        self._state, self._body, self._running = state, body, running
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        answers = await collect(pieces(self._state, self._running))
        completions = [answer.completion for answer in answers]
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": usage(self._running, completions),
            **self._prompt_extras(completions),
        }

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        completions: list[Completion] = []
        try:
            for index in range(len(self._running.stream.request_ids)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async with contextlib.aclosing(pieces(self._state, self._running)) as parts:
                async for piece in parts:
                    if piece.completion is not None:
                        completions.append(piece.completion)
                    if not piece.is_empty or self._shows_tokens:
                        yield self._piece(piece)
            if self._body.stream_options is not None and self._body.stream_options.include_usage:
                yield encode({**self._head(), "choices": [], "usage": usage(self._running, completions)})
            yield DONE
        except ApiError as error:
            yield encode(error.body)
        finally:
            self._state.end(self._running)

    @property
    def _shows_tokens(self) -> bool:
        return bool(self._body.logprobs or self._body.return_token_ids)

    def _head(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        running = self._running
        return {"id": running.id, "object": kind, "created": self._created, "model": running.model.name}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        completion = answer.completion
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        return {
            "index": index,
            "message": message | self._thought(answer.reasoning),
            "finish_reason": completion.finish_reason,
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs, completion.top_logprobs),
            **self._extras(completion),
        }

    def _piece(self, piece: Piece) -> bytes:
        delta = ({"content": piece.content} if piece.content else {}) | self._thought(piece.reasoning)
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
        reason = None if completion is None else completion.finish_reason
        choice = {"index": index, "delta": delta, "finish_reason": reason, **(more or {})}
        return encode({**self._head(), "choices": [choice]})

    def _thought(self, reasoning: str) -> dict[str, str]:
        """Under both names that clients look for."""
        if not reasoning or self._body.include_reasoning is False:
            return {}
        return {"reasoning_content": reasoning, "reasoning": reasoning}

    def _logprobs(self, token_ids: list[int], logprobs: list[float] | None, top: Any) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": chat_logprobs(self._running.model.tokenizer, token_ids, logprobs or [], top)}

    def _extras(self, completion: Completion) -> dict[str, Any]:
        return {"token_ids": completion.token_ids} if self._body.return_token_ids else {}

    def _prompt_extras(self, completions: list[Completion]) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._body.return_token_ids:
            extras["prompt_token_ids"] = list(self._running.prompt_ids)
        return extras
