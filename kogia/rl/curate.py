"""`kogia curate PATH`: rejection sampling, stage 3 of the R1 recipe (R1 section 2.3.3), as resumable data.

Per problem n samples are drawn and verified, and good ones are kept: correct, complete, in one language, not too
long, no two alike. Three files are written: OUT.jsonl with the kept samples, ready for `kogia sft`;
OUT.progress.jsonl with one line per finished problem, by which an interrupted curation continues; and
OUT.summary.json with the counts.
"""

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.hf import load_config
from kogia.checkpoint.open import open_model
from kogia.config import from_dict, to_dict
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.engine.threads import generation_threads
from kogia.eval.sample import Answered, Sample, answer_problems, choose_problems, fitting_problems
from kogia.files import is_replaceable, json_line, write_json, write_text
from kogia.model.costs import num_params
from kogia.plan.dry_run import print_dry_run, sampling_memory
from kogia.rl.config import CurateConfig
from kogia.tasks.format import language_consistency
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import load_task
from kogia.terminal import SamplingProgress
from kogia.text.tokenizer import Tokenizer
from kogia.train.lock import sole_writer

HARMLESS = ("out", "batch_problems", "engine", "verify_workers", "device", "threads", "overwrite", "dry_run", "quiet")
"""Settings that may change between an interrupted curation and its continuation."""
FIRST_LINE = b'{"settings": {'
"""How a progress file begins."""


def main(config: CurateConfig) -> None:
    """Curate with the model at `config.path` and say what came out. Raises as `run_curation`."""
    if config.dry_run:
        return print_plan(config)
    summary = run_curation(config)
    if summary["kept"]:
        words = ("--init", config.path, "--data", config.out, "--out", "runs/sft", "--epochs", "1")
        log.conclude(f"{summary['kept']} samples kept", config.out, "kogia", "sft", *words)


def run_curation(config: CurateConfig) -> dict[str, Any]:
    """Curate with the model at `config.path`; the summary. Raises ValueError if OUT holds another curation."""
    with closing(Record(config)) as record:
        model, tokenizer, directory = open_model(config.path, device=config.device, dtype=config.dtype)
        return _curate(Engine(model, tokenizer, config.engine), tokenizer, config, record, str(directory))


def curate(engine: Engine, tokenizer: Tokenizer, config: CurateConfig, *, checkpoint: str = "") -> dict[str, Any]:
    """Sample, verify and keep for every task; returns the summary that is also written. The engine must be idle."""
    with closing(Record(config)) as record:
        return _curate(engine, tokenizer, config, record, checkpoint)


def _curate(
    engine: Engine, tokenizer: Tokenizer, config: CurateConfig, record: "Record", checkpoint: str
) -> dict[str, Any]:
    start = time.monotonic()
    params = SamplingParams.of(config, n=config.num_samples)
    for spec in config.tasks:
        options = config.task_options.get(spec, {})
        task = load_task(spec, options)
        chosen = choose_problems(task, config.split, config.num_problems, config.seed)
        problems = fitting_problems(chosen, tokenizer, engine.model.config.max_position, config.long_prompts)
        waiting = [problem for problem in problems if (task.name, problem.id) not in record.done]
        if len(waiting) < len(problems):
            log.info(f"{task.name}: {len(problems) - len(waiting)} of {len(problems)} problems are already done")
        if not waiting:
            continue
        pool = VerifyPool(spec, options, workers=config.verify_workers, timeout=config.verify_timeout)
        threads = generation_threads(config.threads, num_params(engine.model.config))
        with pool, threads, SamplingProgress(f"curate {task.name}", quiet=config.quiet) as progress:
            for batch in answer_problems(
                engine,
                tokenizer,
                pool,
                waiting,
                params,
                batch=config.batch_problems,
                on_progress=progress.update,
            ):
                for answered in batch:
                    record.add(task.name, answered, *select(answered, config), checkpoint)
                record.flush()
                progress.note = f"kept {record.num_kept}"
    summary = record.summary(checkpoint, time.monotonic() - start)
    write_json(record.summary_path, summary)
    _report(summary, record)
    return summary


def select(answered: Answered, config: CurateConfig) -> tuple[list[int], Counter[str]]:
    """(samples to keep, in order; the first reason why each other one goes)."""
    dropped: Counter[str] = Counter()
    good: list[int] = []
    seen: set[str] = set()
    for index, sample in enumerate(answered.samples):
        reason = _flaw(sample, config)
        text = sample.completion.text.strip()
        if reason is None and text in seen:
            reason = "duplicate"
        seen.add(text)
        if reason is None:
            good.append(index)
        else:
            dropped[reason] += 1
    solved = sum(sample.verdict.correct for sample in answered.samples) / len(answered.samples)
    if solved > config.max_solve_rate:
        return [], dropped + Counter({"too_easy": len(good)})
    if config.pick == "shortest":
        good.sort(key=lambda index: len(answered.samples[index].completion.token_ids))
    else:
        random.Random(f"{config.seed}/{answered.problem.id}").shuffle(good)
    kept = sorted(good[: config.keep_per_problem])
    return kept, dropped + Counter({"surplus": len(good) - len(kept)})


