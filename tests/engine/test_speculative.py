"""Acceptance of drafts: counters, tokens and block tail after one call."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kogia.engine.config import EngineConfig
from kogia.engine.request import Request, SamplingParams
from kogia.engine.scheduler import Scheduler
from kogia.engine.speculative import count_new
from kogia.engine.step import StepPlan, StepResult
from kogia.ops.drafts import num_accepted

EOS = 1


def verify(drafts: list[int], samples: list[int], *, block_size: int = 2, max_tokens: int = 20, **params):
    """Prompt [5, 6, 7], one step to sample 8, then a step that verifies `drafts` against `samples`."""
    scheduler = Scheduler(EngineConfig(block_size=block_size, num_draft_tokens=1), 50, (EOS,))
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    scheduler.add(Request(0, np.array([5, 6, 7]), sampling, 0, 3 + max_tokens))
    scheduler.settle(scheduler.plan(), result([8], [-1.0]))
    row = int(scheduler.running[0])
    opening = scheduler.running
    plan_before = StepPlan(opening, opening * 0, opening * 0, opening * 0 + 1, opening > 0)
    scheduler.propose(plan_before, np.array([drafts], dtype=np.int64))
    plan = scheduler.plan()
    assert plan.counts.tolist() == [1 + len(drafts)]
    outcomes, num_new = scheduler.settle(plan, result(samples, [-2.0 - i for i in range(len(samples))]))
    return scheduler, row, num_new.tolist(), [outcome.finish_reason for outcome in outcomes]


def result(tokens: list[int], logprobs: list[float]) -> StepResult:
    return StepResult(np.array(tokens), np.array(logprobs, dtype=np.float32), np.empty((1, 0), dtype=np.int64))


def test_drafts_are_accepted_up_to_the_first_that_differs():
    for drafts, samples, gained in [
        ([10, 11, 12], [10, 11, 12, 13], [10, 11, 12, 13]),
        ([10, 11, 12], [10, 99, 12, 13], [10, 99]),
        ([10, 11, 12], [99, 11, 12, 13], [99]),
        ([], [42], [42]),
    ]:
        scheduler, row, num_new, reasons = verify(drafts, samples)
        table = scheduler.table
        assert (num_new, reasons) == ([len(gained)], [])
        assert table.num_known[row] == 4 + len(gained)
        assert table.num_computed[row] == 3 + len(gained)
        assert table.token_ids[row, : 4 + len(gained)].tolist() == [5, 6, 7, 8, *gained]
        assert table.logprobs[row, 3 : 4 + len(gained)].tolist() == [-1.0 - i for i in range(len(gained) + 1)]
        assert (table.num_drafted[row], table.num_accepted[row]) == (len(drafts), len(gained) - 1)
        assert table.num_drafts[row] == 0
        assert (scheduler.take_drafted(), scheduler.take_drafted()) == ((len(drafts), int(bool(drafts))), (0, 0))


def test_the_block_tail_goes_back_with_the_rejected_drafts():
    scheduler, row, *_ = verify([10, 11, 12, 13, 14], [99] * 6)
    assert scheduler.table.num_known[row] == 5
    assert scheduler.table.num_blocks[row] == 3  # of the 5 that 9 tokens took
    assert scheduler.pool.num_free == 47


def test_a_stop_token_ends_the_accepted_run():
    assert verify([10, EOS, 12], [10, EOS, 12, 13])[2:] == ([2], ["stop"])
    assert verify([10, EOS, 12], [10, EOS, 12, 13], ignore_eos=True)[2:] == ([4], [])
    assert verify([10, 11], [10, 11, 7], stop_token_ids=(11,))[2:] == ([2], ["stop"])
    assert verify([10, 11], [10, 9, EOS])[2:] == ([2], [])  # past the first difference: never happened


def test_reaching_the_maximum_length_is_reported():
    assert verify([10], [10, 11], max_tokens=3)[2:] == ([2], ["length"])
    assert verify([10], [10, 11], max_tokens=4)[2:] == ([2], [])


def test_logits_that_are_not_finite_end_the_sequence_without_their_tokens():
    scheduler, _, num_new, reasons = verify([10, 11], [10, 11, 12])
    assert (num_new, reasons) == ([3], [])
    plan = scheduler.plan()
    outcomes, num_new = scheduler.settle(plan, result([13], [float("nan")]))
    assert (num_new.tolist(), outcomes[0].finish_reason) == ([0], "error")
    assert outcomes[0].token_ids == [8, 10, 11, 12], "all that nobody had been told of, and 13 not among them"
    assert outcomes[0].request.token_ids.tolist() == [5, 6, 7, 8, 10, 11, 12]
    assert scheduler.pool.num_free == 50
    scheduler.pool.allocate(50)
    assert scheduler.pool.take_to_clear() != []


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_host_and_device_accept_the_same_drafts(seqs, width, seed):
    rng = np.random.default_rng(seed)
    samples, drafts = rng.integers(0, 2, (2, seqs, width))
    num_samples = rng.integers(1, width + 1, seqs)
    on_device = num_accepted(*(torch.from_numpy(x) for x in (samples, drafts, num_samples)))
    num_new, stopped = count_new(samples, drafts, num_samples, np.full((seqs, 1), -1))
    assert on_device.tolist() == (num_new - 1).tolist()
    assert not stopped.any()
    for s in range(seqs):
        count = 0
        while count < num_samples[s] - 1 and samples[s, count] == drafts[s, count]:
            count += 1
        assert on_device[s] == count
