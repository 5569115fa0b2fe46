"""From a prompt to what the APIs show of its answers.

There is one generator, `pieces`. A streaming route turns each piece into a chunk, any other joins them (`collect`) and
makes its answer of that: so the two cannot differ.
"""

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kogia.engine.loop import Stream
from kogia.engine.request import Completion, TokenEvent, TopLogprobs
from kogia.serve.access import Caller
from kogia.serve.errors import ApiError
from kogia.serve.exchange import current
from kogia.serve.sampling import Asked
from kogia.serve.served import ServedModel
from kogia.serve.state import Running, ServerState
from kogia.serve.turns import in_thread
from kogia.text.chat import Prompt, ToolCall
from kogia.text.thoughts import ThoughtSplitter, num_thought_tokens
from kogia.text.tools import CallPiece, CallReader, Read


@dataclass(slots=True)
class Piece:
    """What one step brings to one of the answers."""

    index: int
    """Of the answer, among those of its request."""
    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] | None = None
    completion: Completion | None = None
    """Set in the last one."""

    @property
    def is_empty(self) -> bool:
        """Nothing but tokens whose text is still to come."""
        return not (self.reasoning or self.content or self.calls or self.completion)


@dataclass(slots=True)
class Answer:
    """The pieces of one answer, joined."""

    completion: Completion
    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class Reader(ABC):
    """Makes pieces of the events of one answer."""

    @abstractmethod
    def read(self, index: int, event: TokenEvent) -> Piece: ...


class AnswerReader(Reader):
    """Splits the text of an answer into thought, content and calls of tools as it comes."""

    def __init__(self, opens_thought: bool, calls: CallReader | None = None) -> None:
        self._thoughts = ThoughtSplitter(opens_thought)
        self._calls = calls

    def read(self, index: int, event: TokenEvent) -> Piece:
        reasoning, content = self._thoughts.push(event.text)
        read = Read(content) if self._calls is None else self._calls.push(content)
        if event.completion is not None:
            more, content = self._thoughts.finish()
            reasoning += more
            for each in [Read(content)] if self._calls is None else [self._calls.push(content), self._calls.finish()]:
                read += each
        return _piece(index, event, reasoning, read)


class TextReader(Reader):
    """Takes the text of an answer as it is."""

    def read(self, index: int, event: TokenEvent) -> Piece:
        return _piece(index, event, "", Read(event.text))


def _piece(index: int, event: TokenEvent, reasoning: str, read: Read) -> Piece:
    tokens = event.token_ids, event.logprobs, event.top_logprobs
    return Piece(index, reasoning, read.content, read.calls, *tokens, event.completion)


def new_id(prefix: str) -> str:
    return f"{prefix}{os.urandom(16).hex()}"


async def run(
    state: ServerState,
    served: ServedModel,
    caller: Caller,
    prompt: Prompt,
    asked: Asked,
    id: str,
    *,
    is_text: bool = False,
) -> Running:
    """Start a request. Raises 400 for what the engine refuses, 429 where the caller has used what is his, 503 where too
    many wait."""
    state.check_ready()
    state.check_room(asked.params.n)
    began = state.clock()
    state.limiter.admit(caller.name, began)
    try:
        stream = await _submit(served, caller, prompt.token_ids if is_text else prompt, asked)
    except BaseException:
        state.limiter.leave(caller.name)
        raise
    running = Running(id, served, caller, stream, asked, prompt.token_ids, prompt.opens_thought, is_text, began)
    state.begin(running)
    if (exchange := current.get()) is not None:
        running.request_id = exchange.id
        exchange.running.append(running)
    return running


async def _submit(served: ServedModel, caller: Caller, prompt: Prompt | Sequence[int], asked: Asked) -> Stream:
    """In a thread unless it is quick: the engine checks a request, and compiles its grammar, and no client without one
    waits for that."""
    lane = None if asked.params.response_format is None else served.lanes.formats
    submit = partial(served.engine.submit, prompt, asked.params)
    exchange = current.get()
    try:
        if lane is None and exchange is not None and exchange.is_quick:
            return submit()
        return await in_thread(submit, lane, caller.name, give_up=Stream.cancel)
    except ValueError as error:
        raise asked.refused(error) from None


async def pieces(
    state: ServerState, running: Running, new_calls: Callable[[], CallReader] | None = None
) -> AsyncGenerator[Piece, None]:
    """What comes of a request, piece by piece. Left early, or in whatever way, it frees what the request holds.

    Pieces wait for each other (`ServerState.next_chunks`) once there was text: the first token may have none, as half
    of a character or a blank, and nobody is to wait longer for it.

    Calls of tools are looked for with `new_calls`. Raises what ended it without an answer: a drain, or weights that
    overflow.
    """

    def new_reader() -> Reader:
        calls = None if new_calls is None else new_calls()
        return TextReader() if running.is_text else AnswerReader(running.opens_thought, calls)

    readers = {request_id: (index, new_reader()) for index, request_id in enumerate(running.stream.request_ids)}
    has_text = False
    try:
        while events := await running.stream.arrived():
            for event in _joined(events):
                index, own = readers[event.request_id]
                if event.token_ids:
                    state.note_tokens(running, index, len(event.token_ids))
                piece = own.read(index, event)
                _check(piece, running)
                has_text = has_text or not piece.is_empty
                yield piece
            if has_text and not running.stream.has_ended:
                await state.next_chunks(running.stream)
    finally:
        state.end(running)