def _flaw(sample: Sample, config: CurateConfig) -> str | None:
    """Why a sample is not training data, or None."""
    num_tokens = len(sample.completion.token_ids)
    if sample.truncated:
        return "truncated"
    if not sample.verdict.is_judged:
        return "not_judged"
    if config.correct_only and not sample.verdict.correct:
        return "not_correct"
    if config.min_reward is not None and sample.verdict.reward < config.min_reward:
        return "low_reward"
    if config.max_completion_tokens is not None and num_tokens > config.max_completion_tokens:
        return "too_long"
    if num_tokens < config.min_completion_tokens:
        return "too_short"
    if language_consistency(sample.completion.text, config.script) < config.min_language_share:
        return "mixed_language"
    return None


class Record:
    """The files of one curation. Opening it takes up what an interrupted one has finished, and nothing of the rest.

    Until `close` no other curation can open them: the lock is on the progress file, which is never replaced.
    """

    def __init__(self, config: CurateConfig) -> None:
        self.path = Path(config.out)
        self.progress_path = self.path.with_suffix(".progress.jsonl")
        self.summary_path = self.path.with_suffix(".summary.json")
        self.settings = _decisive(config)
        self.finished: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._lines: list[dict[str, Any]] = []
        if not is_replaceable(self.path):
            raise ValueError(f"out = {str(self.path)!r}: is no file, and curate reads again what it wrote; name a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not (config.overwrite or self.progress_path.exists()):
            raise self._foreign()
        self.progress_path.touch()
        with ExitStack() as stack:
            stack.enter_context(sole_writer(self.progress_path))
            if config.overwrite:
                self._delete()
            self._open()
            self._lock = stack.pop_all()
        self.path.touch()
        self._opened = {path: path.stat() for path in (self.path, self.progress_path)}

    def close(self) -> None:
        """Let others open the files."""
        self._lock.close()

    @property
    def done(self) -> set[tuple[str, str]]:
        """(task, problem id) of the finished problems."""
        return {(line["task"], line["problem_id"]) for line in self.finished}

    @property
    def num_kept(self) -> int:
        return sum(line["kept"] for line in self.finished)

    def add(self, task: str, answered: Answered, kept: list[int], dropped: Counter[str], checkpoint: str) -> None:
        """Record one finished problem; on disk only after `flush`."""
        problem = answered.problem
        for index in kept:
            sample = answered.samples[index]
            self._rows.append(
                {
                    "id": f"{problem.id}#{index}",
                    "task": task,
                    "problem_id": problem.id,
                    "messages": [{"role": m.role, "content": m.content} for m in problem.messages],
                    "completion": answered.prompt.canonical(sample.completion.text),
                    "reward": sample.verdict.reward,
                    "num_tokens": len(sample.completion.token_ids),
                    "source_checkpoint": checkpoint,
                    "weights_version": sample.completion.weights_version,
                }
            )
        self._lines.append(
            {
                "task": task,
                "problem_id": problem.id,
                "samples": len(answered.samples),
                "correct": sum(sample.verdict.correct for sample in answered.samples),
                "kept": len(kept),
                "kept_tokens": sum(len(answered.samples[index].completion.token_ids) for index in kept),
                "statuses": dict(Counter(sample.verdict.status for sample in answered.samples)),
                "dropped": {reason: count for reason, count in dropped.items() if count},
            }
        )

    def flush(self) -> None:
        """Samples first, then the lines that say they are there: a crash in between is undone by the next opening."""
        for path, opened in self._opened.items():
            log.check_in_place(path, opened)
        _append(self.path, self._rows)
        _append(self.progress_path, self._lines)
        self.finished += self._lines
        self._rows, self._lines = [], []

    def summary(self, checkpoint: str, seconds: float) -> dict[str, Any]:
        """Counts over all problems, those of earlier sessions included; `seconds` are this session's."""
        lines = self.finished
        statuses, dropped = Counter[str](), Counter[str]()
        for line in lines:
            statuses.update(line["statuses"])
            dropped.update(line["dropped"])
        samples, kept = sum(line["samples"] for line in lines), self.num_kept
        return {
            "checkpoint": checkpoint,
            "problems": len(lines),
            "samples": samples,
            "kept": kept,
            "kept_share": kept / samples if samples else 0.0,
            "kept_tokens_mean": sum(line["kept_tokens"] for line in lines) / kept if kept else None,
            "problems_with_none": sum(line["kept"] == 0 for line in lines),
            "problems_never_solved": sum(line["correct"] == 0 for line in lines),
            "status_counts": dict(statuses),
            "dropped": dict(dropped),
            "settings": self.settings,
            "seconds": seconds,
        }

    def _delete(self) -> None:
        os.truncate(self.progress_path, 0)  # first: after a kill nothing may count as finished whose samples are gone
        for path in (self.path, self.summary_path):
            path.resolve().unlink(missing_ok=True)  # a link stays one

    def _open(self) -> None:
        """Take up what the progress file says, or begin it: it is new, or a kill tore its first line."""
        content = self.progress_path.read_bytes()
        if b"\n" in content or not FIRST_LINE.startswith(content[: len(FIRST_LINE)]):
            return self._take_up()
        if self.path.exists():
            raise self._foreign()
        os.truncate(self.progress_path, 0)
        _append(self.progress_path, [{"settings": self.settings}])

    def _take_up(self) -> None:
        """Read what is finished; drop half-written lines and samples of unfinished problems from the files."""
        found = log.json_lines(self.progress_path)
        whole = found[:1] + list(itertools.takewhile(lambda entry: _is_progress(entry[1]), found[1:]))
        lines = [row for _, row in whole if row is not None]
        before = lines[0].get("settings") if lines else None
        if before is None:
            raise ValueError(f"{self.progress_path}: is no record of a curation; add --overwrite to start over")
        self._check_settings(before)
        self.finished = lines[1:]
        if len(whole) < len(found):
            log.warn(f"{self.progress_path}: torn or damaged lines dropped: {len(found) - len(whole)}")
        self._keep_samples_of(self.done)
        _shorten(self.progress_path, [line for line, _ in whole])

    def _check_settings(self, stored: dict[str, Any]) -> None:
        before = _decisive(from_dict(CurateConfig, stored, "settings"))  # what was no setting yet had its default
        keys = sorted(before.keys() | self.settings.keys())
        changed = [key for key in keys if before.get(key) != self.settings.get(key)]
        if changed:
            raise ValueError(
                f"out = {str(self.path)!r}: holds a curation with another {', '.join(changed)}; "
                "name another file, or add --overwrite to delete it"
            )

    def _keep_samples_of(self, done: set[tuple[str, str]]) -> None:
        rows = [row for _, row in log.json_lines(self.path) if row is not None]
        if any(not isinstance(row.get(name), str) for row in rows for name in ("task", "problem_id")):
            raise self._foreign()
        write_text(self.path, _json_lines([row for row in rows if (row["task"], row["problem_id"]) in done]))

    def _foreign(self) -> ValueError:
        return ValueError(
            f"out = {str(self.path)!r}: exists and was not written by curate; name another file, or add --overwrite"
        )


def _is_progress(line: dict[str, Any] | None) -> bool:
    """Whether a line of the progress file is whole: of one finished problem, with all that is counted."""
    match line:
        case {
            "task": str(),
            "problem_id": str(),
            "samples": int(),
            "correct": int(),
            "kept": int(),
            "kept_tokens": int(),
            "statuses": dict() as statuses,
            "dropped": dict() as dropped,
        }:
            return all(isinstance(count, int) for count in [*statuses.values(), *dropped.values()])
    return False


def _decisive(config: CurateConfig) -> dict[str, Any]:
    """The settings that decide which samples there are and which are kept."""
    return {key: value for key, value in to_dict(config).items() if key not in HARMLESS}


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_json_lines(rows))


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(map(json_line, rows))


def _shorten(path: Path, lines: Sequence[bytes]) -> None:
    """Leave only the first lines of a file, in place: it stays the file that is locked."""
    with path.open("r+b") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.truncate()


def _report(summary: dict[str, Any], record: Record) -> None:
    dropped = ", ".join(f"{reason} {count}" for reason, count in Counter(summary["dropped"]).most_common())
    log.info(
        f"kept {summary['kept']} of {summary['samples']} samples ({100 * summary['kept_share']:.1f}%) of "
        f"{summary['problems']} problems in {record.path}; {summary['problems_with_none']} problems have none. "
        f"Dropped: {dropped or 'none'}"
    )
    if not summary["kept"]:
        log.warn("nothing was kept: the model solves none of these problems, or the filters are too strict")


def print_plan(config: CurateConfig) -> None:
    """The resolved configuration, size of the model and number of samples, on stdout."""
    model, samples = load_config(config.path), config.num_problems * config.num_samples * len(config.tasks)
    memory = sampling_memory(model, config.engine.cache_memory_bytes)
    print_dry_run(config, model, [memory, ("samples", f"at most {samples:,} of at most {config.max_tokens} tokens")])
