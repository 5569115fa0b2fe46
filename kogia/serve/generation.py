"""From a prompt to what the APIs show of its answers.

There is one generator, `pieces`. A streaming route turns each piece into a chunk, any other joins them (`collect`) and
makes its answer of that: so the two cannot differ.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from kogia.engine.loop import Stream
from kogia.engine.request import Completion, SamplingParams, TokenEvent, TopLogprobs
from kogia.serve.access import Caller
from kogia.serve.errors import ApiError, refused
from kogia.serve.state import Running, ServedModel, ServerState
from kogia.text.chat import Prompt
from kogia.text.thoughts import ThoughtSplitter


@dataclass(slots=True)
class Piece:
    """What one step brings to one of the answers."""

    index: int
    """Of the answer, among those of its request."""
    reasoning: str = ""
    content: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] | None = None
    completion: Completion | None = None
    """Set in the last one."""

    @property
    def is_empty(self) -> bool:
        """Nothing but tokens whose text is still to come."""
        return not (self.reasoning or self.content or self.completion)


@dataclass(slots=True)
class Answer:
    """The pieces of one answer, joined."""

    completion: Completion
    reasoning: str = ""
    content: str = ""


class AnswerReader:
    """Splits the text of one answer into thought and content as it comes."""

    def __init__(self, opens_thought: bool) -> None:
        self._thoughts = ThoughtSplitter(opens_thought)

    def read(self, index: int, event: TokenEvent) -> Piece:
        thought, content = self._thoughts.push(event.text)
        if event.completion is not None:
            more_thought, more_content = self._thoughts.finish()
            thought, content = thought + more_thought, content + more_content
        return _piece(index, event, thought, content)


class TextReader:
    """Takes the text of one answer as it is."""

    def read(self, index: int, event: TokenEvent) -> Piece:
        return _piece(index, event, "", event.text)


Reader = AnswerReader | TextReader


def _piece(index: int, event: TokenEvent, reasoning: str, content: str) -> Piece:
    return Piece(
        index, reasoning, content, event.token_ids, event.logprobs, event.top_logprobs, completion=event.completion
    )


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


async def run(
    state: ServerState, served: ServedModel, caller: Caller, prompt: Prompt, params: SamplingParams, id: str
) -> Running:
    """Start a request. Raises 400 for what the engine refuses.

    The engine checks a request, and compiles its grammar, in a thread: no other client waits for that.
    """
    state.check_ready()
    submitting = asyncio.ensure_future(asyncio.to_thread(served.engine.submit, prompt.token_ids, params))
    try:
        stream = await asyncio.shield(submitting)
    except asyncio.CancelledError:  # the client has left meanwhile
        submitting.add_done_callback(_give_up)
        raise
    except ValueError as error:
        raise refused(error, ("messages", "prompt", "response_format", "logit_bias", "active_experts")) from None
    running = Running(id, served, caller, stream, prompt.token_ids, prompt.opens_thought)
    state.begin(running)
    return running


def _give_up(submitting: "asyncio.Future[Stream]") -> None:
    with contextlib.suppress(BaseException):
        submitting.result().cancel()


async def pieces(
    state: ServerState, running: Running, reader: Callable[[], Reader] | None = None
) -> AsyncGenerator[Piece, None]:
    """What comes of a request, piece by piece. Left early, or in whatever way, it frees what the request holds.

    Raises what ended it without an answer: a drain, or weights that overflow.
    """
    make = reader or (lambda: AnswerReader(running.opens_thought))
    readers = {request_id: (index, make()) for index, request_id in enumerate(running.stream.request_ids)}
    try:
        async with contextlib.aclosing(aiter(running.stream)) as events:  # type: ignore[arg-type]
            async for event in events:
                index, own = readers[event.request_id]
                piece = own.read(index, event)
                _check(piece, running)
                yield piece
    finally:
        state.end(running)


def _check(piece: Piece, running: Running) -> None:
    completion = piece.completion
    if completion is not None and completion.finish_reason == "abort":
        raise ApiError(running.reason or "the request was given up", 503)
    if completion is not None and completion.finish_reason == "error":
        raise ApiError(completion.error or "the model produced no finite numbers; its weights overflow", 500)


async def collect(parts: AsyncGenerator[Piece, None]) -> list[Answer]:
    """The whole answers, in order."""
    texts: dict[int, tuple[list[str], list[str]]] = {}
    completions: dict[int, Completion] = {}
    async with contextlib.aclosing(parts):
        async for piece in parts:
            reasoning, content = texts.setdefault(piece.index, ([], []))
            reasoning.append(piece.reasoning)
            content.append(piece.content)
            if piece.completion is not None:
                completions[piece.index] = piece.completion
    return [Answer(completions[index], *("".join(each) for each in texts[index])) for index in sorted(completions)]


def usage(running: Running, completions: list[Completion]) -> dict[str, Any]:
    """Tokens, in OpenAI's and DeepSeek's words: hits and misses make up the prompt."""
    num_prompt, num_new = len(running.prompt_ids), sum(len(each.token_ids) for each in completions)
    num_cached = min((each.num_cached_tokens for each in completions), default=0)
    prompt, tokenizer = Prompt([], running.opens_thought), running.model.tokenizer
    num_thought = sum(prompt.num_thinking_tokens(each.token_ids, tokenizer) for each in completions)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": num_thought},
        "prompt_cache_hit_tokens": num_cached,
        "prompt_cache_miss_tokens": num_prompt - num_cached,
    }
