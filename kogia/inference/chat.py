"""`kogia chat PATH`: a conversation in the terminal. Thoughts are dimmed; Ctrl-C stops an answer, Ctrl-D leaves."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

from kogia import log
from kogia.engine.output import printable
from kogia.engine.request import Completion, SamplingParams
from kogia.engine.threads import generation_threads
from kogia.inference.config import ChatConfig
from kogia.inference.llm import LLM
from kogia.model.costs import num_params
from kogia.text.chat import Message, Prompt, render_prompt
from kogia.text.tokenizer import END_THINK, THINK

TRIAL_DRAFTS, LEAST_ACCEPTANCE = 64, 0.1  # drafts that are hardly ever right only cost time
HELP = "Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D leaves."


def main(config: ChatConfig) -> int:
    llm = LLM(
        config.path, device=config.device, dtype=config.dtype, num_draft_tokens=config.draft_tokens, max_sequences=1
    )
    with generation_threads(None, num_params(llm.model.config)):
        return converse(llm, config)


def converse(llm: LLM, config: ChatConfig) -> int:
    """Questions and answers until the end of the input."""
    console, params = Console(highlight=False), SamplingParams.of(config)
    opening = [] if config.system is None else [Message("system", config.system)]
    messages = list(opening)
    if sys.stdin.isatty():
        console.print(HELP, style="dim")
    for line in _questions(console):
        if line == "/reset" or config.single:
            messages = list(opening)
        if line == "/reset":
            continue
        if line.startswith("/"):
            console.print(f"unknown command {line.split()[0]}. {HELP}", style="yellow", markup=False)
            continue
        messages.append(Message("user", line))
        prompt = render_prompt(messages, llm.tokenizer, config.thinking)
        try:
            answer = _answer(llm, prompt, params, console)
        except ValueError as error:  # the conversation has outgrown the context, which /reset cures
            messages.pop()
            log.warn(f"{error}, or /reset the conversation")
            continue
        parsed = prompt.parse(answer)
        messages.append(Message("assistant", parsed.answer, parsed.thinking))
        if llm.engine.stats.num_drafted >= TRIAL_DRAFTS and llm.engine.stats.acceptance < LEAST_ACCEPTANCE:
            llm.engine.num_draft_tokens = 0
    return 0


def _questions(console: Console) -> Iterator[str]:
    """Non-empty lines of the user, until the end of the input."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold cyan]> [/]") if interactive else sys.stdin.readline()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print("\nCtrl-D leaves.", style="dim")
            continue
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _answer(llm: LLM, prompt: Prompt, params: SamplingParams, console: Console) -> str:
    """Stream one answer to the console and return its text, whole or as far as it came."""
    thought = ThoughtStyle(console, prompt)
    started, num_tokens, text = time.perf_counter(), 0, ""
    completion: Completion | None = None
    with _interrupt_flag() as interrupted, contextlib.closing(llm.stream(prompt, params)) as events:
        for event in events:
            num_tokens += len(event.token_ids)
            text += event.text
            thought.write(event.text)
            completion = event.completion
            if interrupted.is_set():
                break
    thought.close()
    seconds = time.perf_counter() - started
    console.print(_summary(num_tokens, seconds, completion), style="dim", markup=False, soft_wrap=True)
    return text


def _summary(num_tokens: int, seconds: float, completion: Completion | None) -> str:
    words = [f"{num_tokens} tokens", f"{num_tokens / seconds:.1f} tokens/s"]
    if completion is None:
        words.append("stopped")
    elif completion.finish_reason == "length":
        words.append("cut off at --max-tokens or the context")
    if completion is not None and completion.num_drafted:
        words.append(f"{completion.num_accepted / completion.num_drafted:.0%} of drafts accepted")
    return f"[{', '.join(words)}]"


class ThoughtStyle:
    """Writes a streamed answer, its thought dim: what stands before `</think>`. The marks may arrive in pieces.

    Unless the prompt opens a thought, there is one only if the answer begins with `<think>`.
    """

    def __init__(self, console: Console, prompt: Prompt) -> None:
        self._console = console
        self._thinking = prompt.opens_thought
        self._may_open = not prompt.opens_thought
        self._pending = ""

    def write(self, text: str) -> None:
        self._pending += text
        if self._may_open:
            start = self._pending.lstrip()
            if THINK.startswith(start):
                return
            self._may_open, self._thinking = False, start.startswith(THINK)
            if self._thinking:
                self._pending = start.removeprefix(THINK).lstrip("\n")
        if self._thinking and END_THINK in self._pending:
            thought, _, self._pending = self._pending.partition(END_THINK)
            self._print(thought + "\n")
            self._thinking = False
        keep = self._held_back() if self._thinking else 0
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        self._print(ready)

    def close(self) -> None:
        self._print(self._pending + "\n")
        self._pending = ""

    def _held_back(self) -> int:
        ends = range(min(len(END_THINK) - 1, len(self._pending)), 0, -1)
        return next((k for k in ends if self._pending.endswith(END_THINK[:k])), 0)

    def _print(self, text: str) -> None:
        if text:
            self._console.out(printable(text), style="dim" if self._thinking else None, end="", highlight=False)


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Ctrl-C sets the flag instead of raising in the middle of a step."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        flag.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
