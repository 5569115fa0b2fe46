"""Steps with drafts as graphs: the tokens of decoding without drafts, whatever ends, waits or is planned ahead.

On a CPU a recorded step is played: a replay runs what would have been recorded.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kogia.engine import drafting
from kogia.engine import engine as engine_module
from kogia.engine.config import EngineConfig
from kogia.engine.draft_switch import INTERVAL, SETTLING, SOON, WINDOW, DraftSwitch
from kogia.engine.engine import Engine
from kogia.engine.request import Completion, SamplingParams
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import Transformer, build_model

ties = pytest.mark.skipif(torch.cuda.is_available(), reason="in bf16 tokens are equal up to ties only")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 11, 3], [7, 2], list(range(2, 40)), [2] * 17, [12], list(range(40, 2, -1)), [9, 9, 8]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=20, seed=3, ignore_eos=True, logprobs=True)
FILTERED = replace(SAMPLED, top_k=20, top_p=0.9, min_p=0.01)


class Played:
    """Stands for a recorded graph."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.replay = torch.no_grad()(work)
        self.replay()


def tiny(seed: int = 1, num_mtp_layers: int = 1) -> Transformer:
    mla = MLAConfig(
        num_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
    )
    config = ModelConfig(
        vocab_size=61,
        dim=64,
        num_layers=3,
        ffn_dim=64,
        attention=mla,
        max_position=256,
        init_std=0.2,
        moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=32),
        num_mtp_layers=num_mtp_layers,
    )
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return build_model(config, device=DEVICE, dtype=dtype, seed=seed)


class Oracle(drafting.DraftStep):
    """Guesses right most of the time: a lookup in what the sequence is known to become, wrong at every third place."""

    future: Tensor
    """[positions] what is to come; sequences of one test become the same."""

    def guess(self, hidden: Tensor, positions: Tensor) -> Tensor:
        said, places = super().guess(hidden, positions), positions + 1
        right = self.future[places.clamp_max(len(self.future) - 1)]
        return torch.where(places % 3 == 0, said, right)


@pytest.fixture
def model() -> Transformer:
    return tiny()


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Makes engines whose steps with drafts are recorded, or played in parts as those of a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(drafting.Recorder, "capture", lambda _, work: Played(work))
        monkeypatch.setattr(engine_module, "why_not", lambda *_: None)

    def make(model: Transformer, **options: Any) -> Engine:
        settings = {"block_size": 4, "num_blocks": 300, "max_sequences": 16, "prefix_cache": False, "overlap": True}
        engine = Engine(
            model, None, EngineConfig(**{**settings, "num_draft_tokens": 1, "adaptive_drafts": False, **options})
        )
        if DEVICE == "cpu":
            engine.runner.graphs = None
            if engine.runner.draft_graphs is not None:
                engine.runner.draft_graphs.draws = False
        return engine

    return make


def plain(model: Transformer, **options: Any) -> Engine:
    settings = {"block_size": 4, "num_blocks": 300, "max_sequences": 16, "prefix_cache": False, "graphs": False}
    return Engine(model, None, EngineConfig(**{**settings, **options}))


def ids(engine: Engine, params: SamplingParams, prompts=PROMPTS) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in engine.generate(prompts, params)]


def assert_empty(engine: Engine) -> None:
    assert engine.num_unfinished == 0
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert engine.scheduler.table.num_rows_free == engine.config.max_sequences


