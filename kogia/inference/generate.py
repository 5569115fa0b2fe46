"""`kogia generate PATH`: complete prompts from flags, a file or stdin."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kogia import log
from kogia.engine.output import printable
from kogia.engine.request import Completion, SamplingParams, report_errors
from kogia.files import write_text
from kogia.inference.config import GenerateConfig
from kogia.inference.llm import LLM
from kogia.text.chat import Message, Prompt, render_prompt
from kogia.text.tokenizer import Tokenizer


def main(config: GenerateConfig) -> int:
    texts = read_prompts(config)
    options = asdict(config.engine)
    llm = LLM(config.path, device=config.device, dtype=config.dtype, **options)
    prompts = [_prompt(config, text, llm.tokenizer) for text in texts]
    with Progress(
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("", total=len(texts) * config.n, tokens=0)

        def show(finished: int, total: int, tokens: int) -> None:
            progress.update(task, completed=finished, total=total, tokens=tokens)

        groups = llm.generate(prompts, SamplingParams.of(config), show)
    report_errors([completion for group in groups for completion in group])
    _write(config, texts, prompts, groups)
    stats = llm.engine.stats
    drafts = f", {stats.acceptance:.0%} of drafts accepted" if stats.num_drafted else ""
    log.info(f"{stats.num_generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s{drafts}")
    return 0


def read_prompts(config: GenerateConfig) -> list[str]:
    """Prompts of the flags, then of the file; of stdin, one per line, when neither is given."""
    texts = list(config.prompt)
    if config.file is not None:
        texts += _read_file(Path(config.file))
    if config.file is None and not texts:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt TEXT, --file FILE, or lines on stdin")
        texts = _lines(sys.stdin.read())
    if not texts:
        raise ValueError(f"{config.file or 'stdin'} holds no prompt: write one per line")
    return texts


def _lines(text: str) -> list[str]:
    # Only newlines separate: a prompt, or the text inside a JSON line, may hold U+2028 and its like. Some editors and
    # shells begin with a byte order mark.
    return [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]


def _read_file(path: Path) -> list[str]:
    lines = _lines(path.read_text(encoding="utf-8"))
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: must be a JSON object with a 'prompt' ({error!r})") from None
    return prompts


def _prompt(config: GenerateConfig, text: str, tokenizer: Tokenizer) -> Prompt:
    if config.raw:
        return Prompt.of(tokenizer.encode_raw(text), tokenizer)
    system = [] if config.system is None else [Message("system", config.system)]
    return render_prompt([*system, Message("user", text)], tokenizer, config.thinking)


def _write(
    config: GenerateConfig, texts: Sequence[str], prompts: Sequence[Prompt], groups: list[list[Completion]]
) -> None:
    """One JSON line per completion into `--out`, else the bare texts to stdout."""
    rows = [
        {"prompt": text, "index": index, **_row(config, prompt, completion)}
        for text, prompt, group in zip(texts, prompts, groups, strict=True)
        for index, completion in enumerate(group)
    ]
    if config.out is not None:
        write_text(config.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        log.info(f"{len(rows)} completions written to {config.out}")
        return
    for row in rows:
        if len(rows) > 1:
            print(f"--- {row['prompt']} [{row['index']}]")
        print(printable(row["text"]) if sys.stdout.isatty() else row["text"])


def _row(config: GenerateConfig, prompt: Prompt, completion: Completion) -> dict[str, Any]:
    row: dict[str, Any] = {"text": completion.text}
    if not config.raw:
        parsed = prompt.parse(completion.text)
        row |= {"thinking": parsed.thinking, "answer": parsed.answer}
    return row | {"finish_reason": completion.finish_reason, "num_tokens": len(completion.token_ids)}
