"""`kogia COMMAND [ARGUMENTS]`: parse first, import after, so `--help` and a typo never wait for torch."""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kogia.config import parse_args
from kogia.cores import check_threads, keep_to_cores


@dataclass(frozen=True)
class Command:
    config: str
    """`module:Class` of the configuration; a module that does not import torch."""
    main: str
    """`module:function`, called with the configuration; returns the exit status or None."""
    help: str


_SUPERVISED = "kogia.train.config:SupervisedConfig", "kogia.train.supervised:main"
COMMANDS = {
    "demo": Command("kogia.demo.config:DemoConfig", "kogia.demo.run:main", "The whole recipe in miniature, in minutes"),
    "prepare": Command(
        "kogia.prepare.config:PrepareConfig",
        "kogia.prepare.run:main",
        "Documents deduplicated, without tests, tokenised: data for pretrain",
    ),
    "pretrain": Command(*_SUPERVISED, "Train a model from scratch on text"),
    "sft": Command(*_SUPERVISED, "Fine-tune a model on prompts and completions"),
    "rl": Command(
        "kogia.rl.config:RLConfig", "kogia.rl.grpo:main", "Reinforcement learning (GRPO) on verifiable tasks"
    ),
    "curate": Command("kogia.rl.config:CurateConfig", "kogia.rl.curate:main", "Sample, verify and keep: data for sft"),
    "distill": Command(*_SUPERVISED, "Train a smaller model on a teacher's samples"),
    "eval": Command(
        "kogia.eval.config:EvalConfig", "kogia.eval.run:main", "Measure pass@1, pass@k and lengths on a task"
    ),
    "context": Command(
        "kogia.eval.config:ContextConfig",
        "kogia.eval.context:main",
        "Measure how far back in its context a model looks",
    ),
    "generate": Command("kogia.inference.config:GenerateConfig", "kogia.inference.generate:main", "Complete prompts"),
    "chat": Command(
        "kogia.inference.config:ChatConfig", "kogia.inference.chat:main", "Talk to a model in the terminal"
    ),
    "serve": Command(
        "kogia.serve.config:ServeConfig", "kogia.serve.main:main", "Answer over HTTP, as OpenAI's API does"
    ),
    "bench": Command(
        "kogia.inference.config:BenchConfig", "kogia.inference.bench_command:main", "How fast a model or any server is"
    ),
    "doctor": Command(
        "kogia.inference.config:DoctorConfig",
        "kogia.inference.doctor:main",
        "What this machine has, and which kernels it takes",
    ),
    "inspect": Command(
        "kogia.checkpoint.config:InspectConfig",
        "kogia.checkpoint.inspect:main",
        "What a model or a preset is and costs",
    ),
    "convert": Command(
        "kogia.checkpoint.config:ConvertConfig",
        "kogia.inference.convert:main",
        "Rewrite a checkpoint: dtype, quantised, shards, GGUF, and back",
    ),
    "report": Command("kogia.report.config:ReportConfig", "kogia.report.build:main", "Write one HTML page about a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its status, 2 for a mistake of the user, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        return _run(_on_cores(words))
    except KeyboardInterrupt:
        print("kogia: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as in `kogia ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:  # the last: a loss or logits that are not finite
        if show_traceback:
            traceback.print_exc()
        from kogia.terminal import fail

        fail(f"{str(error) or type(error).__name__}{_origin(error)}")
        return 2


def _on_cores(words: list[str]) -> list[str]:
    """The words without `--cores LIST`, which is obeyed at once: torch counts the cores when it is loaded."""
    for at, word in enumerate(words):
        name, is_joined, cores = word.partition("=")
        if name == "--cores":
            if not is_joined and at + 1 == len(words):
                raise ValueError("--cores: say which, as --cores 0-3")
            keep_to_cores(cores if is_joined else words[at + 1])
            return words[:at] + words[at + (1 if is_joined else 2) :]
    return words


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from kogia import __version__

        print(__version__)
        return 0
    name = words[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name!r}; {hint}")
    command = COMMANDS[name]
    cls = _load(command.config)
    config = parse_args(cls, words[1:], prog=f"kogia {name}", description=inspect.getdoc(cls) or command.help)
    check_threads(getattr(config, "threads", None))
    return _load(command.main)(config) or 0


def _load(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kogia COMMAND [RECIPE.toml | PATH] [--flags]",
            "",
            *lines,
            "",
            "kogia COMMAND --help lists the flags. With every command: --cores 0-3 keeps it",
            "to these cores, --traceback shows where an error arose. --version.",
        ]
    )


def _origin(error: BaseException) -> str:
    """Our own code words its errors for the user; one that arose elsewhere needs the place to be understood."""
    steps = traceback.extract_tb(error.__traceback__)
    ours = os.path.dirname(os.path.abspath(__file__))
    if isinstance(error, OSError) or not steps or steps[-1].filename.startswith(ours):
        return ""
    return f" ({type(error).__name__}; --traceback shows where)"


if __name__ == "__main__":
    sys.exit(main())
