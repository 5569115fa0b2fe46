"""`kogia eval PATH`: sample, verify, score; and `evaluate`, the same in the process of a training run or the demo."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.open import Found, check_thinking_switch, find_model
from kogia.engine.config import FilteredSamplingConfig
from kogia.engine.engine import Engine, EngineStats
from kogia.engine.group import build_engine
from kogia.engine.limits import Longest, check_activation, check_engine, longest_sequence
from kogia.engine.request import SamplingParams
from kogia.engine.threads import generation_threads
from kogia.engine.traffic import weight_bytes
from kogia.eval.config import EvalConfig
from kogia.eval.earlier import Earlier, prompt_text
from kogia.eval.intervals import Estimate
from kogia.eval.partial import SampleFiles, find_partial
from kogia.eval.sample import Answered, Progress, answer_problems, choose_problems, fitting_problems, load_tasks
from kogia.eval.summary import GREEDY, compare, summarise
from kogia.eval.table import print_activation, print_results
from kogia.files import check_directory
from kogia.model.costs import num_params
from kogia.plan.dry_run import print_dry_run, sampling_memory
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Problem, Task
from kogia.terminal import SamplingProgress
from kogia.text.thoughts import num_thought_tokens
from kogia.text.tokenizer import Tokenizer
from kogia.train.lock import sole_writer

SPENT = ("mtp_acceptance", "tokens_per_second", "bytes_per_token", "seconds", "deterministic")
"""Of the summary: what depends on the run, not on the samples."""


@dataclass(frozen=True)
class EvalResult:
    """One task's evaluation: what EVAL.json and EVAL.jsonl hold."""

    summary: dict[str, Any]
    samples: list[dict[str, Any]]

    def score(self, name: str = "pass@1") -> Estimate | None:
        """The score of that name with its interval, or None where the samples do not reach."""
        values = self.summary[name]
        return None if values is None else Estimate(*values)


@dataclass(frozen=True, eq=False)
class Plan:
    """An evaluation that can begin; mappings are by the task's spec."""

    found: Found
    tasks: Mapping[str, Task]
    problems: Mapping[str, Sequence[Problem]]
    earlier: Mapping[str, Earlier | None]


def plan_evaluation(config: EvalConfig) -> Plan:
    """Raises ValueError for whatever of the settings would end the evaluation later; loads and writes nothing."""
    out = output_directory(config)
    check_directory(out)
    _check_partials(config, out)
    tasks = load_tasks(config.tasks, config.task_options)
    earlier = {spec: _earlier(config, spec, task) for spec, task in tasks.items()}
    check_thinking_switch(config.path, config.thinking)
    found = find_model(
        config.path,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        weights=not config.dry_run,
    )
    share = config.engine.share(config.engines)
    check_engine(found.config, share, found.dtype)
    for number in config.active_experts:
        check_activation(found.config, number, None)
    for each in variants(config) if config.resume else ():
        for spec, task in tasks.items():
            SampleFiles(out, file_name(each, spec), _settings(each, str(found.directory), task)).check()
    longest = longest_sequence(found.config, share, found.dtype)
    problems = {spec: _problems(task, found.tokenizer, longest, config) for spec, task in tasks.items()}
    return Plan(found, tasks, problems, earlier)


def main(config: EvalConfig) -> None:
    """Evaluate a model on every task of the configuration, write the files and say what came out."""
    plan = plan_evaluation(config)
    if config.dry_run:
        return print_plan(config, plan)
    scores = [_headline(summary) for summary in evaluate_planned(config, plan)]
    out = output_directory(config)
    words = ("report", out.parent) if out.name == "evals" else ("eval", "OTHER", "--compare", out)
    log.conclude(", ".join(scores), out, "kogia", *words)


def evaluate_tasks(config: EvalConfig) -> list[dict[str, Any]]:
    """Evaluate a model on every task of the configuration, write the files and print the table; the summaries."""
    return evaluate_planned(config, plan_evaluation(config))


def evaluate_planned(config: EvalConfig, plan: Plan) -> list[dict[str, Any]]:
    """The same after the checks."""
    model, tokenizer, directory = plan.found.open()
    engine, out = build_engine(model, tokenizer, config.engine, config.engines), output_directory(config)
    summaries = []
    for spec, task in plan.tasks.items():
        options = config.task_options.get(spec, {})
        pool = VerifyPool(spec, options, workers=config.verify_workers, timeout=config.verify_timeout)
        threads = generation_threads(config.threads, num_params(engine.model.config))
        with pool, threads, _resumable():
            for each in variants(config):
                name = file_name(each, spec)
                with SamplingProgress(name, quiet=config.quiet) as progress:
                    result = evaluate(
                        engine,
                        tokenizer,
                        task,
                        pool,
                        each,
                        name=name,
                        checkpoint=str(directory),
                        out=out,
                        problems=plan.problems[spec],
                        earlier=plan.earlier[spec],
                        on_progress=progress.update,
                    )
                summaries.append(result.summary)
    print_results(summaries)
    if config.active_experts:
        print_activation(summaries)
    return summaries