def _joined(events: list[TokenEvent]) -> list[TokenEvent]:
    """One event per request, in place of several that have come meanwhile."""
    if len(events) == 1:
        return events
    own: dict[int, list[TokenEvent]] = {}
    for event in events:
        own.setdefault(event.request_id, []).append(event)
    return [each[0] if len(each) == 1 else _join_events(each) for each in own.values()]


def _join_events(events: list[TokenEvent]) -> TokenEvent:
    tops = [top for event in events for top in event.top_logprobs or ()]
    return TokenEvent(
        events[0].request_id,
        [token for event in events for token in event.token_ids],
        [value for event in events for value in event.logprobs],
        "".join(event.text for event in events),
        events[-1].completion,
        tops if any(event.top_logprobs is not None for event in events) else None,
    )


def _check(piece: Piece, running: Running) -> None:
    completion = piece.completion
    if completion is not None and completion.finish_reason == "abort":
        raise ApiError(running.reason or "the request was given up", 503)
    if completion is not None and completion.finish_reason == "error":
        if completion.error is not None:
            raise running.asked.refused(ValueError(completion.error))  # by rules that the request has brought
        raise ApiError("the model produced no finite numbers; its weights overflow", 500)


async def collect(parts: AsyncGenerator[Piece, None]) -> list[Answer]:
    """The whole answers, in order."""
    came: dict[int, list[Piece]] = {}
    async with contextlib.aclosing(parts):
        async for piece in parts:
            came.setdefault(piece.index, []).append(piece)
    return [_join(came[index]) for index in sorted(came)]


def _join(parts: Sequence[Piece]) -> Answer:
    """The pieces of one answer."""
    completion = parts[-1].completion
    assert completion is not None, "an answer has ended when its stream has"
    calls: dict[int, list[CallPiece]] = {}
    for call in (call for piece in parts for call in piece.calls):
        calls.setdefault(call.index, []).append(call)
    return Answer(
        completion,
        "".join(piece.reasoning for piece in parts),
        "".join(piece.content for piece in parts),
        [ToolCall(own[0].name or "", "".join(each.arguments for each in own)) for own in calls.values()],
    )


async def merge(streams: Sequence[AsyncGenerator[Piece, None]], num_answers: int) -> AsyncGenerator[Piece, None]:
    """The pieces of several requests as they come, with `num_answers` each; answers are numbered through."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def follow(number: int, parts: AsyncGenerator[Piece, None]) -> None:
        try:
            async with contextlib.aclosing(parts):
                async for piece in parts:
                    piece.index += number * num_answers
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - raised where the pieces are taken
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(number, parts)) for number, parts in enumerate(streams)]
    try:
        open_ones = len(tasks)
        while open_ones:
            came = await queue.get()
            if isinstance(came, BaseException):
                raise came
            if came is None:
                open_ones -= 1
            else:
                yield came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(running: Sequence[Running], completions: Sequence[Completion]) -> dict[str, Any]:
    """Tokens of requests, in OpenAI's and DeepSeek's words: hits and misses make up the prompts."""
    num_prompt = sum(len(each.prompt_ids) for each in running)
    num_new = sum(len(each.token_ids) for each in completions)
    num_cached = sum(each.num_cached for each in running)
    num_thought = sum(_num_thought(each) for each in running)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": num_thought},
        "prompt_cache_hit_tokens": num_cached,
        "prompt_cache_miss_tokens": num_prompt - num_cached,
    }


def _num_thought(running: Running) -> int:
    if running.is_text:
        return 0
    completions, tokenizer = running.stream.completions.values(), running.model.tokenizer
    return sum(num_thought_tokens(each.token_ids, tokenizer, running.opens_thought) for each in completions)


def timings(running: Running) -> dict[str, Any]:
    """What the slowest part of a request took, in llama.cpp's words: milliseconds, tokens and tokens per second."""
    completions = list(running.stream.completions.values())
    queue, prefill, decode = (max(part) * 1000 for part in zip(*(each.times for each in completions)))
    num_prompt, num_new = len(running.prompt_ids) - running.num_cached, sum(len(c.token_ids) for c in completions)
    return {
        "queue_ms": queue,
        "cache_n": running.num_cached,
        "prompt_n": num_prompt,
        "prompt_ms": prefill,
        "prompt_per_second": num_prompt / max(prefill, 1e-3) * 1000,
        "predicted_n": num_new,
        "predicted_ms": decode,
        "predicted_per_second": num_new / max(decode, 1e-3) * 1000,
        "draft_n": sum(each.num_drafted for each in completions),
        "draft_n_accepted": sum(each.num_accepted for each in completions),
    }
