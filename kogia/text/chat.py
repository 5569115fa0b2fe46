"""How messages become one prompt, and how a completion is read back. The built-in format is DeepSeek-R1's:

    prompt       BOS {system}<｜User｜>question<｜Assistant｜><think>\\n
    completion   thought</think>answer EOS

A model with a chat template of its own is prompted by that. Prompts that do not end in "<think>" leave the tag to the
model (Qwen3) or have no thought (V3); tasks and data see one form all the same, the text that would follow the tag.

Earlier assistant turns keep only what follows their last `</think>`, closed by EOS (R1 drops old thoughts). Prompt and
completion are tokenised apart, here and in every rollout, so training sees the very split that sampling produced.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kogia.text.marks import Marks
from kogia.text.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer
from kogia.text.tools import DEEPSEEK, ToolFormat, describe_tools, tool_format

ROLES = ("system", "user", "assistant")
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
TOOL = "tool"
"""The role of what a tool has answered, in conversations with tools."""
THINKING_SWITCHES = ("thinking", "enable_thinking")
"""Variables by which chat templates turn thinking on and off: DeepSeek-V3.1's and Qwen3's."""
_OPENING = re.compile(rf"(?:\s*{THINK})+\n?")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant turn has called."""

    name: str
    arguments: str
    """JSON text, as the model wrote it."""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a role in ROLES, or of a tool.

    An assistant turn's `reasoning` is for display; it is rendered again only behind the last question, between calls
    of tools, where the model goes on with it.
    """

    role: str
    content: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    """Of an assistant turn."""
    call_id: str | None = None
    """Which call a tool's turn answers."""

    def __post_init__(self) -> None:
        if self.role not in (*ROLES, TOOL):
            raise ValueError(f"role={self.role!r}: must be one of {', '.join((*ROLES, TOOL))}")


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    thinking: str | None
    """Text before the first `</think>`, stripped; None when there is none."""
    answer: str
    """Text after it, stripped; empty when the thought was never closed."""
    closed: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked to continue: a rendered conversation, or any text or ids as they are."""

    token_ids: list[int]
    opens_thought: bool
    """Whether it ends in "<think>", or in a thought that is begun, so that the completion starts inside the thought."""
    num_thought: int = 0
    """Tokens that it has of this thought."""
    is_begun: bool = False
    """Whether it ends in the beginning of an answer, or of its thought: the model opens no other."""

    @classmethod
    def of(cls, token_ids: Sequence[int], tokenizer: Tokenizer) -> "Prompt":
        end = tokenizer.decode(token_ids[-16:])  # the tag may be several tokens
        return cls(list(token_ids), end.rstrip().endswith(THINK))

    def canonical(self, completion_text: str) -> str:
        """The completion as it would follow "<think>\\n", whether or not the prompt ends so."""
        if self.opens_thought:
            return completion_text
        if _begins_thought(completion_text):
            return completion_text.lstrip().removeprefix(THINK).removeprefix("\n")
        return f"{END_THINK}\n\n{completion_text}"

    def own(self, canonical: str) -> str:
        """What the model itself writes after this prompt: the inverse of `canonical`, and of `canonical_reply`."""
        if self.opens_thought:
            return canonical.removeprefix(f"{THINK}\n")
        thought, closing, answer = canonical.partition(END_THINK)
        if not closing or _begins_thought(thought):
            return canonical
        return f"{THINK}\n{canonical}" if thought.strip() else answer.lstrip("\n")

    def parse(self, completion_text: str) -> ParsedResponse:
        """Splits a completion of this prompt where a `ThoughtSplitter` does. Where neither of them opens a thought, all
        is answer."""
        return parse_response(self.canonical(completion_text))


def render_text(messages: Sequence[Message], *, bos: str = BOS, eos: str = EOS) -> str:
    """The prompt as text, ending where the model starts to think. System messages come first, blank lines between.

    Calls of tools and their results are DeepSeek-R1's; after results the model goes on at once.
    """
    _check_question(messages)
    last = _last_question(messages)
    parts = [bos, "\n\n".join(message.content for message in messages if message.role == "system")]
    before = None
    for index, message in enumerate(messages):
        if message.role == "user":
            parts += [USER, message.content]
        elif message.role == "assistant":
            opening = [] if before == TOOL else [ASSISTANT]
            thought = f"{THINK}\n{message.reasoning}\n{END_THINK}\n\n" if message.reasoning and index > last else ""
            parts += [*opening, thought, message.content.split(END_THINK)[-1], _calls_text(message.calls), eos]
        elif message.role == TOOL:
            parts += ["" if before == TOOL else OUTPUTS_BEGIN, OUTPUT_BEGIN, message.content, OUTPUT_END]
            if index + 1 == len(messages) or messages[index + 1].role != TOOL:
                parts.append(OUTPUTS_END)
        before = message.role
    return "".join(parts if before == TOOL else [*parts, ASSISTANT, THINK, "\n"])


def _calls_text(calls: Sequence[ToolCall]) -> str:
    """Calls as DeepSeek-R1 writes them."""
    each = [DEEPSEEK.write(call.name, call.arguments) for call in calls]
    return DEEPSEEK.before + DEEPSEEK.between.join(each) + DEEPSEEK.after if calls else ""


def _last_question(messages: Sequence[Message]) -> int:
    """Where the last user message stands: thoughts before it are forgotten. -1 for none."""
    return next((index for index in reversed(range(len(messages))) if messages[index].role == "user"), -1)


def render_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] = (),
    most_tokens: int | None = None,
    marks: Marks | None = None,
) -> Prompt:
    """The only tokenisation of a conversation in the system. A BOS is there once, if the format has one.

    The format is the model's own chat template, or R1's where it has none. `thinking` sets that switch of templates
    that have it (V3.1, Qwen3); None leaves them their default. `tools` are functions that the model may call, as OpenAI
    describes them; ValueError where its template knows none, and for what must have more than `most_tokens`.

    With `marks` what messages and tools spell of the model's marks is text; but for the tags of a thought in a turn of
    the assistant, from which the thought is known.
    """
    check_thinking(thinking, tokenizer)
    _check_question(messages)
    encode = tokenizer.encode if marks is None else marks.encode
    if marks is not None:
        for message in messages:
            tokenizer.check_length(message.content, most_tokens)
        messages, tools = [_hidden(message, marks) for message in messages], marks.hide_in(list(tools))
    template = tokenizer.template
    form = tool_format(tokenizer.template_source)
    if form is None and (tools or any(message.calls or message.role == TOOL for message in messages)):
        raise ValueError("this model's chat template knows no tools; leave tools, calls and their results out")
    if tools and form is not None and not knows_tools(tokenizer):
        messages, tools = _with_tools(messages, tools, form), ()
    if template is None:
        text = render_text(messages, bos=tokenizer.bos or "", eos=tokenizer.eos)
        return Prompt.of(encode(text, most_tokens), tokenizer)
    last = _last_question(messages)
    turns = [_turn(message, form, marks, keeps_thought=index > last) for index, message in enumerate(messages)]
    fixed = {"messages": turns, "add_generation_prompt": True, "tools": list(tools) or None, "documents": None}
    switches = {} if thinking is None else dict.fromkeys(THINKING_SWITCHES, thinking)
    try:
        text = template.render(tokenizer.special_tokens | fixed | switches)
    except ValueError as error:
        raise error if marks is None else ValueError(marks.show(str(error))) from None
    return Prompt.of(encode(text, most_tokens), tokenizer)


def _hidden(message: Message, marks: Marks) -> Message:
    def hide(text: str | None) -> str | None:
        return None if text is None else marks.hide(text)

    kept = (THINK, END_THINK) if message.role == "assistant" else ()
    calls = [ToolCall(marks.hide(call.name), marks.hide(call.arguments), hide(call.id)) for call in message.calls]
    content, reasoning = marks.hide(message.content, kept), hide(message.reasoning)
    return Message(message.role, content, reasoning, tuple(calls), hide(message.call_id))


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat template tells the model of its tools; DeepSeek-V3's and R1's do not."""
    source = tokenizer.template_source
    return source is not None and re.search(r"\btools\b", source) is not None