def count_recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each step that runs as a graph."""
    graphs, found = engine.runner.draft_graphs, []
    assert graphs is not None
    verify, run = graphs.verify, graphs.run
    monkeypatch.setattr(graphs, "verify", lambda numbers: found.append(len(numbers)) or verify(numbers))
    monkeypatch.setattr(graphs, "run", lambda plan, table: found.append(len(plan.rows)) or run(plan, table))
    return found


@pytest.mark.parametrize(
    ("params", "drafts", "options"),
    [
        (GREEDY, 1, {}),
        (SAMPLED, 2, {}),
        (FILTERED, 3, {}),
        (SAMPLED, 1, {"overlap": False}),
        (SAMPLED, 2, {"max_batch_tokens": 9}),
        (GREEDY, 3, {"max_sequences": 3}),
        (SAMPLED, 3, {"num_blocks": 20, "max_sequences": 4}),
        (GREEDY, 2, {"prefix_cache": True}),
    ],
    ids=str,
)
@ties
def test_tokens_are_those_of_decoding_without_drafts(model, build, params, drafts, options):
    engine = build(model, num_draft_tokens=drafts, **options)
    want = ids(plain(model), params)
    assert ids(engine, params) == want
    assert engine.stats.num_drafted > 0
    assert_empty(engine)


@ties
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_right_and_wrong_drafts_in_turn_change_no_token_but_the_number_of_steps(model, build, drafts, monkeypatch):
    prompt = [5, 9, 11, 3]
    params = replace(GREEDY, max_tokens=60)
    whole = plain(model).generate([prompt], params)[0][0].token_ids
    Oracle.future = torch.tensor(prompt + whole, device=DEVICE)
    monkeypatch.setattr(drafting.DraftGraphs, "make", Oracle)
    engine = build(model, num_draft_tokens=drafts)
    steps = count_recorded(engine, monkeypatch)
    assert ids(engine, params, [prompt]) == [[whole]]
    assert engine.stats.acceptance > 0.45
    assert len(steps) < 45
    assert engine.stats.num_steps <= len(steps) + 1, "only the prompt ran outside of graphs"
    assert_empty(engine)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_a_sequence_gets_no_token_past_its_greatest_length(model, build, length):
    params = replace(GREEDY, max_tokens=length)
    for drafts in (1, 3):
        engine = build(model, num_draft_tokens=drafts)
        found = engine.generate(PROMPTS, params)
        assert all(len(c.token_ids) == length and c.finish_reason == "length" for group in found for c in group)
        drafted = sum(c.num_drafted for group in found for c in group)
        assert engine.stats.num_drafted == drafted, "what a step planned ahead ran in vain counts nowhere"
        proposals = engine.stats.num_proposals
        assert proposals <= drafted <= drafts * proposals, "one to `drafts` tokens each"
        assert_empty(engine)


def test_sequences_reach_the_end_of_the_context(model, build):
    prompts = [[3] * 250, [4] * 255, [5] * 249]
    params = replace(GREEDY, max_tokens=50)
    engine = build(model, num_draft_tokens=2)
    found = engine.generate(prompts, params)
    assert [len(group[0].token_ids) for group in found] == [6, 1, 7]
    assert_empty(engine)


@ties
def test_a_stop_token_among_accepted_drafts_ends_the_sequence_there(model, build, monkeypatch):
    prompt = [5, 9, 11, 3]
    whole = plain(model).generate([prompt], replace(GREEDY, max_tokens=60))[0][0].token_ids
    Oracle.future = torch.tensor(prompt + whole, device=DEVICE)
    monkeypatch.setattr(drafting.DraftGraphs, "make", Oracle)
    for place in range(3, 12):
        engine = build(model, num_draft_tokens=3)
        params = replace(GREEDY, max_tokens=60, stop_token_ids=(whole[place],))
        (completion,) = engine.generate([prompt], params)[0]
        assert completion.finish_reason == "stop"
        assert completion.token_ids == whole[: whole.index(whole[place]) + 1]
        assert_empty(engine)


def test_new_requests_join_and_others_leave_in_every_phase(model, build):
    """Added and aborted between steps, with flights under way; whoever stays gets the tokens of being alone."""
    want = {i: ids(plain(model), SAMPLED, [prompt])[0][0] for i, prompt in enumerate(PROMPTS)}
    for leaver in (0, 3, 5):
        for when in (0, 3):
            engine = build(model, num_draft_tokens=2, max_sequences=4)
            requests = {}
            done: dict[int, Completion] = {}
            for index, prompt in enumerate(PROMPTS):
                requests[engine.add(prompt, SAMPLED)[0]] = index
                done |= {e.request_id: e.completion for e in engine.step() if e.completion}
                if index == leaver:
                    for _ in range(when):
                        done |= {e.request_id: e.completion for e in engine.step() if e.completion}
                    engine.abort(leaver)
            while engine.num_unfinished:
                done |= {e.request_id: e.completion for e in engine.step() if e.completion}
            found = {requests[id]: completion.token_ids for id, completion in done.items()}
            expected = {i: tokens for i, tokens in want.items() if i in found}
            if DEVICE == "cpu":
                assert found == expected
            assert len(found) >= len(PROMPTS) - 1
            assert_empty(engine)


def test_logits_that_are_not_finite_end_their_request_alone(model, build):
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
        model.lm_head.weight[60] = 0  # so that nobody else drafts it
    want = [group[0] for group in ids(plain(model), GREEDY, PROMPTS[:3])]
    engine = build(model, num_draft_tokens=2, num_blocks=40)
    for _ in range(2):
        found = [group[0] for group in engine.generate([*PROMPTS[:3], [4, 60, 5]], GREEDY)]
        assert [completion.finish_reason for completion in found] == ["length"] * 3 + ["error"]
        assert DEVICE == "cuda" or [completion.token_ids for completion in found[:3]] == want
        assert_empty(engine)


def test_new_weights_between_steps_keep_the_graphs_valid(build):
    model, other = tiny(), tiny(seed=2)
    engine = build(model)
    before = ids(engine, GREEDY)
    engine.update_weights(other)
    assert ids(engine, GREEDY) == ids(build(other), GREEDY) != before


def test_more_drafts_than_the_kernel_takes_run_without_graphs(model, build):
    assert build(model, num_draft_tokens=3).runner.draft_graphs is not None
    assert build(model, num_draft_tokens=4).runner.draft_graphs is None
    with pytest.raises(ValueError, match="graphs = true: the attention kernel takes 4 tokens of a sequence"):
        build(model, num_draft_tokens=4, graphs=True)


def test_frequencies_with_drafts_are_those_without(build, monkeypatch):
    """Pairs of tokens behind one prompt, of different seeds with and without drafts: chi-square of homogeneity."""
    model = tiny()
    with torch.no_grad():  # few likely tokens, so that drafts are often right
        model.lm_head.weight[4:] = 0
    Oracle.future = torch.full((1,), 3, device=DEVICE)
    monkeypatch.setattr(drafting.DraftGraphs, "make", Oracle)
    draws = 2000 if DEVICE == "cpu" else 6000
    counts = []
    for engine, seed in ((plain(model, max_sequences=256), 1), (build(model, max_sequences=128), 2)):
        params = SamplingParams(temperature=1.0, top_k=6, max_tokens=4, seed=seed, n=draws, ignore_eos=True)
        found = engine.generate([[5, 9, 11]], params)[0]
        pairs = np.array([c.token_ids[2:4] for c in found])
        counts.append(np.bincount(pairs[:, 0] * 61 + pairs[:, 1], minlength=61 * 61))
    assert engine.stats.acceptance > 0.1
    table = np.stack(counts).astype(float)
    often = table.sum(0) >= 20
    table = np.concatenate((table[:, often], table[:, ~often].sum(1, keepdims=True)), 1)
    expected = table.sum(0) / 2
    statistic = float(((table - expected) ** 2 / np.maximum(expected, 1)).sum())
    freedom = table.shape[1] - 1
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert z < 3.7, f"chi-square {statistic:.1f} of {freedom} degrees of freedom"


@gpu
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"])
def test_recorded_steps_with_drafts_give_the_tokens_of_steps_that_are_not(model, build, params, monkeypatch):
    from kogia.ops.triton import attention

    monkeypatch.setattr(attention, "num_parts", lambda *_: 3)
    want = ids(build(model, graphs=False), params)
    engine = build(model)
    found = ids(engine, params)
    # other numbers of rows may round otherwise: a token that is nearly a tie may be another, and so all that follow
    assert sum(a == b for a, b in zip(found, want, strict=True)) >= len(PROMPTS) - 2
    assert ids(engine, params) == found, "the second run replays"
    assert ids(build(model, overlap=False), params) == found


# whether drafts pay -------------------------------------------------------------------------------------------------


def run_switch(switch: DraftSwitch, steps: int, plain_ms: float, draft_ms: float, tokens: float, seqs: int = 4) -> int:
    """Run steps that take so long; returns how many of them drafted."""
    drafted = 0
    for _ in range(steps):
        drafts = switch.wants(seqs)
        drafted += drafts
        switch.note(seqs, drafts, draft_ms if drafts else plain_ms, round(seqs * (tokens if drafts else 1)))
    return drafted


def test_drafts_that_pay_stay_on_and_others_pause():
    trial = WINDOW + SETTLING
    assert run_switch(DraftSwitch(), 3000, 1.0, 1.2, 1.5) >= 3000 - 4 * trial
    assert run_switch(DraftSwitch(), 3000, 1.0, 1.2, 1.0) <= 5 * trial


def test_drafts_pause_when_acceptance_falls_and_come_back_when_it_rises():
    switch = DraftSwitch()
    run_switch(switch, 200, 1.0, 1.2, 1.75)
    assert switch.wants(4) and switch.gain(4) == pytest.approx(1.75 / 1.2)
    run_switch(switch, 6 * WINDOW, 1.0, 1.2, 1.0)
    assert not switch.wants(4)
    run_switch(switch, 2 * SOON, 1.0, 1.2, 1.0)
    assert run_switch(switch, INTERVAL - 7 * WINDOW, 1.0, 1.2, 1.75) == 0, "it was tried, and stays as it is"
    run_switch(switch, 10 * WINDOW, 1.0, 1.2, 1.75)
    assert switch.wants(4)


def test_one_window_of_bad_luck_pauses_no_drafts_that_pay():
    switch = DraftSwitch()
    run_switch(switch, 200, 1.0, 1.6, 1.75)
    run_switch(switch, WINDOW, 1.0, 1.6, 1.5)
    assert run_switch(switch, 4 * WINDOW, 1.0, 1.6, 1.75) >= 2 * WINDOW
    assert switch.wants(4)


def test_a_window_in_which_the_machine_was_busy_pauses_no_drafts_that_pay():
    switch, trial = DraftSwitch(), WINDOW + SETTLING
    run_switch(switch, trial + 1, 1.0, 1.2, 1.75)
    run_switch(switch, trial, 0.5, 1.2, 1.75)  # plain steps seem as fast as that
    assert run_switch(switch, 2000, 1.0, 1.2, 1.75) > 2000 - 4 * trial
    assert switch.wants(4)


def test_drafts_that_pay_stay_on_beside_a_machine_that_is_busy_by_turns():
    """Windows of both kinds take up to a half longer by chance; drafts gain a fifth."""
    rng, switch, drafted, steps = np.random.default_rng(0), DraftSwitch(), 0, 40_000
    for _ in range(steps // WINDOW):
        drafted += run_switch(switch, WINDOW, 1.0 * (busy := rng.uniform(1, 1.5)), 1.46 * busy, 1.75)
    assert drafted > 0.85 * steps


def test_a_gain_within_the_margin_does_not_bring_drafts_back():
    switch = DraftSwitch()
    run_switch(switch, 200, 1.0, 1.6, 1.5)
    run_switch(switch, 3 * INTERVAL, 1.0, 1.47, 1.5)
    assert not switch.wants(4) and 1 < (switch.gain(4) or 0) < 1.05


def test_each_size_of_batch_is_judged_by_itself():
    switch = DraftSwitch()
    run_switch(switch, 150, 1.0, 1.2, 2.0, seqs=1)
    run_switch(switch, 150, 1.0, 2.2, 2.0, seqs=64)
    assert switch.wants(1) and not switch.wants(64)
    assert switch.gain(2) is None and switch.wants(2)


def test_an_engine_pauses_drafts_by_its_clock_and_gives_the_same_tokens(model, build):
    """The clock moves with the steps: those with drafts take twice the time, which their acceptance cannot make up."""
    params = replace(GREEDY, max_tokens=6 * WINDOW)
    engine = build(model, adaptive_drafts=True)
    now, launch = 0.0, engine.runner.launch

    def slow_launch(plan, num_drafts):
        nonlocal now
        now += 2.5 if num_drafts else 1.0
        return launch(plan, num_drafts)

    engine.runner.launch, engine.clock = slow_launch, lambda: now
    found = ids(engine, params, PROMPTS[:2])
    if DEVICE == "cpu":
        assert found == ids(plain(model), params, PROMPTS[:2])
    assert engine.draft_switch is not None and not engine.draft_switch.wants(2)
    assert 0 < engine.stats.num_drafted < 2 * (3 * WINDOW)
    always = build(model)
    assert always.draft_switch is None
    ids(always, params, PROMPTS[:2])
    assert always.stats.num_drafted > engine.stats.num_drafted + WINDOW
