"""`kogia curate PATH`: rejection sampling, stage 3 of the R1 recipe (R1 section 2.3.3), as resumable data.

Per problem n samples are drawn and verified, and good ones are kept: correct, complete, in one language, not too
long, no two alike. A curation can be extended: with more problems, more samples or more to keep, what is there stays
and only what is lacking is drawn. Three files are written: OUT.jsonl with the kept samples, ready for `kogia sft`;
OUT.progress.jsonl with a line for every round of samples of a problem, by which a curation continues; and
OUT.summary.json with the counts.
"""

import hashlib
import itertools
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.open import Found, check_thinking_switch, find_model
from kogia.config import from_dict, to_dict
from kogia.engine.engine import Engine
from kogia.engine.group import build_engine
from kogia.engine.limits import Longest, check_engine, longest_sequence
from kogia.engine.request import SamplingParams
from kogia.engine.threads import generation_threads
from kogia.eval.sample import (
    Answered,
    Progress,
    Sample,
    answer_problems,
    choose_problems,
    fitting_problems,
    load_tasks,
)
from kogia.files import check_directory, check_target, is_replaceable, json_line, write_json, write_text
from kogia.model.costs import num_params
from kogia.plan.dry_run import print_dry_run, sampling_memory
from kogia.rl.config import CurateConfig
from kogia.tasks.format import language_consistency
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Problem, Task, load_task
from kogia.terminal import SamplingProgress
from kogia.text.tokenizer import Tokenizer
from kogia.train.lock import sole_writer

Lines = list[tuple[bytes, dict[str, Any] | None]]
"""Of a file of JSON lines: each line, and what it holds; None where that is not whole."""
HARMLESS = ("out", "batch_problems", "engine", "verify_workers", "device", "threads", "overwrite", "dry_run", "quiet")
"""Settings that may change between an interrupted curation and its continuation."""
GROWING = ("num_problems", "num_samples", "keep_per_problem")
"""Settings that may only grow, as may the tasks: by them a curation is extended."""
FIRST_LINE = b'{"settings": {'
"""How a progress file begins."""


def main(config: CurateConfig) -> None:
    """Curate with the model at `config.path` and say what came out. Raises as `run_curation`."""
    found = check(config)
    if config.dry_run:
        return print_plan(config, found)
    summary = curate_found(config, found)
    if summary["kept"]:
        words = ("--init", config.path, "--data", config.out, "--out", "runs/sft", "--epochs", "1")
        log.conclude(f"{summary['kept']} samples kept", config.out, "kogia", "sft", *words)


def run_curation(config: CurateConfig) -> dict[str, Any]:
    """Curate with the model at `config.path`; the summary. Raises ValueError if OUT holds another curation."""
    return curate_found(config, check(config))


def curate_found(config: CurateConfig, found: Found) -> dict[str, Any]:
    """The same after the checks."""
    with closing(Record(config)) as record:
        model, tokenizer, directory = found.open()
        return _curate(
            build_engine(model, tokenizer, config.engine, config.engines), tokenizer, config, record, str(directory)
        )


def check(config: CurateConfig) -> Found:
    """The model to sample. Raises ValueError for whatever of the settings would end the curation later; nothing is
    loaded or written."""
    check_record(config)
    tasks = load_tasks(config.tasks, config.task_options)
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
    longest = longest_sequence(found.config, share, found.dtype)
    for task in tasks.values():
        _problems(task, found.tokenizer, longest, config)
    return found


def curate(engine: Engine, tokenizer: Tokenizer, config: CurateConfig, *, checkpoint: str = "") -> dict[str, Any]:
    """Sample, verify and keep for every task; returns the summary that is also written. The engine must be idle."""
    with closing(Record(config)) as record:
        return _curate(engine, tokenizer, config, record, checkpoint)


