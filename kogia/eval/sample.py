"""Problems in, judged samples out, as the engine finishes them. Evaluation and curation are both built on this."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kogia.engine.request import Completion, SamplingParams
from kogia.tasks.pool import VerifyPool, require_scores
from kogia.tasks.task import Problem, Response, Task, Verdict
from kogia.text.chat import canonical_completion, opens_thought, render_prompt
from kogia.text.stream import IncrementalDecoder
from kogia.text.tokenizer import END_THINK, THINK, Tokenizer

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
    samples: list[Sample]
    opened: bool = True
    """Whether the prompt ended inside a thought, as the built-in chat format does."""


def answer_problems(
    engine: "Engine",
    tokenizer: Tokenizer,
    pool: VerifyPool,
    problems: Sequence[Problem],
    params: SamplingParams,
    *,
    batch: int = 64,
    on_progress: Progress | None = None,
) -> Iterator[list[Answered]]:
    """Sample and verify every problem; yields about `batch` of them at a time, in the order they finish.

    The engine must be idle and is idle again when the iterator ends, also by an error or by being closed.
    """
    finished: list[tuple[Problem, bool, list[Completion]]] = []
    for done, item in enumerate(_complete(engine, tokenizer, problems, params, on_progress), start=1):
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


def think_tokens(token_ids: Sequence[int], tokenizer: Tokenizer, opened: bool = True) -> int:
    """Tokens of the thought: those before the last `</think>`, or all of them when it was never closed."""
    text = tokenizer.decode(token_ids)
    end = text.rfind(END_THINK)
    if end < 0:
        return len(token_ids) if opened or text.lstrip().startswith(THINK) else 0
    decoder, length = IncrementalDecoder(tokenizer), 0
    for count, token_id in enumerate(token_ids):
        length += len(decoder.push([token_id]))
        if length > end:
            return count
    return len(token_ids)


def is_truncated(completion: Completion) -> bool:
    """Whether something other than the model ended the completion."""
    return completion.finish_reason != "stop"


def to_response(completion: Completion, opened: bool) -> Response:
    """What a task sees of a completion: its text as after "<think>\\n", also where the prompt `opened` no thought."""
    text = canonical_completion(completion.text, opened)
    return Response(text, len(completion.token_ids), is_truncated(completion))


def _complete(
    engine: "Engine",
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    on_progress: Progress | None,
) -> Iterator[tuple[Problem, bool, list[Completion]]]:
    """Each problem with its completions as soon as all of them are there; the engine is kept full to the end.

    Between them, whether the prompt opened a thought.
    """
    assert engine.num_unfinished == 0, f"{engine.num_unfinished} requests are unfinished"
    waiting, before = iter(problems), engine.stats.num_generated_tokens
    owners: dict[int, tuple[Problem, bool, int]] = {}  # request -> its problem, opened, its place among the samples
    arrived: dict[str, dict[int, Completion]] = {}  # problem id -> completions by place
    num_done = 0
    try:
        while True:
            while engine.num_unfinished < 2 * engine.config.max_sequences:
                problem = next(waiting, None)
                if problem is None:
                    break
                requests, opened = _add(engine, tokenizer, problem, params)
                owners.update((request, (problem, opened, place)) for place, request in enumerate(requests))
            if not owners:
                return
            for event in engine.step():
                if event.completion is None:
                    continue
                problem, opened, place = owners.pop(event.request_id)
                group = arrived.setdefault(problem.id, {})
                group[place] = event.completion
                if len(group) == params.n:
                    num_done += 1
                    del arrived[problem.id]
                    yield problem, opened, [group[i] for i in range(params.n)]
            if on_progress is not None:
                on_progress(num_done, len(problems), engine.stats.num_generated_tokens - before)
    finally:
        engine.abort_all()


def _add(
    engine: "Engine", tokenizer: Tokenizer, problem: Problem, params: SamplingParams
) -> tuple[Iterable[int], bool]:
    try:
        prompt = render_prompt(problem.messages, tokenizer)
        return engine.add(prompt, params), opens_thought(prompt, tokenizer)
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r}: {error}") from error


def _verify(pool: VerifyPool, finished: list[tuple[Problem, bool, list[Completion]]]) -> list[Answered]:
    pairs = [(problem, to_response(c, opened)) for problem, opened, completions in finished for c in completions]
    verdicts = pool.verify_all(pairs)
    require_scores(pool.spec, verdicts)
    each = iter(verdicts)
    return [
        Answered(problem, [Sample(c, next(each)) for c in completions], opened)
        for problem, opened, completions in finished
    ]
