"""Scheduler and block bookkeeping, driven with random traffic. The model is replaced by a record of what each cache
slot would hold, so every read of a row that is stale, foreign or not yet written is seen."""

from collections import deque

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kogia.engine.config import EngineConfig
from kogia.engine.request import Request, SamplingParams
from kogia.engine.scheduler import Scheduler
from kogia.engine.sequences import Settings
from kogia.engine.step import StepPlan, StepResult

EOS = 1


def make_request(request_id: int, prompt: list[int], max_tokens: int, **params) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return Request(request_id, np.array(prompt), sampling, 0, len(prompt) + max_tokens)


class Simulation:
    """A scheduler whose model is `rng`, and a cache that remembers which prefix each slot was computed from."""

    def __init__(
        self, config: EngineConfig, num_blocks: int, seed: int = 0, ahead: int = 0, is_gpu: bool = False
    ) -> None:
        """`ahead` steps stay in flight while the next is planned."""
        self.config = config
        self.scheduler = Scheduler(config, num_blocks, (EOS,), is_gpu=is_gpu)
        self.scheduler.drafts_ahead = lambda rows: True
        self.slots: dict[int, tuple[int, ...]] = {}
        self.rng = np.random.default_rng(seed)
        self.finished: list[Request] = []
        self.flights: deque[tuple[StepPlan, np.ndarray, np.ndarray]] = deque()
        self.known: dict[int, list[int]] = {}
        """Row -> its tokens, as the device knows them."""
        self.guesses: dict[int, list[int]] = {}
        self.ahead = ahead

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is None and self.flights:
            self.settle()
            plan = self.scheduler.plan()
        if plan is None:
            return None
        assert plan.num_tokens <= self.scheduler.budget
        assert len(set(plan.rows.tolist())) == len(plan.rows)
        runs = [self.run(plan, entry) for entry in range(len(plan.rows))]
        written: set[int] = set()
        for row, contents, start in runs:
            for position in range(start, len(contents)):
                slot = self.slot(row, position)
                assert slot not in written, f"slot {slot} has two writers"
                written.add(slot)
                self.slots[slot] = tuple(contents[: position + 1])
        for row, contents, _ in runs:  # attention reads after all rows of the layer are written
            for position in range(len(contents)):
                assert self.slots[self.slot(row, position)] == tuple(contents[: position + 1])
        samples = [self.sample(plan, entry, contents) for entry, (_, contents, _) in enumerate(runs)]
        tokens = np.array([token for each in samples for token in each], dtype=np.int64)
        drafts = [self.draft(row) for row in plan.rows[plan.sampled].tolist()]
        self.flights.append(
            (plan, tokens, np.array(drafts, dtype=np.int64).reshape(len(drafts), self.config.num_draft_tokens))
        )
        while len(self.flights) > self.ahead:
            self.settle()
        return plan

    def run(self, plan: StepPlan, entry: int) -> tuple[int, list[int], int]:
        """(row, all tokens behind the run, where it starts); what would pass the greatest length is not run."""
        table, row = self.scheduler.table, int(plan.rows[entry])
        start, count = int(plan.starts[entry]), int(plan.counts[entry])
        if not plan.is_pending[entry]:
            known = int(table.num_known[row])
            self.known[row] = table.token_ids[row, :known].tolist()
            self.guesses[row] = table.token_ids[row, known : start + count].tolist()
            return row, table.token_ids[row, : start + count].tolist(), start
        known = self.known[row]
        if self.config.num_draft_tokens == 0:
            assert start == len(known) - 1
        start, count = len(known) - 1, min(count, int(table.max_length[row]) - len(known))
        return row, (known + self.guesses[row])[: start + count] if count > 0 else [], start

    def settle(self) -> None:
        plan, tokens, drafts = self.flights.popleft()
        outcomes, _ = self.scheduler.settle(plan, StepResult(tokens, np.zeros(len(tokens), np.float32), drafts))
        self.finished += [outcome.request for outcome in outcomes if outcome.finish_reason is not None]
        if drafts.shape[1]:
            self.scheduler.propose(plan, drafts)

    def sample(self, plan: StepPlan, entry: int, contents: list[int]) -> list[int]:
        """Random tokens that often agree with the drafts."""
        row, count = int(plan.rows[entry]), int(plan.num_samples[entry])
        if not count:
            return []
        drafts = contents[len(self.known[row]) :]
        tokens = [
            draft if draft is not None and self.rng.random() < 0.6 else int(self.rng.integers(1, 5))
            for draft in [*drafts, *[None] * count][:count]
        ]
        accepted = 0
        while accepted < len(drafts) and tokens[accepted] == drafts[accepted]:
            accepted += 1
        self.known[row] = self.known[row] + tokens[: accepted + 1]
        return tokens

    def draft(self, row: int) -> list[int]:
        """What the device does with guesses: chained rows written for all but the last."""
        table, known, num_drafts = self.scheduler.table, len(self.known[row]), self.config.num_draft_tokens
        most = min(num_drafts, int(table.max_length[row]) - known - 1)
        for position in range(known - 1, known - 1 + most - 1):
            self.slots[self.slot(row, position)] = ("draft",)  # pyright: ignore[reportArgumentType]
        self.guesses[row] = self.rng.integers(1, 5, num_drafts).tolist()
        return self.guesses[row]

    def slot(self, row: int, position: int) -> int:
        table, size = self.scheduler.table, self.config.block_size
        assert position < table.num_blocks[row] * size, f"row {row} has no block for position {position}"
        return int(table.blocks[row, position // size]) * size + position % size

    def check(self) -> None:
        table, pool, size = self.scheduler.table, self.scheduler.pool, self.config.block_size
        owners: dict[int, list[tuple[int, int]]] = {}
        for row in self.scheduler.running.tolist():
            lengths = table.num_known[row] + table.num_pending[row]
            assert lengths <= table.max_length[row]
            assert table.num_computed[row] < lengths or table.num_flights[row] > 0
        for row in [row for row, request in enumerate(table.requests) if request is not None]:
            for index, block in enumerate(table.row_blocks(row)):
                owners.setdefault(block, []).append((row, index))
            assert (table.blocks[row, table.num_blocks[row] :] == table.blocks[row, 0]).all(), (
                "its tail is its own block"
            )
        for rows in (self.scheduler.running, *(plan.rows for plan, _, _ in self.flights)):
            for name, found in vars(table.settings(rows)).items():
                fresh = getattr(Settings(table, rows), name)
                assert np.array_equal(found, fresh), (
                    f"{name} of rows {rows} is not what their requests ask for any more"
                )
        assert pool.ref_counts == [len(owners.get(block, ())) for block in range(pool.num_blocks)]
        assert pool.num_free == pool.num_blocks - len(owners)
        for holders in owners.values():
            prefixes = {tuple(table.token_ids[row, : (i + 1) * size].tolist()) for row, i in holders}
            full = all((i + 1) * size <= table.num_known[row] for row, i in holders)
            assert len(holders) == 1 or (full and len(prefixes) == 1), "a block is shared only when full and equal"

    def drain(self) -> None:
        for _ in range(10000):
            if self.step() is None and not self.flights:
                break
            self.check()
        assert self.scheduler.num_unfinished == 0
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks


class TrafficMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        budget=st.sampled_from([1, 3, 7, 64]),
        drafts=st.sampled_from([0, 1, 3]),
        prefix_cache=st.booleans(),
        num_blocks=st.integers(12, 40),
        ahead=st.integers(0, 1),
    )
    def build(self, block_size: int, budget: int, drafts: int, prefix_cache: bool, num_blocks: int, ahead: int) -> None:
        config = EngineConfig(
            block_size=block_size,
            max_batch_tokens=budget,
            max_sequences=4,
            num_draft_tokens=drafts,
            prefix_cache=prefix_cache,
        )
        self.simulation = Simulation(config, num_blocks, ahead=ahead)
        self.capacity = num_blocks * block_size
        self.added: dict[int, list[int]] = {}

    @rule(
        prompt=st.lists(st.integers(2, 3), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        temperature=st.sampled_from([0.0, 1.0]),
        top_p=st.sampled_from([0.5, 1.0]),
    )
    def add(self, prompt: list[int], max_tokens: int, n: int, **params) -> None:
        for _ in range(n):
            request = make_request(len(self.added), prompt, max_tokens, **params)
            if request.max_length - 1 > self.capacity:
                with pytest.raises(ValueError, match="the whole cache holds"):
                    self.simulation.scheduler.add(request)
                return
            self.simulation.scheduler.add(request)
            self.added[request.id] = prompt

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.scheduler.abort(data.draw(st.sampled_from(sorted(self.added))))

    @rule()
    def recompute(self) -> None:
        self.simulation.scheduler.recompute_all()
        self.simulation.flights.clear()
        self.simulation.slots.clear()

    @invariant()
    def bookkeeping_holds(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()
            for request in self.simulation.finished:
                prompt, tokens = self.added[request.id], request.token_ids.tolist()
                assert tokens[: len(prompt)] == prompt
                assert len(tokens) == request.max_length or tokens[-1] == EOS
                assert EOS not in tokens[len(prompt) : -1]


TestTrafficMachine = TrafficMachine.TestCase
TestTrafficMachine.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


def simulate(requests: list[Request], num_blocks: int = 100, **options) -> tuple[Simulation, list[StepPlan]]:
    simulation = Simulation(EngineConfig(**{"block_size": 4, **options}), num_blocks)
    for request in requests:
        simulation.scheduler.add(request)
    plans = []
    while (plan := simulation.step()) is not None:
        plans.append(plan)
    return simulation, plans


def test_one_budget_mixes_decodes_and_prefill_chunks_running_first():
    requests = [make_request(i, [2] * length, 3, ignore_eos=True) for i, length in enumerate([3, 9, 5])]
    _, plans = simulate(requests, max_batch_tokens=5, prefix_cache=False)
    shown = [list(zip(p.starts.tolist(), p.counts.tolist(), p.num_samples.tolist())) for p in plans]
    assert shown[:4] == [
        [(0, 3, 1), (0, 2, 0)],  # the first prompt, and a chunk of the second
        [(3, 1, 1), (2, 4, 0)],
        [(4, 1, 1), (6, 3, 1), (0, 1, 0)],
        [(9, 1, 1), (1, 4, 1)],
    ]


@pytest.mark.parametrize(
    ("is_gpu", "most", "tokens"),
    [(True, None, [8192, 2048, 2048, 2048, 2048, 5620]), (False, None, [2048] * 8), (True, 3000, [3000] * 5)],
    ids=str,
)
def test_on_a_gpu_a_step_is_shorter_while_a_sequence_decodes_unless_a_budget_is_set(is_gpu, most, tokens):
    """Two prompts of 6,000 and 12,000, the first with five tokens to come, and one of 4,000 when it has ended."""
    simulation = Simulation(EngineConfig(max_batch_tokens=most, prefix_cache=False), 2000, is_gpu=is_gpu)
    for i, (length, max_tokens) in enumerate([(6000, 5), (12000, 1)]):
        simulation.scheduler.add(make_request(i, [2] * length, max_tokens, ignore_eos=True))
    sizes = []
    for _ in tokens:
        plan = simulation.step()
        assert plan is not None
        sizes.append(plan.num_tokens)
        if len(sizes) == 5:
            simulation.scheduler.add(make_request(2, [2] * 4000, 1))
    assert sizes == tokens


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_sequence_that_decodes_gets_its_token_every_step_whatever_prompts_come(drafts):
    config = EngineConfig(num_draft_tokens=drafts, prefix_cache=False)
    simulation = Simulation(config, 4000, is_gpu=True)
    simulation.scheduler.add(make_request(0, [2] * 10, 12, ignore_eos=True))
    simulation.step()
    for i in range(1, 4):
        simulation.scheduler.add(make_request(i, [2] * 9000, 2, ignore_eos=True))
    for _ in range(3):
        plan = simulation.step()
        assert plan is not None and plan.num_tokens == 2048 and plan.num_samples[0] >= 1


def test_siblings_share_the_prompts_full_blocks_in_the_very_same_step():
    requests = [make_request(i, list(range(2, 12)), 2) for i in range(4)]
    _, plans = simulate(requests)
    assert plans[0].starts.tolist() == [0, 8, 8, 8]
    assert plans[0].counts.tolist() == [10, 2, 2, 2]
    assert [r.num_cached_tokens for r in requests] == [0, 8, 8, 8]


def test_a_fully_cached_prompt_still_runs_its_last_block():
    requests = [make_request(i, list(range(2, 10)), 2) for i in range(2)]
    _, plans = simulate(requests)
    assert plans[0].starts.tolist() == [0, 4]  # 8 tokens fill two blocks, of which only the first may be shared


def test_a_prefix_outlives_its_sequence():
    simulation, _ = simulate([make_request(0, list(range(2, 12)), 1)])
    later = make_request(1, [*range(2, 10), 99], 1)
    simulation.scheduler.add(later)
    simulation.drain()
    assert later.num_cached_tokens == 8


def test_prefix_cache_off_shares_nothing():
    requests = [make_request(i, list(range(2, 12)), 2) for i in range(3)]
    _, plans = simulate(requests, prefix_cache=False)
    assert plans[0].starts.tolist() == [0, 0, 0]


def test_when_blocks_run_out_the_youngest_is_sent_back_and_keeps_its_tokens():
    requests = [make_request(i, [2 + i] * 4, 20, ignore_eos=True) for i in range(2)]
    simulation, _ = simulate(requests, num_blocks=8)
    assert simulation.scheduler.num_preemptions > 0
    assert [request.id for request in simulation.finished] == [0, 1]
    assert all(len(request.token_ids) == 24 for request in simulation.finished)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(EngineConfig(block_size=4), 5, (EOS,))
    scheduler.add(make_request(0, [2] * 10, 11))  # the last token needs no cache row: 20 of 20
    with pytest.raises(ValueError, match="10 tokens.*max_tokens = 12.*21 cached tokens.*holds 20.*num_blocks"):
        scheduler.add(make_request(1, [2] * 10, 12))


def test_unverified_drafts_never_enter_the_prefix_index():
    simulation = Simulation(EngineConfig(block_size=2, num_draft_tokens=3), 50)
    simulation.scheduler.add(make_request(0, [2, 3, 4], 30, ignore_eos=True))
    while simulation.step() is not None:
        table = simulation.scheduler.table
        for row in simulation.scheduler.running.tolist():
            assert table.num_named[row] * 2 <= table.num_known[row]