def _curate(
    engine: Engine, tokenizer: Tokenizer, config: CurateConfig, record: "Record", checkpoint: str
) -> dict[str, Any]:
    start = time.monotonic()
    longest = longest_sequence(engine.model.config, engine.config, engine.model.dtype)
    for spec in config.tasks:
        options = config.task_options.get(spec, {})
        task = load_task(spec, options)
        problems = _problems(task, tokenizer, longest, config)
        waiting = [problem for problem in problems if record.tally(task.name, problem).lacks(config)]
        if len(waiting) < len(problems):
            log.info(f"{task.name}: {len(problems) - len(waiting)} of {len(problems)} problems are already done")
        if not waiting:
            continue
        pool = VerifyPool(spec, options, workers=config.verify_workers, timeout=config.verify_timeout)
        threads = generation_threads(config.threads, num_params(engine.model.config))
        with pool, threads, SamplingProgress(f"curate {task.name}", quiet=config.quiet) as progress:
            for batch in _answer(engine, tokenizer, pool, task.name, waiting, config, record, progress.update):
                for answered in batch:
                    kept, dropped = select(answered, config, record.tally(task.name, answered.problem))
                    record.add(task.name, answered, kept, dropped, checkpoint)
                record.flush()
                progress.note = f"kept {record.num_kept}"
    summary = record.summary(checkpoint, time.monotonic() - start)
    write_json(record.summary_path, summary)
    _report(summary, record)
    return summary


def _problems(task: Task, tokenizer: Tokenizer, longest: Longest, config: CurateConfig) -> list[Problem]:
    chosen = choose_problems(task, config.split, config.num_problems, config.seed)
    return fitting_problems(chosen, tokenizer, longest, config.long_prompts, config.thinking)


def _answer(
    engine: Engine,
    tokenizer: Tokenizer,
    pool: VerifyPool,
    task: str,
    problems: Sequence[Problem],
    config: CurateConfig,
    record: "Record",
    on_progress: Progress,
) -> Iterator[list[Answered]]:
    """The samples that problems lack, a batch of problems at a time; those that lack equally many go together."""
    num_done, tokens_at_start = 0, engine.totals().num_generated_tokens

    def report(done: int, _total: int, _tokens: int) -> None:
        on_progress(num_done + done, len(problems), engine.totals().num_generated_tokens - tokens_at_start)

    rounds: dict[int, list[Problem]] = {}
    for problem in problems:
        rounds.setdefault(record.tally(task, problem).samples, []).append(problem)
    for first, some in rounds.items():
        seed = config.seed + (first << 32)  # later samples of a problem are others than its first ones
        params = SamplingParams.of(config, n=config.num_samples - first, seed=seed)
        yield from answer_problems(
            engine,
            tokenizer,
            pool,
            some,
            params,
            thinking=config.thinking,
            batch=config.batch_problems,
            on_progress=report,
        )
        num_done += len(some)


@dataclass
class Tally:
    """What is there of one problem."""

    samples: int = 0
    correct: int = 0
    kept: int = 0
    texts: set[bytes] = field(default_factory=set)
    """Fingerprints of the completions that were kept."""

    def lacks(self, config: CurateConfig) -> bool:
        """Whether samples are to be drawn: there are fewer than asked for, and not yet all kept that may be."""
        return self.samples < config.num_samples and self.kept < config.keep_per_problem


def select(answered: Answered, config: CurateConfig, before: Tally | None = None) -> tuple[list[int], Counter[str]]:
    """(samples to keep, in order; the first reason why each other one goes).

    What is there `before` of the problem stays, and counts.
    """
    before = before or Tally()
    dropped: Counter[str] = Counter()
    good: list[int] = []
    seen = set(before.texts)
    for index, sample in enumerate(answered.samples):
        reason = _flaw(sample, config)
        text = _fingerprint(answered.prompt.canonical(sample.completion.text))
        if reason is None and text in seen:
            reason = "duplicate"
        seen.add(text)
        if reason is None:
            good.append(index)
        else:
            dropped[reason] += 1
    num_correct = before.correct + sum(sample.verdict.correct for sample in answered.samples)
    solved = num_correct / (before.samples + len(answered.samples))
    if solved > config.max_solve_rate:
        return [], dropped + Counter({"too_easy": len(good)})
    if config.pick == "shortest":
        good.sort(key=lambda index: len(answered.samples[index].completion.token_ids))
    else:
        later = f"/{before.samples}" if before.samples else ""
        random.Random(f"{config.seed}/{answered.problem.id}{later}").shuffle(good)
    kept = sorted(good[: config.keep_per_problem - before.kept])
    return kept, dropped + Counter({"surplus": len(good) - len(kept)})