def _with_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]], form: ToolFormat) -> list[Message]:
    """The messages with a description of the tools in the first one, a system message."""
    text = describe_tools(tools, form)
    if messages[0].role == "system":
        return [replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]


def _turn(message: Message, form: ToolFormat | None, marks: Marks | None, *, keeps_thought: bool) -> dict[str, Any]:
    """A message as chat templates see it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if keeps_thought and message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.call_id is not None:
        turn["tool_call_id"] = message.call_id
    if message.calls:
        as_text = form is not None and form.arguments_as_text
        turn["tool_calls"] = [_call(call, marks, as_text=as_text) for call in message.calls]
    return turn


def _call(call: ToolCall, marks: Marks | None, *, as_text: bool) -> dict[str, Any]:
    arguments: Any = call.arguments
    if not as_text:
        try:
            parsed = json.loads(call.arguments)
            arguments = parsed if marks is None else marks.hide_in(parsed)  # JSON may have had them in escapes
        except (ValueError, RecursionError):  # a call that was cut off: the template shows it as it is
            arguments = call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def continue_prompt(
    prompt: Prompt,
    content: str,
    reasoning: str | None,
    tokenizer: Tokenizer,
    most_tokens: int | None = None,
    marks: Marks | None = None,
) -> Prompt:
    """The prompt with the beginning of its answer: what a model is to go on with. Without content its thought is, which
    may also stand in the content, behind its tag. ValueError for a beginning that must have more than `most_tokens`;
    `marks` as in `render_prompt`."""
    encode = tokenizer.encode if marks is None else marks.encode
    if marks is not None:
        content = marks.hide(content, (THINK, END_THINK))
        reasoning = None if reasoning is None else marks.hide(reasoning)
    if not reasoning and _begins_thought(content):
        text = content.lstrip().removeprefix(THINK).removeprefix("\n")
        thinks, is_open = True, END_THINK not in text
    else:
        thinks = bool(reasoning) or prompt.opens_thought
        is_open = thinks and not content
        text = f"{reasoning or ''}\n{END_THINK}\n\n{content}" if thinks and content else reasoning or content
    opening = f"{THINK}\n" if thinks and not prompt.opens_thought else ""
    ids = encode(opening + text, most_tokens)
    num_thought = len(ids) - len(tokenizer.encode(opening)) if is_open else 0
    return Prompt(prompt.token_ids + ids, is_open, num_thought, is_begun=bool(content or reasoning))


def check_thinking(thinking: bool | None, tokenizer: Tokenizer) -> None:
    """Raise ValueError where `thinking` is set and the model's chat template has no such switch."""
    if thinking is not None and not has_thinking_switch(tokenizer):
        raise ValueError(f"thinking = {thinking}: this model's chat template has no such switch; leave it out")


