"""`kogia generate PATH`: complete prompts from flags, a file or stdin."""

import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kogia import log
from kogia.engine.output import printable
from kogia.engine.request import Completion, SamplingParams, report_errors
from kogia.files import check_target, json_line, write_text
from kogia.inference.config import GenerateConfig
from kogia.inference.llm import LLM
from kogia.inference.prompts import Question, read_prompts
from kogia.terminal import SamplingProgress
from kogia.text.chat import Prompt, render_prompt
from kogia.text.tokenizer import Tokenizer


def main(config: GenerateConfig) -> int:
    if config.out is not None:
        check_target(config.out)
    questions = read_prompts(config)
    _check_raw(config, questions)
    options = asdict(config.engine)
    llm = LLM(config.path, device=config.device, dtype=config.dtype, **options)
    prompts = [_prompt(config, question, llm.tokenizer) for question in questions]
    with SamplingProgress("generating", transient=True) as progress:
        groups = llm.generate(prompts, SamplingParams.of(config), progress.update)
    report_errors([completion for group in groups for completion in group])
    _write(config, questions, groups)
    stats = llm.engine.stats
    drafts = f", {stats.acceptance:.0%} of drafts accepted" if stats.num_drafted else ""
    log.info(f"{stats.num_generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s{drafts}")
    return 0


def _check_raw(config: GenerateConfig, questions: Sequence[Question]) -> None:
    spoken = [question for question in questions if not isinstance(question.asked, str)]
    if config.raw and spoken:
        raise ValueError(f"raw: continues texts, but {spoken[0].title!r:.60} is the end of messages; leave out --raw")


def _prompt(config: GenerateConfig, question: Question, tokenizer: Tokenizer) -> Prompt:
    if config.raw:
        return Prompt.of(tokenizer.encode_raw(question.title), tokenizer)
    return render_prompt(question.messages(config.system), tokenizer, config.thinking)


def _write(config: GenerateConfig, questions: Sequence[Question], groups: Sequence[Sequence[Completion]]) -> None:
    """One JSON line per completion into `--out`, else the bare texts to stdout."""
    answered = [
        (question, index, completion)
        for question, group in zip(questions, groups, strict=True)
        for index, completion in enumerate(group)
    ]
    if config.out is not None:
        rows = (_row(config, *each) for each in answered)
        write_text(config.out, "".join(json_line(row, default=str) for row in rows))
        log.info(f"{len(answered)} completions written to {config.out}")
        return
    for question, index, completion in answered:
        if len(answered) > 1:
            _print(f"--- {question.title} [{index}]")
        _print(completion.text)


def _print(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text)


def _row(config: GenerateConfig, question: Question, index: int, completion: Completion) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index, "text": completion.text}
    if not config.raw:
        row |= {"thinking": completion.thinking, "answer": completion.answer}
    row |= {"finish_reason": completion.finish_reason, "num_tokens": len(completion.token_ids)}
    return _beside(question.columns, row) | row


def _beside(columns: Mapping[str, Any], written: Container[str]) -> dict[str, Any]:
    """The columns under names that are not written yet."""
    kept: dict[str, Any] = {}
    for name, value in columns.items():
        free = name
        while free in written or (free != name and free in columns):
            free = f"input_{free}"
        kept[free] = value
    return kept
