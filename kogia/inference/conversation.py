"""A conversation in the terminal, and the commands that change it or tell about it: lines that begin with a slash."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from kogia.engine.limits import check_activation
from kogia.engine.request import SamplingParams
from kogia.files import check_target, json_line, write_text
from kogia.inference.llm import LLM
from kogia.text.chat import Message, Prompt, has_thinking_switch, render_prompt


@dataclass(eq=False)
class Conversation:
    """What was said so far and how the next answer is made."""

    llm: LLM
    params: SamplingParams
    system: str | None = None
    thinking: bool | None = None
    """The switch of chat templates that have it; None leaves the template's default."""
    turns: list[Message] = field(default_factory=list)
    """Questions and answers, without the system message."""
    num_tokens: int = 0
    """Of the last prompt with its answer."""

    @property
    def messages(self) -> list[Message]:
        opening = [] if self.system is None else [Message("system", self.system)]
        return [*opening, *self.turns]

    def prompt(self) -> Prompt:
        return render_prompt(self.messages, self.llm.tokenizer, self.thinking)

    def obey(self, line: str) -> str:
        """Do what a line with a slash says; returns what there is to tell. Raises ValueError for what will not do."""
        name, _, argument = line.partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name}\n{HELP}")
        return COMMANDS[name].run(self, argument.strip())


def _think(conversation: Conversation, thinking: bool) -> str:
    if not has_thinking_switch(conversation.llm.tokenizer):
        raise ValueError("this model's chat template has no switch for thoughts")
    conversation.thinking = thinking
    return f"from now on {'with' if thinking else 'without'} thoughts"


def _system(conversation: Conversation, text: str) -> str:
    if text:
        conversation.system = None if text == "none" else text
    return "no system message" if conversation.system is None else f"system message: {conversation.system}"


def _experts(conversation: Conversation, text: str) -> str:
    moe = conversation.llm.model.config.moe
    if text:
        if not text.isdecimal():
            raise ValueError(f"/experts {text}: give a number, as /experts 4")
        check_activation(conversation.llm.model.config, int(text), None)
        conversation.params = replace(conversation.params, active_experts=int(text))
    if moe is None:
        return "this model has no routed experts"
    number = conversation.params.active_experts or conversation.llm.engine.experts.number
    return f"{number} of {moe.num_experts} routed experts per token; trained with {moe.topk}"


def _stats(conversation: Conversation, _: str) -> str:
    stats = conversation.llm.engine.stats
    context = conversation.llm.model.config.max_position
    words = [
        f"{stats.num_generated_tokens:,} tokens generated, {stats.tokens_per_second:.1f} tokens/s",
        f"{stats.num_prefix_hit_tokens:,} prompt tokens found in the cache",
        f"{conversation.num_tokens:,} of the context's {context:,} tokens used",
    ]
    if stats.num_drafted:
        words.append(f"{stats.acceptance:.0%} of {stats.num_drafted:,} drafts accepted")
    return "\n".join(words)


def _save(conversation: Conversation, name: str) -> str:
    if not name:
        raise ValueError("/save: name a file, as /save chat.jsonl")
    if not conversation.turns:
        raise ValueError("/save: nothing was said yet")
    path = Path(name).expanduser()
    if path.exists():
        raise ValueError(f"/save {name}: is there already; name another file")
    check_target(path)
    write_text(path, json_line({"messages": [_row(message) for message in conversation.messages]}))
    return f"saved to {path}, a row of messages as kogia sft reads it"


def _row(message: Message) -> dict[str, Any]:
    row = {"role": message.role, "content": message.content}
    return row if message.reasoning is None else row | {"reasoning_content": message.reasoning}


def _reset(conversation: Conversation, _: str) -> str:
    conversation.turns.clear()
    conversation.num_tokens = 0
    return ""


class Command(NamedTuple):
    usage: str
    does: str
    run: Callable[[Conversation, str], str]


COMMANDS = {
    "/think": Command("/think", "think before answering, in models that can be switched",
                      lambda conversation, _: _think(conversation, True)),
    "/nothink": Command("/nothink", "answer at once", lambda conversation, _: _think(conversation, False)),
    "/system": Command("/system TEXT", "set the system message (none: remove it); alone: show it", _system),
    "/experts": Command("/experts N", "use N routed experts per token; alone: show it", _experts),
    "/stats": Command("/stats", "tokens, speed, context", _stats),
    "/save": Command("/save FILE", "write the conversation to a new file, one JSON line", _save),
    "/reset": Command("/reset", "forget the conversation", _reset),
    "/help": Command("/help", "show this", lambda *_: HELP),
}  # fmt: skip
HELP = "\n".join(
    [
        *(f"{command.usage:13} {command.does}" for command in COMMANDS.values()),
        f"{'/exit':13} leave, as Ctrl-D does",
        "Ctrl-C stops an answer. A line that ends in \\ goes on in the next one, and so",
        'does everything from """ to """. Arrow keys edit the line and bring back earlier',
        "ones, those of earlier chats too unless --no-history is given.",
    ]
)