def variants(config: EvalConfig) -> list[EvalConfig]:
    """The evaluations that a configuration asks for: one at each number of active experts, or the one that it is."""
    return [replace(config, active_experts=(number,)) for number in config.active_experts] or [config]


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
    problems: Sequence[Problem] | None = None,
    earlier: Earlier | None = None,
    on_progress: Progress | None = None,
) -> EvalResult:
    """Sample `config.num_samples` answers (and a greedy one) per question and score them.

    With `out`, writes out/NAME.json and out/NAME.jsonl, samples as they come, and keeps those of an interrupted
    evaluation if `config.resume`; acceptance and seconds are then those of the rest. `problems` were chosen by
    `config` and `earlier`, the evaluation to compare with, was checked; of the configuration, path, tasks and
    everything else on files is left to `main`. `config` is one of its `variants`.
    """
    start, name = time.monotonic(), name or task.name
    if problems is None:
        longest = longest_sequence(engine.model.config, engine.config, engine.model.dtype)
        problems = _problems(task, tokenizer, longest, config)
    files = None if out is None else SampleFiles(out, name, _settings(config, checkpoint, task))
    with nullcontext() if files is None else files.hold():
        about = {"name": name, "task": task.name, "checkpoint": checkpoint, "num_questions": len(problems)}
        if files is not None and config.resume and (finished := files.finished()):
            stored, rows = finished
            spent = {key: stored.get(key) for key in SPENT}
            return EvalResult(about | _scores(config, rows, earlier) | spent, rows)
        before = engine.totals()
        rows = [] if files is None else files.begin(resume=config.resume)
        with engine.deterministic():
            about["deterministic"] = engine.is_deterministic
            for batch in _rows(engine, tokenizer, pool, problems, config, rows, on_progress):
                rows = rows + batch
                if files is not None:
                    files.append(batch)
        summary = about | _scores(config, rows, earlier) | _spent(config, engine, before)
        summary["seconds"] = time.monotonic() - start
        if files is not None:
            files.finish(summary)
    return EvalResult(summary, rows)


def _spent(config: EvalConfig, engine: Engine, before: EngineStats) -> dict[str, Any]:
    """What sampling cost since the engine's totals were `before`."""
    now = engine.totals()
    drafted, seconds = now.num_drafted - before.num_drafted, now.seconds - before.seconds
    tokens = now.num_generated_tokens - before.num_generated_tokens
    number = _active_experts(config)
    return {
        "mtp_acceptance": (now.num_accepted - before.num_accepted) / drafted if drafted else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "bytes_per_token": weight_bytes(engine.model, 1, engine.experts.number if number is None else number),
    }


def _active_experts(config: EvalConfig) -> int | None:
    """What one evaluation's requests ask for."""
    return config.active_experts[0] if config.active_experts else config.engine.active_experts


def _headline(summary: dict[str, Any]) -> str:
    name = "greedy" if summary["pass@1"] is None else "pass@1"
    mean, low, high = (100 * share for share in summary[name])
    return f"{summary['name']}: {name} {mean:.1f}% ({low:.1f} to {high:.1f})"


def _scores(config: EvalConfig, rows: Sequence[dict[str, Any]], earlier: Earlier | None) -> dict[str, Any]:
    """What the rows say under these settings, with the difference to an earlier evaluation where one is named."""
    scores = {"split": config.split, "num_samples": config.num_samples, "sampling": _sampling(config)}
    scores |= summarise(rows, config.k)
    if earlier is not None:
        scores["compare"] = {"checkpoint": earlier.checkpoint, **compare(earlier.samples, rows)}
    return scores


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        log.info("what was verified is kept; the same command with --resume goes on")
        raise


def output_directory(config: EvalConfig) -> Path:
    """Where the files go."""
    return evals_directory(config.path, config.out)


def evals_directory(path: str, out: str | None) -> Path:
    """`out`, or evals/ of the run that `path` belongs to, or evals/ here."""
    if out is not None:
        return Path(out)
    model = Path(path)
    if model.parent.name == "checkpoints":
        return model.parent.parent / "evals"
    return model / "evals" if (model / "checkpoints").is_dir() else Path("evals")


def file_name(config: EvalConfig, spec: str) -> str:
    """NAME of the files of one task and, in one of the `variants`, its number of active experts."""
    name = task = spec.rpartition(":")[2]
    if config.name is not None:
        name = config.name if len(config.tasks) == 1 else f"{config.name}-{task}"
    return f"{name}-{config.active_experts[0]}experts" if len(config.active_experts) == 1 else name


def print_plan(config: EvalConfig, plan: Plan) -> None:
    """The resolved configuration, size of the model and number of samples, on stdout."""
    model, per_question = plan.found.config, config.num_samples + (1 if config.greedy else 0)
    samples = config.num_questions * per_question * len(config.tasks) * len(variants(config))
    memory = sampling_memory(model, config.engine.cache_memory_bytes)
    print_dry_run(config, model, [memory, ("samples", f"at most {samples:,} of at most {config.max_tokens} tokens")])


