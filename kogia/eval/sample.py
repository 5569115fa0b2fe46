"""Problems in, judged samples out, as the engine finishes them. Evaluation and curation are both built on this."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kogia import log
from kogia.engine.limits import Longest
from kogia.engine.request import Completion, SamplingParams, report_errors
from kogia.eval.config import LongPrompts
from kogia.tasks.pool import VerifyPool, require_scores
from kogia.tasks.task import Problem, Response, Task, Verdict, load_task
from kogia.text.chat import Prompt, render_prompt
from kogia.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kogia.engine.engine import Engine

Progress = Callable[[int, int, int], None]
"""Called with (problems finished, problems in all, tokens generated)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion with its judgement."""

    completion: Completion
    verdict: Verdict

    @property
    def truncated(self) -> bool:
        return is_truncated(self.completion)


@dataclass(frozen=True, slots=True)
class Answered:
    """One problem with all samples of it, in the order of their index."""

    problem: Problem
    prompt: Prompt
    samples: list[Sample]


def answer_problems(
    engine: "Engine",
    tokenizer: Tokenizer,
    pool: VerifyPool,
    problems: Sequence[Problem],
    params: SamplingParams,
    *,
    thinking: bool | None = None,
    batch: int = 64,
    on_progress: Progress | None = None,
) -> Iterator[list[Answered]]:
    """Sample and verify every problem; yields about `batch` of them at a time, in the order they finish.

    `thinking` is the switch of chat templates that have it. The engine must be idle and is idle again when the iterator
    ends, also by an error or by being closed.
    """
    finished: list[tuple[Problem, Prompt, list[Completion]]] = []
    for done, item in enumerate(_complete(engine, tokenizer, problems, params, thinking, on_progress), start=1):
        finished.append(item)
        if len(finished) >= batch or done == len(problems):
            yield _verify(pool, finished)
            finished = []


def choose_problems(task: Task, split: str, num: int, seed: int) -> list[Problem]:
    """`num` problems of a split, or all if there are fewer, shuffled by `seed`; a smaller `num` takes a part of them.

    Raises ValueError when the split is empty or two of them share an id, which every score is counted by.
    """
    problems = task.problems(split)
    if len(problems) == 0:
        raise ValueError(f"task {task.name!r} has no problem in its {split!r} split")
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    chosen = [problems[i] for i in order[:num]]
    repeated = [key for key, count in Counter(p.id for p in chosen).items() if count > 1]
    if repeated:
        raise ValueError(f"task {task.name!r}: several problems have the id {repeated[0]!r}; ids must differ")
    return chosen


def load_tasks(specs: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Task]:
    """Spec -> task. Raises ValueError as `load_task`, and where two have one name, by which their results are kept."""
    tasks = {spec: load_task(spec, options.get(spec)) for spec in specs}
    for name, count in Counter(task.name for task in tasks.values()).items():
        if count > 1:
            raise ValueError(f"tasks = {list(specs)}: {count} have the name {name!r}; run them one by one")
    return tasks


def fitting_problems(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    longest: Longest,
    long_prompts: LongPrompts,
    thinking: bool | None = None,
) -> list[Problem]:
    """The problems whose prompts, rendered with `thinking`, leave room for an answer in the longest sequence there may
    be.

    With "refuse" a longer one is a ValueError with its id, with "skip" a warning with their number, and an error only
    where none is left.
    """
    limit = longest.tokens
    lengths = [len(render_prompt(problem.messages, tokenizer, thinking).token_ids) for problem in problems]
    too_long = [(problem, length) for problem, length in zip(problems, lengths, strict=True) if length >= limit]
    if not too_long:
        return list(problems)
    (problem, length), num = too_long[0], len(too_long)
    words = f"problem {problem.id!r}: a prompt of {length} tokens, but {longest.bound} is {limit} and the "
    words += (
        f"completion needs room; it is {'the only' if num == 1 else 'the first'} of {num} in {len(problems)} problems"
    )
    if long_prompts == "refuse":
        raise ValueError(f"{words}; shorten them, or leave them out with long_prompts = 'skip'")
    if num == len(problems):
        raise ValueError(f"{words}; none is left: {longest.remedy}")
    log.warn(f"{words}; left out")
    return [problem for problem, length in zip(problems, lengths, strict=True) if length < limit]


def is_truncated(completion: Completion) -> bool:
    """Whether something other than the model ended the completion."""
    return completion.finish_reason != "stop"


def to_response(prompt: Prompt, completion: Completion) -> Response:
    """What a task sees of a completion: its text as after "<think>\\n", also where the prompt opens no thought."""
    return Response(prompt.canonical(completion.text), len(completion.token_ids), is_truncated(completion))


def _complete(
    engine: "Engine",
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    thinking: bool | None,
    on_progress: Progress | None,
) -> Iterator[tuple[Problem, Prompt, list[Completion]]]:
    """Each problem with its completions as soon as all of them are there; the engine is kept full to the end."""
    before, prompts = engine.totals().num_generated_tokens, []
    num_done, everything = 0, []

    def requests() -> Iterator[tuple[list[int], SamplingParams]]:
        for problem in problems:
            prompts.append(_prompt(engine, tokenizer, problem, params, thinking))
            yield prompts[-1].token_ids, params

    def report(_: int) -> None:
        if on_progress is not None:
            on_progress(num_done, len(problems), engine.totals().num_generated_tokens - before)

    for place, completions in engine.complete(requests(), ahead=2 * engine.config.max_sequences, on_step=report):
        num_done += 1
        everything += completions
        yield problems[place], prompts[place], completions
    report_errors(everything)


def _prompt(
    engine: "Engine", tokenizer: Tokenizer, problem: Problem, params: SamplingParams, thinking: bool | None
) -> Prompt:
    """Its prompt. Raises ValueError naming the problem if the engine cannot take it."""
    try:
        prompt = render_prompt(problem.messages, tokenizer, thinking)
        engine.requests(prompt.token_ids, params)
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r}: {error}") from error
    return prompt


def _verify(pool: VerifyPool, finished: list[tuple[Problem, Prompt, list[Completion]]]) -> list[Answered]:
    pairs = [(problem, to_response(prompt, c)) for problem, prompt, completions in finished for c in completions]
    verdicts = pool.verify_all(pairs)
    require_scores(pool.spec, verdicts)
    each = iter(verdicts)
    return [
        Answered(problem, prompt, [Sample(c, next(each)) for c in completions])
        for problem, prompt, completions in finished
    ]
