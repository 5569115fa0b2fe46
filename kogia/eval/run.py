"""`kogia eval PATH`: sample, verify, score; and `evaluate`, the same in the process of a training run or the demo.

Samples go to NAME.partial.jsonl as they are verified and become NAME.jsonl at the end, together with NAME.json.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.hf import load_config
from kogia.checkpoint.open import open_model
from kogia.engine.config import FilteredSamplingConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.engine.threads import generation_threads
from kogia.eval.config import EvalConfig
from kogia.eval.intervals import Estimate
from kogia.eval.progress import SamplingProgress
from kogia.eval.sample import Answered, Progress, answer_problems, choose_problems
from kogia.eval.summary import GREEDY, compare, read_samples, summarise
from kogia.eval.table import print_results
from kogia.files import put_in_place, write_json
from kogia.model.costs import num_params
from kogia.plan.dry_run import print_dry_run, sampling_memory
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Problem, Task, load_task
from kogia.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvalResult:
    """One task's evaluation: what EVAL.json and EVAL.jsonl hold."""

    summary: dict[str, Any]
    samples: list[dict[str, Any]]

    def score(self, name: str = "pass@1") -> Estimate | None:
        """The score of that name with its interval, or None where the samples do not reach."""
        values = self.summary[name]
        return None if values is None else Estimate(*values)


def main(config: EvalConfig) -> None:
    """Evaluate a model on every task of the configuration, write the files and print the table."""
    if config.dry_run:
        return print_plan(config)
    earlier = {spec: _read_comparison(config, spec) for spec in config.tasks}
    model, tokenizer, directory = open_model(config.path, device=config.device, dtype=config.dtype)
    engine = Engine(model, tokenizer, config.engine)
    summaries = []
    for spec in config.tasks:
        options = config.task_options.get(spec, {})
        pool = VerifyPool(spec, options, workers=config.verify_workers, timeout=config.verify_timeout)
        name = file_name(config, spec)
        threads = generation_threads(config.threads, num_params(engine.model.config))
        with pool, threads, SamplingProgress(name, quiet=config.quiet) as progress:
            result = evaluate(
                engine,
                tokenizer,
                load_task(spec, options),
                pool,
                config,
                name=name,
                checkpoint=str(directory),
                out=output_directory(config),
                earlier=earlier[spec],
                on_progress=progress.update,
            )
        summaries.append(result.summary)
    print_results(summaries)
    log.info(f"written to {output_directory(config)}")


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    pool: VerifyPool,
    config: EvalConfig,
    *,
    name: str | None = None,
    checkpoint: str = "",
    out: Path | None = None,
    earlier: tuple[str, list[dict[str, Any]]] | None = None,
    on_progress: Progress | None = None,
) -> EvalResult:
    """Sample `config.num_samples` answers (and a greedy one) per question and score them.

    With `out`, writes out/NAME.json and out/NAME.jsonl, samples as they come. `earlier` is (checkpoint, samples) of the
    evaluation to compare with. Of the configuration, path, tasks and everything on files is left to `main`.
    """
    start, name = time.monotonic(), name or task.name
    drafted, accepted = engine.stats.num_drafted, engine.stats.num_accepted
    problems = choose_problems(task, config.split, config.num_questions, config.question_seed)
    rows: list[dict[str, Any]] = []
    partial = None if out is None else out / f"{name}.partial.jsonl"
    for batch in _rows(engine, tokenizer, pool, problems, config, on_progress):
        rows.extend(batch)
        if partial is not None:
            _append(partial, batch, fresh=len(rows) == len(batch))
    drafted, accepted = engine.stats.num_drafted - drafted, engine.stats.num_accepted - accepted
    summary = {
        "name": name,
        "task": task.name,
        "split": config.split,
        "checkpoint": checkpoint,
        "num_questions": len(problems),
        "num_samples": config.num_samples,
        **summarise(rows, config.k),
        "sampling": _sampling(config),
        "mtp_acceptance": accepted / drafted if drafted else None,
        "seconds": time.monotonic() - start,
    }
    if earlier is not None:
        summary["compare"] = {"checkpoint": earlier[0], **compare(earlier[1], rows)}
    if out is not None and partial is not None:
        put_in_place(partial, out / f"{name}.jsonl")
        write_json(out / f"{name}.json", summary)
    return EvalResult(summary, rows)


