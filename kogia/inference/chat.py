"""`kogia chat PATH`: a conversation in the terminal. Thoughts are dimmed; Ctrl-C stops an answer, Ctrl-D leaves."""

import contextlib
import importlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console

from kogia import log
from kogia.checkpoint.directory import load_config, resolve_model_dir
from kogia.checkpoint.open import check_thinking_switch
from kogia.engine.output import printable
from kogia.engine.request import Completion, SamplingParams
from kogia.engine.threads import generation_threads
from kogia.inference.config import FILTERS, ChatConfig
from kogia.inference.conversation import Conversation
from kogia.inference.formats import read_format
from kogia.inference.history import History
from kogia.inference.llm import LLM
from kogia.model.costs import num_params
from kogia.text.chat import Message, Prompt
from kogia.text.files import read_generation
from kogia.text.thoughts import ThoughtSplitter

PROMPT, MORE, QUOTES = "> ", ". ", '"""'
ReadLine = Callable[[str], str | None]
"""The next line after a prompt, None at the end of the input."""


def main(config: ChatConfig) -> int:
    directory = resolve_model_dir(config.path)
    params = SamplingParams.of(
        config.sampling(read_generation(directory)),
        thinking_token_budget=config.thinking_token_budget,
        response_format=read_format(config.json_schema),
    )
    _check_model(config, directory)
    llm = LLM.of(directory, config, **config.engine_options())
    with generation_threads(config.threads, num_params(llm.model.config)):
        return converse(llm, config, params)


def _check_model(config: ChatConfig, directory: Path) -> None:
    """Raise ValueError for what this model cannot do, before its weights are loaded."""
    drafts = config.engine_options()["num_draft_tokens"]
    if drafts and not load_config(directory).num_mtp_layers:
        raise ValueError(f"draft_tokens = {drafts}: the model has no MTP module to draft with; leave it out")
    check_thinking_switch(directory, config.thinking)


def converse(llm: LLM, config: ChatConfig, params: SamplingParams) -> int:
    """Questions and answers until the end of the input."""
    console = Console(highlight=False)
    conversation = Conversation(llm, params, config.system, config.thinking)
    if sys.stdin.isatty():
        sampling = ", ".join(f"{name} {getattr(params, name):g}" for name in FILTERS)
        console.print(f"{llm.readiness}", style="dim")
        console.print(f"{sampling}. /help says what else there is.", style="dim")
    for line, is_command in _questions(console, config.history):
        if is_command and line in ("/exit", "/quit"):
            return 0
        if is_command:
            _obey(conversation, line, console)
            continue
        if config.single:
            conversation.turns.clear()
        _exchange(conversation, line, console)
    return 0


def _obey(conversation: Conversation, line: str, console: Console) -> None:
    try:
        told, style = conversation.obey(line), "dim"
    except (ValueError, OSError) as error:
        told, style = str(error), "yellow"
    if told:
        console.print(told, style=style, markup=False)


def _exchange(conversation: Conversation, question: str, console: Console) -> None:
    """Answer a question; both join the conversation."""
    llm, turns = conversation.llm, conversation.turns
    turns.append(Message("user", question))
    try:
        prompt = conversation.prompt()
        answer, num_tokens = _answer(llm, prompt, conversation.params, console)
    except ValueError as error:  # the conversation has outgrown the context, which /reset cures
        turns.pop()
        log.warn(f"{error}, or /reset the conversation")
        return
    conversation.num_tokens = len(prompt.token_ids) + num_tokens
    parsed = prompt.parse(answer)
    turns.append(Message("assistant", parsed.answer, parsed.thinking))


def _questions(console: Console, keep_history: bool = False) -> Iterator[tuple[str, bool]]:
    """(what the user says, whether it is a command), until the end of the input. Nothing is said by blank lines."""
    read = _line_reader(console, keep_history)
    while True:
        try:
            line = read(PROMPT)
            if line is None:
                return
            said = _whole(line, read).strip()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            console.print("\nCtrl-D or /exit leaves.", style="dim")
            continue
        if said:
            yield said, line.lstrip().startswith("/")


def _whole(line: str, read: ReadLine) -> str:
    """What begins with `line`: all between two `QUOTES`, or every line up to one that does not end in a backslash."""
    quoted = line.lstrip().startswith(QUOTES)
    lines = [line.lstrip().removeprefix(QUOTES) if quoted else line]
    while not lines[-1].rstrip().endswith(QUOTES) if quoted else lines[-1].endswith("\\"):
        if not quoted:
            lines[-1] = lines[-1].removesuffix("\\")
        if (more := read(MORE)) is None:
            return "\n".join(lines)
        lines.append(more)
    return "\n".join(lines).rstrip().removesuffix(QUOTES) if quoted else "\n".join(lines)


def _line_reader(console: Console, keep_history: bool) -> ReadLine:
    if not sys.stdin.isatty():
        return _piped_line
    history = None
    with contextlib.suppress(ImportError):
        readline = importlib.import_module("readline")  # from now on input() edits lines and brings back earlier ones
        history = History(readline) if keep_history else None
    return partial(_typed_line, console, history)


def _piped_line(_prompt: str) -> str | None:
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _typed_line(console: Console, history: History | None, prompt: str) -> str | None:
    try:
        line = input(prompt)  # not the console's: readline must know how wide the prompt is
    except EOFError:
        console.print()
        return None
    if history is not None:
        history.add(line)
    return line


def _answer(llm: LLM, prompt: Prompt, params: SamplingParams, console: Console) -> tuple[str, int]:
    """Stream one answer to the console; returns its text and tokens, whole or as far as they came."""
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
    return text, num_tokens


def _summary(num_tokens: int, seconds: float, completion: Completion | None) -> str:
    words = [f"{num_tokens} tokens", f"{num_tokens / seconds:.1f} tokens/s"]
    if completion is None:
        words.append("stopped")
    elif completion.finish_reason == "length":
        words.append("cut off at --max-tokens, or by the context or the cache")
    if completion is not None and completion.num_drafted:
        words.append(f"{completion.num_accepted / completion.num_drafted:.0%} of drafts accepted")
    return f"[{', '.join(words)}]"


class ThoughtStyle:
    """Writes a streamed answer, its thought dim and on lines of its own."""

    def __init__(self, console: Console, prompt: Prompt) -> None:
        self._console = console
        self._thoughts = ThoughtSplitter(prompt.opens_thought)
        self._in_thought = False

    def write(self, text: str) -> None:
        self._show(*self._thoughts.push(text))

    def close(self) -> None:
        self._show(*self._thoughts.finish())
        self._print("\n")

    def _show(self, thought: str, answer: str) -> None:
        self._print(thought, "dim")
        self._in_thought |= bool(thought)
        if answer and self._in_thought:
            self._print("\n")
            self._in_thought = False
        self._print(answer)

    def _print(self, text: str, style: str | None = None) -> None:
        if text:
            self._console.out(printable(text), style=style, end="", highlight=False)


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