def _fingerprint(completion: str) -> bytes:
    return hashlib.blake2b(completion.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()


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
        check_record(config)
        self.path = Path(config.out)
        self.progress_path = _progress_path(self.path)
        self.summary_path = self.path.with_suffix(".summary.json")
        self.settings = _decisive(config)
        self.finished: list[dict[str, Any]] = []
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._rows: list[dict[str, Any]] = []
        self._lines: list[dict[str, Any]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.progress_path.touch()
        with ExitStack() as stack:
            stack.enter_context(sole_writer(self.progress_path))
            if config.overwrite:
                self._delete()
            self._open(config)
            self._lock = stack.pop_all()
        self.path.touch()
        self._opened = {path: path.stat() for path in (self.path, self.progress_path)}

    def close(self) -> None:
        """Let others open the files."""
        self._lock.close()

    def tally(self, task: str, problem: Problem) -> Tally:
        """What is there of a problem, that which is not flushed left out."""
        return self._tallies.get((task, problem.id)) or Tally()

    @property
    def num_kept(self) -> int:
        return sum(line["kept"] for line in self.finished)

    def add(self, task: str, answered: Answered, kept: list[int], dropped: Counter[str], checkpoint: str) -> None:
        """Record one round of samples of a problem; on disk only after `flush`."""
        problem, first = answered.problem, self.tally(task, answered.problem).samples
        for index in kept:
            sample = answered.samples[index]
            self._rows.append(
                {
                    "id": f"{problem.id}#{first + index}",
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
        self._count(self._lines)
        self._rows, self._lines = [], []

    def _count(self, lines: Sequence[dict[str, Any]]) -> None:
        self.finished += lines
        for line in lines:
            tally = self._tallies.setdefault((line["task"], line["problem_id"]), Tally())
            tally.samples += line["samples"]
            tally.correct += line["correct"]
            tally.kept += line["kept"]

    def summary(self, checkpoint: str, seconds: float) -> dict[str, Any]:
        """Counts over all problems, those of earlier sessions included; `seconds` are this session's."""
        lines, tallies = self.finished, self._tallies.values()
        statuses, dropped = Counter[str](), Counter[str]()
        for line in lines:
            statuses.update(line["statuses"])
            dropped.update(line["dropped"])
        samples, kept = sum(line["samples"] for line in lines), self.num_kept
        return {
            "checkpoint": checkpoint,
            "problems": len(tallies),
            "samples": samples,
            "kept": kept,
            "kept_share": kept / samples if samples else 0.0,
            "kept_tokens_mean": sum(line["kept_tokens"] for line in lines) / kept if kept else None,
            "problems_with_none": sum(tally.kept == 0 for tally in tallies),
            "problems_never_solved": sum(tally.correct == 0 for tally in tallies),
            "status_counts": dict(statuses),
            "dropped": dict(dropped),
            "settings": self.settings,
            "seconds": seconds,
        }

    def _delete(self) -> None:
        os.truncate(self.progress_path, 0)  # first: after a kill nothing may count as finished whose samples are gone
        for path in (self.path, self.summary_path):
            path.resolve().unlink(missing_ok=True)  # a link stays one

    def _open(self, config: CurateConfig) -> None:
        """Take up what the progress file says, or begin it."""
        if found := _progress(config):
            return self._take_up(found)
        os.truncate(self.progress_path, 0)
        _append(self.progress_path, [{"settings": self.settings}])

    def _take_up(self, found: Lines) -> None:
        """Take what is finished; drop half-written lines and samples of unfinished problems from the files."""
        whole = _whole(found)
        lines = [row for _, row in whole]
        self._count([line for line in lines if "settings" not in line])
        if len(whole) < len(found):
            log.warn(f"{self.progress_path}: torn or damaged lines dropped: {len(found) - len(whole)}")
        self._keep_counted_samples()
        _shorten(self.progress_path, [line for line, _ in whole])
        if _last_settings(lines) != self.settings:
            _append(self.progress_path, [{"settings": self.settings}])

    def _keep_counted_samples(self) -> None:
        """Drop samples from the file of which no line of progress knows: a kill came between the two."""
        kept = []
        for _, row in log.json_lines(self.path):
            if row is not None and not _is_sample(row):
                raise _foreign(self.path)
            tally = None if row is None else self._tallies.get((row["task"], row["problem_id"]))
            if row is not None and tally is not None and int(row["id"].rpartition("#")[2]) < tally.samples:
                tally.texts.add(_fingerprint(row["completion"]))
                kept.append(row)
        write_text(self.path, _json_lines(kept))


def check_record(config: CurateConfig) -> None:
    """Raise ValueError where `out` cannot be written, or is not a curation that `config` goes on with. Nothing is
    written."""
    path = Path(config.out)
    if not is_replaceable(path):
        raise ValueError(f"out = {config.out!r}: is no file, and curate reads again what it wrote; name a file")
    check_target(path)
    check_directory(path.parent)
    if not config.overwrite:
        _progress(config)


def _progress(config: CurateConfig) -> Lines:
    """The lines of the progress file; none where a curation is to begin, also after a kill that tore the first."""
    path, file = Path(config.out), _progress_path(Path(config.out))
    content = file.read_bytes() if file.exists() else b""
    if b"\n" not in content and FIRST_LINE.startswith(content[: len(FIRST_LINE)]):
        if path.exists():
            raise _foreign(path)
        return []
    found = log.json_lines(file)
    lines = [row for _, row in _whole(found)]
    if not lines or "settings" not in lines[0]:
        raise ValueError(f"{file}: is no record of a curation; add --overwrite to start over")
    _check_settings(config, _last_settings(lines))
    return found


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"out = {str(path)!r}: exists and was not written by curate; name another file, or add --overwrite"
    )


def _progress_path(path: Path) -> Path:
    return path.with_suffix(".progress.jsonl")


def _whole(found: Lines) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines before the first that is damaged."""
    whole = itertools.takewhile(lambda entry: _is_progress(entry[1]), found)
    return [(line, row) for line, row in whole if row is not None]


def _last_settings(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return [line["settings"] for line in lines if "settings" in line][-1]


def _check_settings(config: CurateConfig, stored: dict[str, Any]) -> None:
    before = _decisive(from_dict(CurateConfig, stored, "settings"))  # what was no setting yet had its default
    now, tasks = _decisive(config), before["tasks"]
    now["task_options"] = {spec: options for spec, options in now["task_options"].items() if spec in tasks}
    keys = (before.keys() | now.keys()) - {*GROWING, "tasks"}
    changed = sorted(key for key in keys if before.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"out = {config.out!r}: holds a curation with another {', '.join(changed)}; "
            "name another file, or add --overwrite to delete it"
        )
    for key in ("tasks", *GROWING):
        shrank = set(tasks) - set(now[key]) if key == "tasks" else now[key] < before[key]
        if shrank:
            raise ValueError(
                f"out = {config.out!r}: holds a curation with {key} = {before[key]!r}, and now it is "
                f"{now[key]!r}; it may grow but not shrink: name another file, or add --overwrite to delete it"
            )


def _is_progress(line: dict[str, Any] | None) -> bool:
    """Whether a line of the progress file is whole: settings, or a round of a problem with all that is counted."""
    match line:
        case {"settings": dict()}:
            return True
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


def _is_sample(row: dict[str, Any]) -> bool:
    """Whether a row is of those that `Record.add` makes."""
    match row:
        case {"id": str() as name, "task": str(), "problem_id": str(), "completion": str()}:
            return re.fullmatch(r"[0-9]{1,9}", name.rpartition("#")[2]) is not None
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


def print_plan(config: CurateConfig, found: Found) -> None:
    """The resolved configuration, size of the model and number of samples, on stdout."""
    model, samples = found.config, config.num_problems * config.num_samples * len(config.tasks)
    memory = sampling_memory(model, config.engine.cache_memory_bytes)
    print_dry_run(config, model, [memory, ("samples", f"at most {samples:,} of at most {config.max_tokens} tokens")])
