"""From problems to a policy batch: sample groups through the engine, verify, compare within the group, pack.

The prompt is tokenised once and completions stay token ids from the engine to the loss: nothing is re-tokenised.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kogia.engine.engine import Engine
from kogia.engine.request import NOT_FINITE, Completion, SamplingParams
from kogia.eval.sample import is_truncated, to_response
from kogia.model.packed import PackedTokens, pack
from kogia.rl.loss import PolicyBatch
from kogia.tasks.pool import VerifyPool, require_scores
from kogia.tasks.task import Problem, Task, Verdict
from kogia.text.chat import render_prompt
from kogia.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ProblemSource:
    """A task, its training problems and the workers that verify answers to them."""

    task: Task
    problems: Sequence[Problem]
    pool: VerifyPool


def draw_problems(
    sources: Sequence[ProblemSource], step: int, num: int, seed: int
) -> list[tuple[ProblemSource, Problem]]:
    """The problems of `step`: tasks in turn, each task's problems without repetition until all were seen.

    A pure function of its arguments, so a resumed run draws what the uninterrupted one would have drawn.
    """
    drawn = []
    orders: dict[str, list[int]] = {}
    for position in range(step * num, (step + 1) * num):
        turn, which = divmod(position, len(sources))
        source = sources[which]
        epoch, index = divmod(turn, len(source.problems))
        key = f"{seed}/{which}/{epoch}"
        if key not in orders:
            orders[key] = _permutation(len(source.problems), key)
        drawn.append((source, source.problems[orders[key][index]]))
    return drawn


def _permutation(size: int, key: str) -> list[int]:
    order = list(range(size))
    random.Random(key).shuffle(order)
    return order


@dataclass(frozen=True, slots=True)
class Rollout:
    """Groups of verified samples: row p of every field belongs to `problems[p]`."""

    problems: list[Problem]
    prompts: list[list[int]]
    completions: list[list[Completion]]
    verdicts: list[list[Verdict]]

    @property
    def rewards(self) -> Float[Tensor, "prompts group"]:
        """What the verifiers gave; NaN where a check failed, for that is no measurement and has no place in a mean."""
        scores = [[v.reward if v.is_judged else math.nan for v in group] for group in self.verdicts]
        return torch.tensor(scores, dtype=torch.float32)

    @property
    def num_tokens(self) -> Tensor:
        """Completion tokens, [prompts, group], the stop token included."""
        return torch.tensor([[len(c.token_ids) for c in group] for group in self.completions])

    @property
    def truncated(self) -> Tensor:
        """[prompts, group]: ran out of tokens before it stopped."""
        return torch.tensor([[is_truncated(c) for c in group] for group in self.completions])

    def statuses(self) -> Counter[str]:
        return Counter(v.status for group in self.verdicts for v in group)


def collect(
    engine: Engine,
    tokenizer: Tokenizer,
    drawn: Sequence[tuple[ProblemSource, Problem]],
    params: SamplingParams,
    on_progress: Callable[[int, int, int], None] | None = None,
    *,
    thinking: bool | None = None,
) -> Rollout:
    """Sample `params.n` completions of every problem and verify them, each task in its own worker processes.

    `thinking` is the switch of chat templates that have it.

    Raises ValueError naming a problem whose prompt leaves no room in the model's context, and where nearly all checks
    of a task fail.
    """
    problems = [problem for _, problem in drawn]
    prompts = [render_prompt(problem.messages, tokenizer, thinking) for problem in problems]
    ids = [prompt.token_ids for prompt in prompts]
    _check_lengths(problems, ids, engine.model.config.max_position)
    completions = engine.generate(ids, params, on_progress)
    if any(c.finish_reason == "error" for group in completions for c in group):
        raise FloatingPointError(NOT_FINITE)
    verdicts: list[list[Verdict]] = [[] for _ in problems]
    for source in {id(source): source for source, _ in drawn}.values():
        rows = [row for row, (owner, _) in enumerate(drawn) if owner is source]
        pairs = [(problems[row], to_response(prompts[row], c)) for row in rows for c in completions[row]]
        judged = source.pool.verify_all(pairs)
        require_scores(source.pool.spec, judged)
        results = iter(judged)
        for row in rows:
            verdicts[row] = [next(results) for _ in completions[row]]
    return Rollout(problems, ids, completions, verdicts)


def _check_lengths(problems: Sequence[Problem], prompts: Sequence[Sequence[int]], limit: int) -> None:
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) >= limit:
            raise ValueError(
                f"problem {problem.id!r}: a prompt of {len(prompt)} tokens: must have 1 to {limit - 1}, the model's "
                f"context is {limit} and the completion needs room; shorten the prompt or leave the problem out"
            )


def policy_batches(
    rollout: Rollout,
    rows: Sequence[tuple[int, int]],
    advantages: Float[Tensor, "prompts group"],
    weights: Float[Tensor, " rows"],
    batch_tokens: int,
) -> Iterator[PolicyBatch]:
    """Pack the samples `rows` = (prompt, place in group) into micro-batches of about `batch_tokens` tokens.

    `weights` are the aggregation weights of these samples, in the order of `rows`. Similar lengths go together.
    """
    sequences = [rollout.prompts[p] + rollout.completions[p][g].token_ids for p, g in rows]
    order = sorted(range(len(rows)), key=lambda i: len(sequences[i]))
    start = 0
    while start < len(order):
        end, total = start, 0
        while end < len(order) and (end == start or total + len(sequences[order[end]]) <= batch_tokens):
            total += len(sequences[order[end]])
            end += 1
        chosen = order[start:end]
        yield _policy_batch(
            rollout, [rows[i] for i in chosen], [sequences[i] for i in chosen], advantages, weights[chosen]
        )
        start = end


def _policy_batch(
    rollout: Rollout,
    rows: Sequence[tuple[int, int]],
    sequences: list[list[int]],
    advantages: Float[Tensor, "prompts group"],
    weights: Float[Tensor, " rows"],
) -> PolicyBatch:
    tokens: PackedTokens = pack(sequences)
    mask = torch.zeros(tokens.num_tokens, dtype=torch.bool)
    behaviour = torch.zeros(tokens.num_tokens)
    per_token = torch.zeros(tokens.num_tokens)
    for (p, g), end in zip(rows, np.cumsum(tokens.segments.lengths).tolist(), strict=True):
        logprobs = rollout.completions[p][g].logprobs
        assert logprobs is not None, "rollouts need SamplingParams(logprobs=True)"
        part = slice(end - len(logprobs), end)
        mask[part] = True
        behaviour[part] = torch.tensor(logprobs)
        per_token[part] = advantages[p, g]
    counted = [len(rollout.completions[p][g].token_ids) for (p, g), weight in zip(rows, weights.tolist()) if weight > 0]
    return PolicyBatch(tokens, mask, per_token, behaviour, weights, sum(counted))
