"""Messages of a request into the prompt that the model continues."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from pydantic import PrivateAttr

from kogia.serve.access import Caller
from kogia.serve.errors import ApiError
from kogia.serve.exchange import current
from kogia.serve.fields import MOST_MESSAGES, MOST_TOOLS, Flag, Name, Part, Text, items
from kogia.serve.memory import LARGE_BYTES
from kogia.serve.sampling import Thinking
from kogia.serve.served import ServedModel
from kogia.serve.turns import in_thread
from kogia.text.chat import Message, Prompt, ToolCall, continue_prompt, has_thinking_switch, render_prompt
from kogia.text.marks import Marks
from kogia.text.tokenizer import END_THINK

Given = ParamSpec("Given")
Made = TypeVar("Made")


class ContentPart(Part):
    type: Name
    text: Text | None = None
    refusal: Text | None = None


Content = Text | Annotated[list[ContentPart], items(MOST_MESSAGES)]


class CalledFunction(Part):
    name: Text
    arguments: Text


class CalledTool(Part):
    id: Name | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


@dataclass(frozen=True)
class Place:
    """Where a body has a message, and what is in it."""

    message: str
    content: str
    call_id: str


class ChatMessage(Part):
    """OpenAI's, with the thought that DeepSeek's API adds."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    """The same by another name."""
    tool_calls: Annotated[list[CalledTool], items(MOST_TOOLS)] | None = None
    tool_call_id: Name | None = None
    prefix: Flag | None = None
    """Of the last message, an assistant's: go on with it. DeepSeek's word for it."""
    _place: Place | None = PrivateAttr(None)

    @property
    def says_something(self) -> bool:
        return self.content is not None or bool(self.thought or self.tool_calls)

    def at(self, message: str, content: str, call_id: str = "") -> "ChatMessage":
        """The message, which stands there in the body of another API."""
        self._place = Place(message, content, call_id)
        return self

    def place(self, index: int) -> Place:
        """Of the message of this number."""
        own = f"messages.{index}"
        return self._place or Place(own, f"{own}.content", f"{own}.tool_call_id")

    @property
    def thought(self) -> str | None:
        return self.reasoning_content or self.reasoning


Messages = Annotated[list[ChatMessage], items(MOST_MESSAGES, 1)]


def check_generation_prompt(is_added: bool | None, goes_on: bool | None) -> None:
    """Raise 400 for a conversation that neither begins an answer nor goes on with one. The words are vLLM's."""
    if is_added is False and not goes_on:
        name = "add_generation_prompt"
        raise ApiError(f"{name} = false: must be so only with continue_final_message; leave it out", param=name)


@dataclass(frozen=True)
class Dialogue:
    """What is said so far, and what the model is told beside it."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    begun: Message | None = None
    """The beginning of the answer, which is to go on."""
    name: str = "messages"
    """What the body calls it."""


def dialogue(
    messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = (), *, goes_on: bool, name: str = "messages"
) -> Dialogue:
    """The messages as templates want them. With `goes_on`, or where it says so, the last one is the beginning of the
    answer. Raises 400 that names the message that will not do."""
    if not messages:
        raise ApiError(f"{name}: says nothing that a model could answer; give a message with text", param=name)
    called: set[str | None] = set()
    turns = []
    for index, message in enumerate(messages):
        turns.append(_message(message, message.place(index), called))
        called |= {call.id for call in message.tool_calls or ()}
    last = messages[-1]
    if not (goes_on or last.prefix):
        return Dialogue(turns, tools, name=name)
    if last.role != "assistant" or last.tool_calls:
        place = last.place(len(messages) - 1).message
        what = "calls of tools" if last.tool_calls else f"the role {last.role!r}"
        raise ApiError(f"{place} has {what}: what is to go on must be an assistant's text", param=place)
    return Dialogue(turns[:-1], tools, turns[-1], name)


def _message(message: ChatMessage, place: Place, called: Container[str | None]) -> Message:
    if message.role == "tool" and message.tool_call_id not in called:
        raise ApiError(
            f"{place.call_id} = {message.tool_call_id!r:.80}: must be the id of a call in a message before it",
            param=place.call_id,
        )
    if message.tool_calls and message.role != "assistant":
        name = f"{place.message}.tool_calls"
        raise ApiError(f"{name}: the role {message.role!r} calls no tools; assistants do", param=name)
    role = "system" if message.role == "developer" else message.role
    calls = tuple(ToolCall(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ())
    is_optional = role == "assistant" and (calls or message.thought)
    content = "" if message.content is None and is_optional else text_of(message.content, place.content)
    return Message(role, content, message.thought, calls, message.tool_call_id)


def text_of(content: Content | None, name: str) -> str:
    """Raises 400 for parts that are no text, and for what is missing."""
    if content is None:
        raise ApiError(f"{name} = null: must be a text, or a list of parts with a text each", param=name)
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        is_text = part.type in ("text", "input_text", "output_text")
        text = part.text if is_text else part.refusal
        if text is None and is_text:
            raise ApiError(f"{name}.{index}.text is missing", param=f"{name}.{index}.text")
        if text is None:
            raise ApiError(
                f"{name}.{index}.type = {part.type!r:.40}: must be 'text' with a text, which is all that this model "
                "reads; leave images, sound and files out",
                param=f"{name}.{index}.type",
            )
        texts.append(text)
    return "\n".join(texts)


def check_tokens(token_ids: Sequence[int], name: str, served: ServedModel) -> None:
    """Raise 400 for a token that the model has not."""
    if (most := max(token_ids, default=0)) >= (vocab := served.config.vocab_size):
        raise ApiError(f"{name} has {most}: the model knows 0..{vocab - 1}", param=name)


async def write_prompt(
    served: ServedModel, caller: Caller, work: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs
) -> Made:
    """What `work` makes, in a thread unless it is quick. Where it may take seconds, the model's callers have their
    turns."""
    exchange, has_template = current.get(), served.tokenizer.template is not None
    lane = served.lanes.templates if has_template else None
    if exchange is not None and exchange.size > LARGE_BYTES:
        lane = served.lanes.large
    if lane is None and exchange is not None and exchange.is_quick:
        return work(*args, **kwargs)
    return await in_thread(partial(work, *args, **kwargs), lane, caller.name)


def render(said: Dialogue, served: ServedModel, thinking: Thinking) -> Prompt:
    """The prompt. Blocks: it belongs in `write_prompt`. Raises 400 for what the chat template refuses."""
    tokenizer, most = served.tokenizer, served.config.max_position
    switch = thinking.enabled if has_thinking_switch(tokenizer) else None
    marks = None if served.takes_marks else Marks(tokenizer)
    try:
        prompt = render_prompt(said.messages, tokenizer, switch, said.tools, most, marks)
        if said.begun is not None:
            return continue_prompt(prompt, said.begun.content, said.begun.reasoning, tokenizer, most, marks)
    except ValueError as error:
        place = "" if tokenizer.template is None else f"{tokenizer.template.name}: "
        reason = str(error).removeprefix(place)  # where files lie is told to nobody
        raise ApiError(f"{said.name}: {reason}", param=said.name) from None
    if thinking.enabled is False and prompt.opens_thought:
        # a template without a switch opens a thought: it is closed at once
        return Prompt(prompt.token_ids + tokenizer.encode(f"\n{END_THINK}\n\n"), opens_thought=False)
    return prompt