def _rows(
    engine: Engine,
    tokenizer: Tokenizer,
    pool: VerifyPool,
    problems: Sequence[Problem],
    config: EvalConfig,
    kept: Sequence[dict[str, Any]],
    on_progress: Progress | None,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of EVAL.jsonl that are not `kept`, a batch of questions at a time: sampled ones, then greedy ones."""
    have = {(row["problem_id"], row["sample"] == GREEDY) for row in kept}
    passes = _passes(config)
    num_done, total = len(have), len(passes) * len(problems)
    tokens_at_start = engine.totals().num_generated_tokens

    def report(done: int, _total: int, _tokens: int) -> None:
        if on_progress is not None:
            on_progress(num_done + done, total, engine.totals().num_generated_tokens - tokens_at_start)

    for params, greedy in passes:
        left = [problem for problem in problems if (problem.id, greedy) not in have]
        answers = answer_problems(
            engine,
            tokenizer,
            pool,
            left,
            params,
            thinking=config.thinking,
            batch=config.batch_questions,
            on_progress=report,
        )
        for batch in answers:
            yield [row for answered in batch for row in sample_rows(answered, tokenizer, greedy=greedy)]
        num_done += len(left)


def _passes(config: EvalConfig) -> list[tuple[SamplingParams, bool]]:
    """(parameters, whether greedy) of the sampled answers and of the greedy ones, as far as they are asked for."""
    params = SamplingParams.of(config, n=config.num_samples or 1, active_experts=_active_experts(config))
    greedy = replace(params, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1)
    return [each for each in ((params, False), (greedy, True)) if (config.greedy if each[1] else config.num_samples)]


def sample_rows(answered: Answered, tokenizer: Tokenizer, *, greedy: bool) -> list[dict[str, Any]]:
    """The samples of one question as rows of EVAL.jsonl."""
    return [
        {
            "problem_id": answered.problem.id,
            "prompt": prompt_text(answered.problem),
            "sample": GREEDY if greedy else index,
            "text": sample.completion.text,
            "num_tokens": len(sample.completion.token_ids),
            "think_tokens": num_thought_tokens(sample.completion.token_ids, tokenizer, answered.prompt.opens_thought),
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
    if config.thinking is not None:  # left out where it is the template's default, as before there was the setting
        sampling["thinking"] = config.thinking
    experts = {"active_experts": _active_experts(config), "expert_threshold": config.engine.expert_threshold or None}
    sampling |= {name: value for name, value in experts.items() if value is not None}  # the same
    return sampling | {"question_seed": config.question_seed, "num_draft_tokens": config.engine.num_draft_tokens}


def _settings(config: EvalConfig, checkpoint: str, task: Task) -> dict[str, Any]:
    """All that the samples and their summary depend on."""
    names = ("split", "num_questions", "num_samples", "greedy", "k", "task_options", "long_prompts", "dtype", "compare")
    own = {name: getattr(config, name) for name in names}
    if config.quantize != "auto":  # left out where it is the default, as before there was the setting
        own["quantize"] = config.quantize
    return {"checkpoint": checkpoint, "task": task.name, **own, **_sampling(config)}


def _problems(task: Task, tokenizer: Tokenizer, longest: Longest, config: EvalConfig) -> list[Problem]:
    problems = choose_problems(task, config.split, config.num_questions, config.question_seed)
    return fitting_problems(problems, tokenizer, longest, config.long_prompts, config.thinking)


def _check_partials(config: EvalConfig, out: Path) -> None:
    """Raise ValueError for an evaluation at work there, for samples of an interrupted one that would be lost, for none
    to go on with, and where `out` is no directory."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {str(out)!r}: is a file; name a directory")
    names = [file_name(each, spec) for each in variants(config) for spec in config.tasks]
    left = [path for name in names if (path := find_partial(out, name))]
    for path in left:
        with sole_writer(path):  # else another evaluation is at work
            pass
    if left and not config.resume:
        raise ValueError(
            f"{left[0]}: an interrupted evaluation left these samples; --resume goes on with them; remove the file to "
            "begin anew"
        )
    begun = [name for name in names if any((out / f"{name}{end}").exists() for end in (".json", ".partial.settings"))]
    if config.resume and not left and not begun:
        raise ValueError(f"resume: nothing was begun in {out} under the name {names[0]}; leave --resume out")


def _earlier(config: EvalConfig, spec: str, task: Task) -> Earlier | None:
    """The evaluation that `compare` names for a task, known to be comparable; read before anything slow begins."""
    if config.compare is None:
        return None
    path = Path(config.compare)
    if path.is_dir():
        path = path / f"{file_name(config, spec)}.json"
    elif len(config.tasks) > 1:
        raise ValueError(f"compare = {config.compare!r}: with several tasks, name the directory that holds their files")
    earlier = Earlier.read(path, config.compare)
    earlier.check(config, choose_problems(task, config.split, config.num_questions, config.question_seed))
    return earlier
