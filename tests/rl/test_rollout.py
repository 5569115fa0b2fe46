"""From problems to policy batches, with a real engine: who is drawn, and where every number lands."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

from kogia.checkpoint.open import open_model
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.rl.advantage import group_advantages
from kogia.rl.config import PolicyLossConfig
from kogia.rl.loss import aggregation_weights, policy_loss
from kogia.rl.rollout import ProblemSource, Rollout, collect, draw_problems, policy_batches
from kogia.rl.rollout_log import rollout_metrics, write_samples
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Response, load_task
from kogia.text.chat import render_prompt

SPECS = ("toy_task:Checksum", "toy_task:Brief")
GROUP = 5


@pytest.fixture(scope="module")
def sources():
    """Two tasks: twelve problems and seven."""
    options = [{"count": 12}, {"count": 7}]
    pools = [VerifyPool(spec, option, workers=1) for spec, option in zip(SPECS, options, strict=True)]
    tasks = [load_task(spec, option) for spec, option in zip(SPECS, options, strict=True)]
    yield [ProblemSource(t, t.problems("train"), pool) for t, pool in zip(tasks, pools, strict=True)]
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model, tokenizer, _ = open_model(checkpoint, device="cpu")
    return Engine(model, tokenizer, EngineConfig(num_blocks=256, block_size=4)), tokenizer


@pytest.fixture(scope="module")
def rollout(sources, loaded) -> Rollout:
    engine, tokenizer = loaded
    params = SamplingParams(n=GROUP, max_tokens=8, seed=3, logprobs=True)
    return collect(engine, tokenizer, draw_problems(sources, 0, 6, seed=1), params)


def ids(drawn):
    return [(source.task.name, problem.id) for source, problem in drawn]


def test_a_step_draws_the_same_problems_whenever_it_is_asked_and_others_under_another_seed(sources):
    forwards = [ids(draw_problems(sources, step, 5, seed=4)) for step in range(8)]
    backwards = [ids(draw_problems(sources, step, 5, seed=4)) for step in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert forwards != [ids(draw_problems(sources, step, 5, seed=5)) for step in range(8)]
    # the split into steps does not matter either
    assert [pair for step in forwards for pair in step] == ids(draw_problems(sources, 0, 40, seed=4))


def test_tasks_take_turns_and_repeat_no_problem_before_all_were_seen(sources):
    drawn = ids(draw_problems(sources, 0, 2 * 84, seed=0))
    assert [name for name, _ in drawn[:4]] == ["checksum", "brief", "checksum", "brief"]
    for source in sources:
        own = [problem for name, problem in drawn if name == source.task.name]
        size = len(source.problems)
        epochs = [own[i : i + size] for i in range(0, 84, size)]
        assert all(sorted(epoch) == sorted(p.id for p in source.problems) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in its own order


def test_verdicts_belong_to_their_completions_and_tasks(rollout, sources, loaded):
    tasks = [load_task(spec) for spec in SPECS]
    for p, problem in enumerate(rollout.problems):
        assert rollout.prompts[p] == render_prompt(problem.messages, loaded[1]).token_ids
        for completion, verdict in zip(rollout.completions[p], rollout.verdicts[p], strict=True):
            cut = completion.finish_reason == "length"
            expected = tasks[p % 2].verify(problem, Response(completion.text, len(completion.token_ids), cut))
            assert verdict == expected
    statuses = Counter(v.status for group in rollout.verdicts for v in group)
    assert rollout.statuses() == statuses
    assert set(statuses) == {"ok", "wrong", "truncated"}
    assert rollout.rewards.tolist() == [[pytest.approx(v.reward) for v in group] for group in rollout.verdicts]
    assert rollout.num_tokens.tolist() == [[len(c.token_ids) for c in group] for group in rollout.completions]
    assert rollout.truncated.any()
    assert not rollout.truncated.all()


def batches_of(rollout, budget, rows=None, loss=PolicyLossConfig()):
    """(rows, advantages, weights, denominator, micro-batches) with a different advantage for every sample."""
    rows = rows or [(p, g) for p in range(6) for g in range(GROUP)]
    advantages = torch.arange(6.0 * GROUP).view(6, GROUP) - 7.25
    lengths = torch.stack([rollout.num_tokens[row] for row in rows])
    truncated = torch.stack([rollout.truncated[row] for row in rows])
    weights, denominator = aggregation_weights(lengths, truncated, loss, 8)
    return rows, advantages, weights, denominator, list(policy_batches(rollout, rows, advantages, weights, budget))


def sequences_of(batch):
    """(tokens, mask, advantages, behaviour, weight) of each sequence, as lists."""
    bounds = batch.tokens.segments.cu_seqlens.tolist()
    fields = (batch.tokens.token_ids, batch.loss_mask, batch.advantages, batch.behaviour_logprobs)
    for i, (start, end) in enumerate(pairwise(bounds)):
        yield (*(field[start:end].tolist() for field in fields), float(batch.sequence_weights[i]))


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_every_completion_token_gets_its_own_number_and_no_prompt_token_any(rollout, budget):
    _, advantages, weights, _, batches = batches_of(rollout, budget, loss=PolicyLossConfig(aggregate="sequence"))
    expected = []
    for p in range(6):
        prompt, zeros = rollout.prompts[p], [0.0] * len(rollout.prompts[p])
        for g, c in enumerate(rollout.completions[p]):
            size, weight = len(c.token_ids), float(weights[p * GROUP + g])
            mask = [False] * len(prompt) + [True] * size
            advantage = zeros + [float(advantages[p, g])] * size
            logprobs = torch.tensor(c.logprobs).tolist()
            expected.append((prompt + c.token_ids, mask, advantage, zeros + logprobs, weight))
            assert weight == pytest.approx(1 / size)
    assert sorted(row for batch in batches for row in sequences_of(batch)) == sorted(expected)
    sizes = [batch.tokens.num_tokens for batch in batches]
    assert all(size <= budget or len(batch.sequence_weights) == 1 for size, batch in zip(sizes, batches, strict=True))
    if budget > 1:
        # greedy filling: no batch could have taken the first sequence of the next one
        firsts = [len(next(sequences_of(batch))[0]) for batch in batches[1:]]
        assert all(size + first > budget for size, first in zip(sizes, firsts, strict=False))


def test_the_end_token_is_in_the_loss_and_scored_as_the_trainer_scores_it(rollout, loaded):
    engine, tokenizer = loaded
    stopped = [(p, g) for p in range(6) for g in range(GROUP) if not rollout.truncated[p, g]]
    (batch,) = batches_of(rollout, 100_000, stopped)[-1]
    ends = batch.tokens.segments.cu_seqlens[1:] - 1
    assert batch.tokens.token_ids[ends].tolist() == [tokenizer.eos_id] * len(stopped)
    assert batch.loss_mask[ends].all()
    with torch.no_grad():
        ours = engine.model.logprobs(batch.tokens, 1.0)
    assert (ours - batch.behaviour_logprobs)[batch.loss_mask].abs().max() < 1e-5
    assert batch.behaviour_logprobs[ends].max() < 0.0


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("truncated", ["count", "mask"])
def test_micro_batches_together_have_the_loss_of_one_batch(rollout, loaded, aggregate, truncated):
    loss = PolicyLossConfig(aggregate=aggregate, truncated=truncated)
    totals = []
    for budget in (1, 50, 100_000):
        batches = batches_of(rollout, budget, loss=loss)[-1]
        # other log-probabilities than the engine's, so that ratios and clips differ from 1
        pairs = [(policy_loss(batch.behaviour_logprobs * 1.1, batch, loss), batch) for batch in batches]
        totals.append((sum(float(value) for (value, _), _ in pairs), sum(b.num_loss_tokens for _, b in pairs)))
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    assert totals[2] == pytest.approx(totals[0], rel=1e-5)
    kept = rollout.num_tokens[~rollout.truncated].sum() if truncated == "mask" else rollout.num_tokens.sum()
    assert totals[0][1] == kept


def test_masked_truncated_samples_leave_loss_and_denominator(rollout):
    loss = PolicyLossConfig(aggregate="token", truncated="mask")
    rows, advantages, weights, denominator, batches = batches_of(rollout, 60, loss=loss)
    cut = torch.stack([rollout.truncated[row] for row in rows])
    assert weights.tolist() == (~cut).float().tolist()
    assert denominator == float(rollout.num_tokens[~rollout.truncated].sum())
    # on-policy every ratio is 1, so that the loss is minus the mean advantage over the tokens that count
    total = sum(float(policy_loss(batch.behaviour_logprobs, batch, loss)[0]) for batch in batches)
    by_hand = -(advantages * rollout.num_tokens)[~rollout.truncated].sum() / denominator
    assert total / denominator == pytest.approx(float(by_hand), rel=1e-5)
    assert sum(batch.num_loss_tokens for batch in batches) == denominator


def test_samples_left_out_do_not_appear(rollout):
    rows = [(1, g) for g in range(GROUP)] + [(4, 2)]
    (batch,) = batches_of(rollout, 100_000, rows)[-1]
    wanted = sorted(rollout.prompts[p] + rollout.completions[p][g].token_ids for p, g in rows)
    assert sorted(row[0] for row in sequences_of(batch)) == wanted


@pytest.fixture(scope="module")
def fragile(loaded):
    """A rollout of a task whose check breaks on some samples."""
    task, (engine, tokenizer) = load_task("toy_task:Fragile"), loaded
    with VerifyPool("toy_task:Fragile", workers=1) as pool:
        drawn = draw_problems([ProblemSource(task, task.problems("train"), pool)], 0, 6, seed=1)
        return collect(engine, tokenizer, drawn, SamplingParams(n=GROUP, max_tokens=8, seed=3, logprobs=True))


def test_a_response_that_breaks_its_check_earns_no_more_than_the_worst(fragile):
    broken = fragile.num_tokens % 3 == 0
    assert 0 < int(broken.sum()) < broken.numel()
    assert torch.equal(fragile.rewards.isnan(), broken)
    advantages = group_advantages(fragile.rewards, normalize_std=True)
    for row, failed in zip(advantages, broken, strict=True):
        assert (row[failed] <= row.amin()).all()


def test_failed_checks_are_counted_apart_and_left_out_of_the_mean_reward(fragile, tmp_path):
    judged = [v.reward for group in fragile.verdicts for v in group if v.status != "error"]
    metrics = rollout_metrics(fragile, fragile.rewards)
    assert metrics["reward"] == pytest.approx(sum(judged) / len(judged))
    assert metrics["status_error"] == pytest.approx(1 - len(judged) / 30)
    write_samples(tmp_path / "samples.jsonl", 0, fragile, fragile.rewards)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["reward"] is None for row in rows] == [v.status == "error" for v in fragile.verdicts[0]]


def test_a_verifier_that_always_raises_stops_the_rollout_with_its_first_error(loaded):
    task, (engine, tokenizer) = load_task("toy_task:Broken"), loaded
    with VerifyPool("toy_task:Broken", workers=1) as pool:
        drawn = draw_problems([ProblemSource(task, task.problems("train"), pool)], 0, 4, seed=1)
        with pytest.raises(
            ValueError, match=r"'toy_task:Broken': 20 of 20 checks failed, the first with .*no_such_key"
        ):
            collect(engine, tokenizer, drawn, SamplingParams(n=GROUP, max_tokens=8, seed=3, logprobs=True))