def output_directory(config: EvalConfig) -> Path:
    """Where the files go: `out`, or evals/ of the run that `path` belongs to, or evals/ here."""
    if config.out is not None:
        return Path(config.out)
    path = Path(config.path)
    if path.parent.name == "checkpoints":
        return path.parent.parent / "evals"
    return path / "evals" if (path / "checkpoints").is_dir() else Path("evals")


def file_name(config: EvalConfig, spec: str) -> str:
    """NAME of the files of one task."""
    task = spec.rpartition(":")[2]
    if config.name is None:
        return task
    return config.name if len(config.tasks) == 1 else f"{config.name}-{task}"


def print_plan(config: EvalConfig) -> None:
    """The resolved configuration, size of the model and number of samples, on stdout."""
    model, per_question = load_config(config.path), config.num_samples + (1 if config.greedy else 0)
    samples = config.num_questions * per_question * len(config.tasks)
    memory = sampling_memory(model, config.engine.cache_memory_bytes)
    print_dry_run(config, model, [memory, ("samples", f"at most {samples:,} of at most {config.max_tokens} tokens")])


def _rows(
    engine: Engine,
    tokenizer: Tokenizer,
    pool: VerifyPool,
    problems: Sequence[Problem],
    config: EvalConfig,
    on_progress: Progress | None,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of EVAL.jsonl, a batch of questions at a time: the sampled ones, then the greedy ones."""
    params = SamplingParams.of(config, n=config.num_samples or 1)
    greedy = replace(params, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1)
    passes = [(params, False)] if config.num_samples else []
    if config.greedy:
        passes.append((greedy, True))
    tokens_at_start = engine.stats.num_generated_tokens
    for index, (each, is_greedy) in enumerate(passes):

        def report(done: int, total: int, _: int, index: int = index) -> None:
            if on_progress is not None:
                tokens = engine.stats.num_generated_tokens - tokens_at_start
                on_progress(index * total + done, len(passes) * total, tokens)

        answers = answer_problems(
            engine, tokenizer, pool, problems, each, batch=config.batch_questions, on_progress=report
        )
        for batch in answers:
            yield [row for answered in batch for row in sample_rows(answered, tokenizer, greedy=is_greedy)]


def sample_rows(answered: Answered, tokenizer: Tokenizer, *, greedy: bool) -> list[dict[str, Any]]:
    """The samples of one question as rows of EVAL.jsonl."""
    return [
        {
            "problem_id": answered.problem.id,
            "prompt": "\n".join(message.content for message in answered.problem.messages),
            "sample": GREEDY if greedy else index,
            "text": sample.completion.text,
            "num_tokens": len(sample.completion.token_ids),
            "think_tokens": answered.prompt.num_thinking_tokens(sample.completion.token_ids, tokenizer),
            "reward": sample.verdict.reward,
            "correct": sample.verdict.correct,
            "status": sample.verdict.status,
            "parts": dict(sample.verdict.parts),
            "extracted": sample.verdict.extracted,
            "detail": sample.verdict.detail,
            "truncated": sample.truncated,
        }
        for index, sample in enumerate(answered.samples)
    ]


def _sampling(config: EvalConfig) -> dict[str, Any]:
    sampling = {field.name: getattr(config, field.name) for field in fields(FilteredSamplingConfig)}
    return sampling | {"question_seed": config.question_seed, "num_draft_tokens": config.engine.num_draft_tokens}


def _append(path: Path, rows: Sequence[dict[str, Any]], *, fresh: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if fresh else "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_comparison(config: EvalConfig, spec: str) -> tuple[str, list[dict[str, Any]]] | None:
    """(checkpoint, samples) of the evaluation that `compare` names for a task; read before anything slow begins."""
    if config.compare is None:
        return None
    path = Path(config.compare)
    if path.is_dir():
        path = path / f"{file_name(config, spec)}.json"
    elif len(config.tasks) > 1:
        raise ValueError(f"compare = {config.compare!r}: with several tasks, name the directory that holds their files")
    samples = path.with_suffix(".jsonl")
    for file in (path, samples):
        if not file.is_file():
            raise ValueError(f"compare = {config.compare!r}: {file} is missing; name the NAME.json of an evaluation")
    return json.loads(path.read_text(encoding="utf-8"))["checkpoint"], read_samples(samples)
