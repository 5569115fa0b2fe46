"""What the page asks for beside the OpenAI routes: models, HTML of texts, answers with HTML, and traces."""

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kogia.serve.access import Caller, authenticate
from kogia.serve.chat import turn_prompt
from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_TOKENS, Body, Text, Token, items
from kogia.serve.generation import collect, new_id, pieces, run
from kogia.serve.openai_chat import ChatBody, start_chat
from kogia.serve.page.answer import Answer
from kogia.serve.page.facts import model_facts
from kogia.serve.page.render import render
from kogia.serve.page.trace import trace_of, trace_params
from kogia.serve.prompts import check_tokens
from kogia.serve.served import ServedModel
from kogia.serve.sse import EventStream
from kogia.serve.state import ServerState
from kogia.serve.strict import StrictRoute
from kogia.serve.turns import in_thread
from kogia.text.chat import Prompt
from kogia.text.thoughts import num_thought_tokens

router = APIRouter(route_class=StrictRoute, include_in_schema=False)
MOST_TEXTS = 200
MOST_TEXT_CHARS = 2**18
MOST_CHARS = 2**20
"""Of all texts: a million take ten seconds."""


class RenderBody(Body):
    texts: Annotated[list[Annotated[Text, Field(max_length=MOST_TEXT_CHARS)]], items(MOST_TEXTS)]


class TraceBody(ChatBody):
    token_ids: Annotated[list[Token], items(MOST_TOKENS, 1)]
    """Of the answer to `messages`."""


@router.get("/page/models")
async def models(request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    state: ServerState = request.app.state.server
    state.check_ready()
    return {"models": [model_facts(entry) for entry in state.models], "keeps": state.store is not None}


@router.post("/page/render")
async def rendered(body: RenderBody, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    if (size := sum(map(len, body.texts))) > MOST_CHARS:
        raise ApiError(f"texts have {size:,} characters: must have at most {MOST_CHARS:,} together", param="texts")
    state: ServerState = request.app.state.server
    return {"blocks": [await _rendered(state, caller, text) for text in body.texts]}


async def _rendered(state: ServerState, caller: Caller, text: str) -> list[str]:
    """One at a time: several threads of Python would leave the others a few milliseconds each."""
    return await in_thread(partial(render, text), state.rendering, caller.name)


@router.post("/page/chat")
async def chat(body: ChatBody, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    if (body.n or 1) != 1:
        raise ApiError(f"n = {body.n}: must be 1, as the page shows one answer per request", param="n")
    state: ServerState = request.app.state.server
    chat = await start_chat(state, body, caller)
    return EventStream(Answer(state, chat.running).events(), state.config.keep_alive_seconds)


@router.post("/page/trace")
async def trace(body: TraceBody, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    state: ServerState = request.app.state.server
    served = await state.find(body.model)
    return JSONResponse(await _traced(state, served, body, caller))


async def _traced(state: ServerState, served: ServedModel, body: TraceBody, caller: Caller) -> dict[str, Any]:
    check_tokens(body.token_ids, "token_ids", served)
    prompt = await turn_prompt(served, body.turn, caller)
    room = served.config.max_position - 1 - len(prompt.token_ids)
    answer = body.token_ids[: max(0, room)]
    if not answer:
        raise ApiError("the messages fill the context: no token of the answer fits", param="messages")
    params = trace_params(served, caller, body.active_experts, body.expert_threshold)
    scored = Prompt([*prompt.token_ids, *answer], opens_thought=False)
    running = await run(state, served, caller, scored, params, new_id("trace-"))
    (found,) = await collect(pieces(state, running))
    traced = await asyncio.to_thread(trace_of, served, answer, len(prompt.token_ids), found.completion)
    return {**traced, "thought_tokens": num_thought_tokens(answer, served.tokenizer, prompt.opens_thought)}
