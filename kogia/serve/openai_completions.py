"""OpenAI's text completions, with vLLM's further fields: texts and token ids are continued as they are."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kogia.engine.request import Completion
from kogia.serve.access import Caller, authenticate
from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_COMPLETIONS, MOST_LOGPROBS, MOST_PROMPTS, Flag, Text, TokenIds, Whole, items
from kogia.serve.generation import Piece, collect, merge, new_id, pieces, run, timings, usage
from kogia.serve.logprobs import TextLogprobs, prompt_logprobs, routed_experts
from kogia.serve.openai_chat import StreamOptions, last_chunk, wants_usage
from kogia.serve.prompts import write_prompt
from kogia.serve.sampling import Format, SamplingBody, check_best_of, check_scores, format_of, sampling_params
from kogia.serve.served import ServedModel
from kogia.serve.sse import DONE, EventStream, encode
from kogia.serve.state import Running, ServerState
from kogia.serve.strict import StrictRoute
from kogia.text.chat import Prompt
from kogia.text.tokenizer import Tokenizer

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
Texts = Annotated[list[Text], items(MOST_PROMPTS, 1)]
Prompts = Annotated[list[TokenIds], items(MOST_PROMPTS, 1)]


class CompletionBody(SamplingBody):
    instead = {  # noqa: RUF012 - as in SamplingBody
        **SamplingBody.instead,
        "messages": "send prompt, or ask /v1/chat/completions",
        "tools": "a text has no calls; ask /v1/chat/completions",
        "stop_sequences": "send stop",
        "max_completion_tokens": "send max_tokens",
        "max_output_tokens": "send max_tokens",
    }
    prompt: Text | TokenIds | Texts | Prompts
    suffix: Text | None = None
    echo: Flag | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=MOST_COMPLETIONS)] | None = None
    response_format: Format | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several. Raises 400 where there is none."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]  # type: ignore[list-item]
        if not given:
            raise ApiError("prompt = []: must be a text, token ids, or a list of either", param="prompt")
        return list(given)  # type: ignore[arg-type]


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request, caller: Caller = Depends(authenticate)) -> Response:
    return await complete(body, request, caller)


async def complete(body: CompletionBody, request: Request, caller: Caller) -> Response:
    """Answer one request. Raises 400 for what will not do."""
    state: ServerState = request.app.state.server
    state.note_ignored("/v1/completions", body)
    _check(body)
    served = await state.find(body.model)
    prompts = await write_prompt(served, caller, _encode, body, served)
    reply = CompletionReply(state, body, await _start(state, body, served, caller, prompts))
    if body.stream:
        return EventStream(reply.chunks(), state.config.keep_alive_seconds)
    return JSONResponse(await reply.whole())


def _check(body: CompletionBody) -> None:
    check_best_of(body.best_of, body.n)
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(
            "echo with logprobs comes when the prompt is scored as a whole: leave stream out", param="stream"
        )
    if body.max_tokens == 0 and (body.stream or not (body.echo or body.prompt_logprobs is not None)):
        raise ApiError(
            "max_tokens = 0: must be at least 1, but where echo or prompt_logprobs score a prompt, without stream",
            param="max_tokens",
        )


def _encode(body: CompletionBody, served: ServedModel) -> list[list[int]]:
    """The prompts as tokens. Raises 400 for text that is none, and for holes that the model cannot fill."""
    tokenizer, most = served.tokenizer, served.config.max_position
    try:
        if body.suffix is not None:
            return [fill_prompt(tokenizer, prompt, body.suffix, most) for prompt in body.prompts]
        return [tokenizer.encode_raw(prompt, most) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from None


HOLES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
"""What stands before the text, in place of the hole, and behind all: DeepSeek's and Qwen's."""


def fill_prompt(tokenizer: Tokenizer, prompt: str | list[int], suffix: str, most: int | None = None) -> list[int]:
    """The prompt for a text with a hole before `suffix`. Raises 400 for a model that was not trained on holes."""
    known = tokenizer.backend.token_to_id
    marks = next((marks for marks in HOLES if all(known(mark) is not None for mark in marks)), None)
    if marks is None:
        raise ApiError("suffix: this model's tokenizer has no marks for a hole in a text; leave it out", param="suffix")
    if not isinstance(prompt, str):
        raise ApiError("suffix with a prompt of token ids: give the text", param="suffix")
    begin, hole, end = marks
    return tokenizer.encode_raw(f"{begin}{prompt}{hole}{suffix}{end}", most)


async def _start(
    state: ServerState, body: CompletionBody, served: ServedModel, caller: Caller, prompts: Sequence[list[int]]
) -> list[Running]:
    """Begin all; none if one of them will not do."""
    id_, started = new_id("cmpl-"), []
    state.limiter.check_size(caller.name, len(prompts), "prompt")
    check_scores(sum(map(len, prompts)), body.logprobs if body.echo else None, "logprobs")
    check_scores(sum(map(len, prompts)), body.prompt_logprobs, "prompt_logprobs")
    logprobs = False if body.logprobs is None else body.logprobs or True
    default = min(DEFAULT_MAX_TOKENS, served.max_tokens or DEFAULT_MAX_TOKENS)
    scored = (
        body
        if body.echo is None or body.logprobs is None
        else body.model_copy(
            update={"prompt_logprobs": body.logprobs if body.prompt_logprobs is None else body.prompt_logprobs}
        )
    )
    try:
        for index, ids in enumerate(prompts):
            prompt = Prompt(list(ids), opens_thought=False)
            asked = sampling_params(
                scored,
                served,
                caller,
                prompt,
                logprobs=logprobs,
                response_format=format_of(body.response_format),
                max_tokens=default if body.max_tokens is None else body.max_tokens,
            )
            own = id_ if index == 0 else f"{id_}-{index}"
            started.append(await run(state, served, caller, prompt, asked, own, is_text=True))
    except BaseException:
        for running in started:
            state.end(running)
        raise
    return started


class CompletionReply:
    """One request's answers, whole or in chunks."""

    def __init__(self, state: ServerState, body: CompletionBody, running: list[Running]) -> None:
        self._state, self._body, self._running = state, body, running
        self._created, self._n = int(time.time()), body.n or 1
        self._tokenizer = running[0].model.tokenizer
        self._logprobs: dict[int, TextLogprobs] = {}

    def _pieces(self) -> AsyncGenerator[Piece, None]:
        return merge([pieces(self._state, each) for each in self._running], self._n)

    async def whole(self) -> dict[str, Any]:
        answers = await collect(self._pieces())
        completions = [answer.completion for answer in answers]
        return {
            **self._head(),
            "choices": [self._choice(index, each.content, each.completion) for index, each in enumerate(answers)],
            **self._end(completions, has_usage=True),
        }

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        completions: list[Completion] = []
        try:
            for index in range(len(self._running) * self._n if self._body.echo else 0):
                yield self._chunk(index, self._echo(index), None)
            async with contextlib.aclosing(self._pieces()) as parts:
                async for piece in parts:
                    if piece.completion is not None:
                        completions.append(piece.completion)
                    if not piece.is_empty or self._body.logprobs is not None or self._body.return_token_ids:
                        yield self._piece(piece)
            end = self._end(completions, has_usage=wants_usage(self._body.stream_options))
            yield last_chunk(self._head(), end) + DONE
        except ApiError as error:
            yield encode(error.body)
        finally:
            for running in self._running:
                self._state.end(running)

    def _head(self) -> dict[str, Any]:
        first = self._running[0]
        return {"id": first.id, "object": "text_completion", "created": self._created, "model": first.model.name}

    def _of(self, index: int) -> Running:
        """The request that an answer belongs to."""
        return self._running[index // self._n]

    def _echo(self, index: int) -> str:
        """The prompt as text; that of a text with a hole is the text itself."""
        if self._body.suffix is not None:
            prompt = self._body.prompts[index // self._n]
            return prompt if isinstance(prompt, str) else ""
        return self._tokenizer.decode(self._of(index).prompt_ids, skip_special=True)

    def _choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        scores_only = self._body.max_tokens == 0
        num_shown = 0 if scores_only else len(completion.token_ids)
        shown = "" if scores_only else text
        choice = {
            "index": index,
            "text": self._echo(index) + shown if self._body.echo else shown,
            "finish_reason": "length" if scores_only else completion.finish_reason,
            "logprobs": self._whole_logprobs(index, completion, num_shown),
            **routed_experts(completion),
        }
        if self._body.return_token_ids:
            choice |= {"token_ids": completion.token_ids[:num_shown]}
            choice |= {"prompt_token_ids": list(self._of(index).prompt_ids)}
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._of(index).prompt_ids, completion)
        return choice

    def _whole_logprobs(self, index: int, completion: Completion, num_shown: int) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        token_ids, values = completion.token_ids[:num_shown], list[float | None](completion.logprobs or [])[:num_shown]
        top = completion.top_logprobs and list(completion.top_logprobs)[:num_shown]
        tables = [] if top is None else list(top)
        if self._body.echo:
            token_ids = [*self._of(index).prompt_ids, *token_ids]
            values = [*(completion.prompt_logprobs or []), *values]
            tables = [*(completion.prompt_top_logprobs or []), *tables]
        return TextLogprobs(self._tokenizer).push(token_ids, values, tables if self._body.logprobs else None)

    def _piece(self, piece: Piece) -> bytes:
        more: dict[str, Any] = {}
        if self._body.logprobs is not None:
            own = self._logprobs.setdefault(piece.index, TextLogprobs(self._tokenizer))
            more["logprobs"] = own.push(piece.token_ids, piece.logprobs, piece.top_logprobs)
        if self._body.return_token_ids:
            more["token_ids"] = piece.token_ids
        return self._chunk(piece.index, piece.content, piece.completion, more)

    def _chunk(self, index: int, text: str, completion: Completion | None, more: dict[str, Any] | None = None) -> bytes:
        reason = None if completion is None else completion.finish_reason
        extras = {} if completion is None else routed_experts(completion)
        choice = {"index": index, "text": text, "finish_reason": reason, **(more or {}), **extras}
        return encode({**self._head(), "choices": [choice]})

    def _end(self, completions: list[Completion], *, has_usage: bool) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if has_usage:
            extras["usage"] = used = usage(self._running, completions)
            if self._body.max_tokens == 0:
                used |= {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]}
        return extras | ({"timings": timings(self._running[0])} if self._body.timings else {})
