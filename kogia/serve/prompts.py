"""Messages of a request into the prompt that the model continues."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_MESSAGES, Name, Part, Text
from kogia.serve.sampling import Thinking
from kogia.serve.state import ServedModel
from kogia.text.chat import Message, Prompt, has_thinking_switch, render_prompt
from kogia.text.tokenizer import END_THINK


class ContentPart(Part):
    type: Name
    text: Text | None = None
    refusal: Text | None = None


Content = Text | Annotated[list[ContentPart], Field(max_length=MOST_MESSAGES)]


class ChatMessage(Part):
    """OpenAI's, with the thought that DeepSeek's API adds."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    """The same by another name."""


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages as the templates want them. Raises 400 that names the one that will not do."""
    return [_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def _message(message: ChatMessage, name: str) -> Message:
    if message.role == "tool":
        raise ApiError(f"{name}.role = 'tool': no tool was called", param=f"{name}.role")
    role = "system" if message.role == "developer" else message.role
    thought = message.reasoning_content or message.reasoning
    return Message(role, text_of(message.content, f"{name}.content"), thought)


def text_of(content: Content | None, name: str) -> str:
    """Raises 400 for parts that are no text, and for what is missing."""
    if content is None:
        raise ApiError(f"{name} = null: must be a text, or a list of parts with a text each", param=name)
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.text if part.type in ("text", "input_text", "output_text") else part.refusal
        if text is None:
            raise ApiError(
                f"{name}.{index}.type = {part.type!r:.40}: must be 'text' with a text, which is all that this model "
                "reads; leave images, sound and files out",
                param=f"{name}.{index}.type",
            )
        texts.append(text)
    return "\n".join(texts)


def render(messages: Sequence[Message], served: ServedModel, thinking: Thinking) -> Prompt:
    """The prompt. Blocks: it belongs in a thread. Raises 400 for what the chat template refuses."""
    tokenizer = served.tokenizer
    switch = thinking.enabled if has_thinking_switch(tokenizer) else None
    try:
        prompt = render_prompt(messages, tokenizer, switch)
    except ValueError as error:
        raise ApiError(str(error), param="messages") from None
    if thinking.enabled is False and prompt.opens_thought:
        # a template without a switch opens a thought: it is closed at once
        return Prompt(prompt.token_ids + tokenizer.encode(f"\n{END_THINK}\n\n"), opens_thought=False)
    return prompt
