"""Acceptance of drafts: counters, tokens and block tail after one call."""

import numpy as np

from kogia.engine.config import EngineConfig
from kogia.engine.request import Request, SamplingParams
from kogia.engine.scheduler import Scheduler
from kogia.engine.speculative import accept

EOS = 1


def verify(drafts: list[int], samples: list[int], *, block_size: int = 2, max_tokens: int = 20, **params):
    """Prompt [5, 6, 7], one step to sample 8, then a step that verifies `drafts` against `samples`."""
    scheduler = Scheduler(EngineConfig(block_size=block_size, num_draft_tokens=max(1, len(drafts))), 50, (EOS,))
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    scheduler.add(Request(0, np.array([5, 6, 7]), sampling, 0, 3 + max_tokens))
    table = scheduler.table
    accept(table, scheduler.pool, scheduler.plan(), np.array([8]), np.array([-1.0], dtype=np.float32))
    row = int(scheduler.running[0])
    table.token_ids[row, 4 : 4 + len(drafts)] = drafts
    table.num_drafts[row] = len(drafts)
    plan = scheduler.plan()
    assert plan.counts.tolist() == [1 + len(drafts)]
    logprobs = -np.arange(2, 2 + len(samples), dtype=np.float32)
    accepted = accept(table, scheduler.pool, plan, np.array(samples), logprobs)
    return scheduler, row, accepted


def test_drafts_are_accepted_up_to_the_first_that_differs():
    for drafts, samples, gained in [
        ([10, 11, 12], [10, 11, 12, 13], [10, 11, 12, 13]),
        ([10, 11, 12], [10, 99, 12, 13], [10, 99]),
        ([10, 11, 12], [99, 11, 12, 13], [99]),
        ([], [42], [42]),
    ]:
        scheduler, row, accepted = verify(drafts, samples)
        table = scheduler.table
        assert accepted.num_new.tolist() == [len(gained)]
        assert table.num_known[row] == 4 + len(gained)
        assert table.num_computed[row] == 3 + len(gained)
        assert table.token_ids[row, : 4 + len(gained)].tolist() == [5, 6, 7, 8, *gained]
        assert table.logprobs[row, 3 : 4 + len(gained)].tolist() == [-1.0 - i for i in range(len(gained) + 1)]
        assert (table.num_drafted[row], table.num_accepted[row]) == (len(drafts), len(gained) - 1)
        assert table.num_drafts[row] == 0


def test_the_block_tail_goes_back_with_the_rejected_drafts():
    scheduler, row, _ = verify([10, 11, 12, 13, 14], [99] * 6)
    assert scheduler.table.num_known[row] == 5
    assert scheduler.table.num_blocks[row] == 3  # of the 5 that 9 tokens took
    assert scheduler.pool.num_free == 47


def test_a_stop_token_ends_the_accepted_run():
    _, _, accepted = verify([10, EOS, 12], [10, EOS, 12, 13])
    assert accepted.num_new.tolist() == [2]
    assert accepted.stopped.tolist() == [True]
    _, _, accepted = verify([10, EOS, 12], [10, EOS, 12, 13], ignore_eos=True)
    assert accepted.num_new.tolist() == [4]
    assert accepted.stopped.tolist() == [False]
    _, _, accepted = verify([10, 11], [10, 11, 7], stop_token_ids=(11,))
    assert accepted.num_new.tolist() == [2]
    _, _, accepted = verify([10, 11], [10, 9, EOS])  # past the first difference: never happened
    assert accepted.stopped.tolist() == [False]


def test_reaching_the_maximum_length_is_reported():
    _, _, accepted = verify([10], [10, 11], max_tokens=3)
    assert accepted.full.tolist() == [True]
    _, _, accepted = verify([10], [10, 11], max_tokens=4)
    assert accepted.full.tolist() == [False]
