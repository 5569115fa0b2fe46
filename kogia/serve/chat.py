"""A turn of a conversation, whichever API asks for it: what each of them makes of its body, and the request of it."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from kogia.serve.access import Caller
from kogia.serve.errors import ApiError, refused
from kogia.serve.generation import Piece, pieces, run
from kogia.serve.prompts import ChatMessage, dialogue, render, write_prompt
from kogia.serve.sampling import AskedFormat, SamplingBody, Thinking, sampling_params
from kogia.serve.served import ServedModel
from kogia.serve.state import Running, ServerState
from kogia.serve.tools import Tool, call_format, refused_call
from kogia.text.chat import Prompt
from kogia.text.tools import ToolFormat


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is asked beside the fields that all bodies share."""

    messages: Sequence[ChatMessage]
    name: str = "messages"
    """What the body calls them."""
    goes_on: bool = False
    """The last message is the beginning of the answer."""
    thinking: Thinking = Thinking()
    tools: Sequence[Tool] = ()
    must_call: bool = False
    """The answer is a call of one of the tools, or of the one that is named."""
    tool_name: str | None = None
    parallel: bool = True
    """It may be several."""
    schema_name: str = "function.parameters"
    """Where a tool of the body has its schema."""
    response_format: AskedFormat | None = None
    logprobs: bool | int = False
    max_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Chat:
    """A turn under way."""

    state: ServerState
    running: Running
    tool_format: ToolFormat | None
    """How the answer calls tools; None where it may not."""

    def pieces(self) -> AsyncGenerator[Piece, None]:
        return pieces(self.state, self.running, self.tool_format and self.tool_format.reader)

    def finish_reason(self, piece_reason: str, num_calls: int) -> str:
        """In OpenAI's words."""
        return "tool_calls" if num_calls and piece_reason == "stop" else piece_reason


async def start(state: ServerState, body: SamplingBody, turn: Turn, caller: Caller, id: str) -> Chat:
    """Begin to answer. Raises 400 for what will not do, 404 and 503 as `ServerState.find`."""
    served = await state.find(body.model)
    form = _tool_format(served, turn)
    prompt = await turn_prompt(served, turn, caller)
    asked = sampling_params(
        body,
        served,
        caller,
        prompt,
        logprobs=turn.logprobs,
        response_format=_response_format(served, turn, form),
        thinking_budget=turn.thinking.budget,
        max_tokens=turn.max_tokens,
    )
    return Chat(state, await run(state, served, caller, prompt, asked, id), form)


async def turn_prompt(served: ServedModel, turn: Turn, caller: Caller) -> Prompt:
    """What the model is given of a conversation. Raises 400 for messages that will not do."""
    tools = [tool.described for tool in turn.tools]
    said = dialogue(turn.messages, tools, goes_on=turn.goes_on, name=turn.name)
    return await write_prompt(served, caller, render, said, served, turn.thinking)


def _tool_format(served: ServedModel, turn: Turn) -> ToolFormat | None:
    if not turn.tools:
        return None
    if served.tool_format is None:
        raise ApiError("tools: this model's chat template knows none; leave them out", param="tools")
    return served.tool_format


def _response_format(served: ServedModel, turn: Turn, form: ToolFormat | None) -> AskedFormat | None:
    if not turn.must_call:
        return turn.response_format
    if form is None:
        raise ApiError("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if turn.response_format is not None:
        other = turn.response_format.called["response_format"]
        raise ApiError(
            f"tool_choice asks for a call, and {other} for something else: leave one out", param="tool_choice"
        )
    chosen = {i: tool for i, tool in enumerate(turn.tools) if turn.tool_name in (None, tool.function.name)}
    if not chosen:
        raise ApiError(f"tool_choice names {turn.tool_name!r}: is not among the tools", param="tool_choice")
    called, schemas = {"response_format": "tools"}, [f"tools.{index}.{turn.schema_name}" for index in chosen]
    try:
        grammar = call_format(list(chosen.values()), form, served.tokenizer, parallel=turn.parallel)
    except ValueError as error:
        raise refused_call(error, schemas) or refused(error, called) from None
    return AskedFormat(grammar, called, schemas)
