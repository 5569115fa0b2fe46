"""vLLM's `/tokenize`, `/detokenize` and `/tokenizer_info`: what a text, or a conversation, is to the model."""

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from kogia.serve.access import Caller, authenticate
from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_TOKENS, Body, Flag, Name, Text, TokenIds
from kogia.serve.openai_chat import TemplateSwitches
from kogia.serve.prompts import Messages, check_generation_prompt, check_tokens, dialogue, render, write_prompt
from kogia.serve.sampling import Thinking
from kogia.serve.served import ServedModel
from kogia.serve.state import ServerState
from kogia.serve.strict import StrictRoute
from kogia.serve.tools import Tools

router = APIRouter(route_class=StrictRoute, tags=["tokens"])


class TokenizeBody(Body):
    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    add_special_tokens: Flag | None = None
    """Begin a text as the model's texts do; without it true."""
    return_token_strs: Flag | None = None
    continue_final_message: Flag | None = None
    add_generation_prompt: Flag | None = None


class DetokenizeBody(Body):
    model: Name | None = None
    tokens: TokenIds


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    state: ServerState = request.app.state.server
    state.note_ignored("/tokenize", body)
    if body.messages is not None:
        check_generation_prompt(body.add_generation_prompt, body.continue_final_message)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("give either a prompt or messages", param="prompt")
    served = await state.find(body.model)
    tokens = await write_prompt(served, caller, _tokens, body, served)
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": served.config.max_position}
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(_texts, tokens, served)
    return answer


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    state: ServerState = request.app.state.server
    state.note_ignored("/detokenize", body)
    served = await state.find(body.model)
    check_tokens(body.tokens, "tokens", served)
    return {"prompt": await asyncio.to_thread(served.tokenizer.decode, body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(
    request: Request, model: Name | None = None, caller: Caller = Depends(authenticate)
) -> dict[str, Any]:
    """What a client needs to render conversations itself, in the words of tokenizer_config.json."""
    served: ServedModel = await request.app.state.server.find(model)
    tokenizer = served.tokenizer
    return {
        **tokenizer.special_tokens,
        "add_bos_token": tokenizer.adds_bos,
        "model_max_length": served.config.max_position,
        "chat_template": tokenizer.template_source,
    }


def _tokens(body: TokenizeBody, served: ServedModel) -> list[int]:
    if body.messages is not None:
        switches = body.chat_template_kwargs or TemplateSwitches()
        enabled = switches.enable_thinking if switches.thinking is None else switches.thinking
        tools = [tool.described for tool in body.tools or ()]
        said = dialogue(body.messages, tools, goes_on=bool(body.continue_final_message))
        return render(said, served, Thinking(enabled)).token_ids
    encode = served.tokenizer.encode if body.add_special_tokens is False else served.tokenizer.encode_raw
    try:
        tokens = encode(body.prompt or "", MOST_TOKENS)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from None
    if len(tokens) > MOST_TOKENS:
        raise ApiError(f"prompt has {len(tokens):,} tokens: must have at most {MOST_TOKENS:,}", param="prompt")
    return tokens


def _texts(tokens: list[int], served: ServedModel) -> list[str]:
    """Each token by itself."""
    texts = {token: served.tokenizer.decode([token]) for token in set(tokens)}
    return [texts[token] for token in tokens]