def has_thinking_switch(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat template can turn thinking on and off."""
    template = tokenizer.template
    return template is not None and any(re.search(rf"\b{name}\b", template.source) for name in THINKING_SWITCHES)


def render_example(
    messages: Sequence[Message], completion_text: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """(ids, mask) of one training example: mask is 1 on the completion and its EOS, 0 on the prompt.

    `completion_text` may be written in any way that `canonical_reply` reads. Where the model's template leaves the
    opening tag to the model, the example has it in the completion.
    """
    reply = canonical_reply(completion_text)
    thinks = reply.startswith(THINK) or bool(reply.partition(END_THINK)[0].strip())
    prompt = render_prompt(messages, tokenizer, True if thinks and has_thinking_switch(tokenizer) else None)
    completion = [*tokenizer.encode(prompt.own(reply)), tokenizer.eos_id]
    return prompt.token_ids + completion, [0] * len(prompt.token_ids) + [1] * len(completion)


def canonical_reply(text: str, reasoning: str | None = None) -> str:
    """A reply of a data set as it follows "<think>\\n": thought (from its tags, or `reasoning`), end tag, answer.

    A reply without tags is all answer. A thought that was never closed keeps its opening tag, by which it is known.
    Raises ValueError where tags and `reasoning` hold two different thoughts.
    """
    opening = _OPENING.match(text)
    inner = text[opening.end() :] if opening else text
    thought, closing, answer = inner.partition(END_THINK)
    if not closing:
        thought, answer = (inner, "") if opening else ("", text)
    given = (reasoning or "").strip().removeprefix(THINK).removesuffix(END_THINK).strip()
    if given and thought.strip() not in ("", given):
        raise ValueError(f"two thoughts, {given[:40]!r} beside the reply and {thought[:40]!r} inside; keep one of them")
    if given:
        answer = answer.lstrip("\n")
        return f"{given}\n{END_THINK}\n\n{answer}"
    if closing:
        return inner
    return f"{THINK}\n{inner}" if opening else f"{END_THINK}\n\n{text}"


def parse_response(canonical: str) -> ParsedResponse:
    """Splits a canonical completion at its first `</think>`, the rule of `ThoughtSplitter`: what a reader was shown as
    the answer cannot become thought later. A thought that was cut off has no answer to score."""
    thinking, closing, answer = canonical.partition(END_THINK)
    if not closing:
        return ParsedResponse(thinking=canonical.strip() or None, answer="", closed=False)
    return ParsedResponse(thinking=thinking.strip() or None, answer=answer.strip(), closed=True)


def _begins_thought(text: str) -> bool:
    return text.lstrip().startswith(THINK)


def _check_question(messages: Sequence[Message]) -> None:
    if not messages or messages[-1].role not in ("user", TOOL):
        last = messages[-1].role if messages else "nothing"
        raise ValueError(f"a prompt must end with a user message, this one ends with {last}; append the question")
