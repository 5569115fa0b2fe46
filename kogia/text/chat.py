"""The chat format of DeepSeek-R1: how messages become one prompt, and how a completion is read back.

    prompt       BOS {system}<｜User｜>question<｜Assistant｜><think>\\n
    completion   thought</think>answer EOS

Earlier assistant turns keep only what follows their last `</think>`, closed by EOS (R1 drops old thoughts). Prompt and
completion are tokenised apart, here and in every rollout, so training sees the very split that sampling produced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kogia.text.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a role in ROLES. An assistant turn's `reasoning` is for display only; it is never rendered again."""

    role: str
    content: str
    reasoning: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r}: must be one of {', '.join(ROLES)}")


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    thinking: str | None
    """Text before the last `</think>`, stripped; None when there is none."""
    answer: str
    """Text after it, stripped; empty when the thought was never closed."""
    closed: bool


def render_text(messages: Sequence[Message], *, bos: str = BOS, eos: str = EOS) -> str:
    """The prompt as text, ending where the model starts to think. System messages come first, blank lines between."""
    if not messages or messages[-1].role != "user":
        last = messages[-1].role if messages else "nothing"
        raise ValueError(f"a prompt must end with a user message, this one ends with {last}; append the question")
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    parts = [bos, system]
    for message in messages:
        if message.role == "user":
            parts += [USER, message.content]
        elif message.role == "assistant":
            parts += [ASSISTANT, message.content.split(END_THINK)[-1], eos]
    return "".join([*parts, ASSISTANT, THINK, "\n"])


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Prompt ids with exactly one BOS: the only tokenisation of a prompt in the system."""
    return tokenizer.encode(render_text(messages, bos=tokenizer.bos, eos=tokenizer.eos))


def render_example(
    messages: Sequence[Message], completion_text: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """(ids, mask) of one training example: mask is 1 on the completion and its EOS, 0 on the prompt."""
    prompt = render_prompt(messages, tokenizer)
    completion = [*tokenizer.encode(completion_text), tokenizer.eos_id]
    return prompt + completion, [0] * len(prompt) + [1] * len(completion)


def parse_response(completion_text: str) -> ParsedResponse:
    """Splits a completion, which continues after "<think>\\n". A thought that was cut off has no answer to score."""
    thinking, closing, answer = completion_text.rpartition(END_THINK)
    if not closing:
        return ParsedResponse(thinking=completion_text.strip() or None, answer="", closed=False)
    return ParsedResponse(thinking=thinking.strip() or None, answer=answer.strip(), closed=True)
