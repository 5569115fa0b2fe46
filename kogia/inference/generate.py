"""`kogia generate PATH`: complete prompts from flags, a file or stdin."""

import hashlib
import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.directory import resolve_model_dir
from kogia.checkpoint.open import check_thinking_switch
from kogia.config import to_dict
from kogia.engine.output import printable
from kogia.engine.request import Completion, SamplingParams, report_errors
from kogia.engine.threads import generation_threads
from kogia.files import check_target
from kogia.inference.config import FILTERS, GenerateConfig
from kogia.inference.formats import read_format
from kogia.inference.llm import LLM
from kogia.inference.prompts import Question, read_prompts
from kogia.inference.row_file import RowFile, Rows, json_line, open_rows, unfinished_of
from kogia.model.costs import num_params
from kogia.terminal import SamplingProgress
from kogia.text.chat import Prompt, render_prompt
from kogia.text.files import read_generation
from kogia.text.tokenizer import Tokenizer

ELSEWHERE = {"path", "prompt", "file", "out", "resume", "device", "tensor_parallel", "expert_parallel", "engine"}
"""Settings that do not decide what is generated, or are known by what they lead to."""


def main(config: GenerateConfig) -> int:
    if config.out is not None:
        check_target(config.out)
    response_format = read_format(config.json_schema)
    questions = read_prompts(config)
    _check_raw(config, questions)
    directory = resolve_model_dir(config.path)
    params = SamplingParams.of(
        config.sampling(read_generation(directory)),
        n=config.n,
        stop=config.stop,
        logprobs=config.logprobs,
        thinking_token_budget=config.thinking_token_budget,
        response_format=response_format,
    )
    check_thinking_switch(directory, config.thinking)
    if config.resume and _is_whole(config, questions):
        log.info(f"{config.out} is complete: the rows of all {len(questions)} prompts are there")
        return 0
    with _destination(config, params, questions, directory) as rows:
        llm = LLM.of(directory, config, **asdict(config.engine))
        given = []
        for place, completions in _complete(llm, config, params, questions, rows.left):
            rows.add(place, [_row(config, questions[place], index, each) for index, each in enumerate(completions)])
            given += completions
        rows.finish()
    if config.out is not None:
        log.info(f"{len(questions) * config.n} completions written to {config.out}")
    report_errors(given)
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


def _complete(
    llm: LLM, config: GenerateConfig, params: SamplingParams, questions: Sequence[Question], places: Sequence[int]
) -> Iterator[tuple[int, list[Completion]]]:
    """(place, completions) of the questions at these places, in the order in which they end."""
    prompts = [_prompt(config, questions[place], llm.tokenizer) for place in places]
    num_kept, total = (len(questions) - len(places)) * config.n, len(questions) * config.n
    with (
        generation_threads(config.threads, num_params(llm.model.config)),
        SamplingProgress("generating", transient=True) as progress,
    ):

        def show(num_ended: int) -> None:
            progress.update(num_kept + num_ended, total, llm.engine.num_generated_tokens)

        for index, completions in llm.engine.loop.complete(((p.token_ids, params) for p in prompts), on_step=show):
            yield places[index], completions


class _Terminal:
    """Takes rows as a `RowFile` does, and prints their bare texts at the end."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.left = list(range(len(questions)))
        self._questions = questions
        self._rows: dict[int, Rows] = {}

    def add(self, place: int, rows: Rows) -> None:
        self._rows[place] = rows

    def finish(self) -> None:
        several = sum(map(len, self._rows.values())) > 1
        for place, question in enumerate(self._questions):
            for row in self._rows[place]:
                if several:
                    _print(f"--- {question.title} [{row['index']}]")
                _print(row["text"])


def _print(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text)


@contextmanager
def _destination(
    config: GenerateConfig, params: SamplingParams, questions: Sequence[Question], directory: Path
) -> Iterator[RowFile | _Terminal]:
    if config.out is None:
        yield _Terminal(questions)
        return
    settings = {name: value for name, value in to_dict(config).items() if name not in ELSEWHERE}
    settings |= {name: getattr(params, name) for name in FILTERS}
    asked = json_line({"questions": [question.columns for question in questions]})
    settings |= {"model": str(directory), "prompts": hashlib.sha256(asked.encode()).hexdigest()}
    num = len(questions)
    with open_rows(config.out, settings, num_prompts=num, per_prompt=config.n, resume=config.resume) as rows:
        try:
            yield rows
        except KeyboardInterrupt:
            if rows.is_kept:
                log.info(f"what was generated is kept in {config.out}; the same command with --resume goes on")
            raise


def _is_whole(config: GenerateConfig, questions: Sequence[Question]) -> bool:
    """Whether `out` holds the rows of exactly these prompts, and no run that writes it was interrupted."""
    path = Path(config.out or "").resolve()
    if not path.is_file() or unfinished_of(path).exists():
        return False
    rows = [row for _, row in log.json_lines(path)]
    wanted = [(question, index) for question in questions for index in range(config.n)]
    return len(rows) == len(wanted) and all(
        _is_row_of(row, config, *each) for row, each in zip(rows, wanted, strict=True)
    )


def _is_row_of(row: dict[str, Any] | None, config: GenerateConfig, question: Question, index: int) -> bool:
    if row is None or row.get("index") != index:
        return False
    columns = _beside(question.columns, _written(config))
    return json.loads(json_line(columns)).items() <= row.items()


def _written(config: GenerateConfig) -> tuple[str, ...]:
    """Names of the columns that are written here."""
    return (
        "index",
        "text",
        *(() if config.raw else ("thinking", "answer")),
        "finish_reason",
        "num_tokens",
        *(("logprobs",) if config.logprobs else ()),
    )


def _row(config: GenerateConfig, question: Question, index: int, completion: Completion) -> dict[str, Any]:
    own = {"index": index, "num_tokens": len(completion.token_ids)}
    row = {name: own[name] if name in own else getattr(completion, name) for name in _written(config)}
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
