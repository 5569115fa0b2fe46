"""The engine's promises beside parity: limits, stops, streaming, aborts, weight updates, failures, statistics."""

from contextlib import suppress

import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.engine.scheduler import NO_LIMIT
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import Tokenizer, train_bpe

CONFIG = ModelConfig(
    vocab_size=280,
    dim=32,
    num_layers=2,
    ffn_dim=64,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
    num_mtp_layers=1,
    max_position=64,
    init_std=0.2,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the answer is 42. " * 20], CONFIG.vocab_size)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(CONFIG, seed=3)


def engine(model: Transformer, tokenizer: Tokenizer | None = None, **options) -> Engine:
    return Engine(model, tokenizer, EngineConfig(**{"block_size": 4, "num_blocks": 100, **options}))


def assert_empty(engine: Engine) -> None:
    assert engine.num_unfinished == 0
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert engine.scheduler.table.num_rows_free == engine.config.max_sequences


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(model):
    with pytest.raises(ValueError, match="64 tokens: must have 1 to 63.*context is 64"):
        engine(model).generate([[5] * 64], SamplingParams())
    with pytest.raises(ValueError, match="0 tokens"):
        engine(model).generate([[]], SamplingParams())


def test_the_context_ends_a_completion_that_asked_for_more(model):
    (completion,) = engine(model).generate([[5] * 60], SamplingParams(max_tokens=50, ignore_eos=True, seed=0))[0]
    assert len(completion.token_ids) == 4
    assert completion.finish_reason == "length"


def test_a_prompt_larger_than_the_cache_is_refused_and_leaves_nothing_behind(model):
    small = engine(model, num_blocks=5)
    for length in (21, 30):
        with pytest.raises(ValueError, match=f"a prompt of {length} tokens .*but the whole cache holds 20"):
            small.generate([[5] * 4, [5] * length], SamplingParams(max_tokens=8))
    assert_empty(small)


@pytest.mark.parametrize("options", [{}, {"num_draft_tokens": 1}, {"prefix_cache": False}])
@pytest.mark.parametrize("length", [4, 10, 19, 20])
def test_a_completion_ends_where_the_cache_is_full_and_that_is_said_once(model, options, length, capsys):
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=0)
    small = engine(model, num_blocks=5, **options)
    short, other = (group[0] for group in small.generate([[5] * length, [6] * length], params))
    (whole,) = engine(model, **options).generate([[5] * length], params)[0]
    assert short.token_ids == whole.token_ids[: 21 - length]
    assert len(other.token_ids) == 21 - length
    assert (short.finish_reason, whole.finish_reason) == ("length", "length")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the whole cache holds 20 tokens, so a completion of 40 tokens may end early") == 1
    assert_empty(small)


def test_tokens_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValueError, match=r"span 3\.\.280: the model knows 0\.\.279"):
        engine(model).add([3, 280], SamplingParams())


def test_drafting_needs_a_module_to_draft_with():
    dense = ModelConfig(vocab_size=20, dim=16, num_layers=1, ffn_dim=16, attention=GQAConfig(num_heads=2), moe=None)
    with pytest.raises(ValueError, match="num_draft_tokens = 1: the model has no MTP module"):
        engine(build_model(dense), num_draft_tokens=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature = -1.0: must be 0, which is greedy, or in "),
        ({"top_p": 0.0}, r"top_p = 0.0: must be in \(0, 1\]"),
        ({"min_p": 2.0}, "min_p = 2.0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"n": 0}, "n = 0"),
        ({"stop": ("",)}, "stop = "),
    ],
)
def test_sampling_params_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_engine_config_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"engine.block_size = 0: must be at least 1"):
        EngineConfig(block_size=0)


def test_cache_memory_decides_the_blocks_up_to_what_can_be_used(model):
    row = (16 + 8) * 4 * 2  # latent and rotary key, float32, two layers; none for MTP unless it drafts
    config = EngineConfig(block_size=4, cache_memory_bytes=10 * 4 * row + 7)
    assert Engine(model, None, config).scheduler.pool.num_blocks == 10
    plenty = EngineConfig(block_size=4, max_sequences=3)
    assert Engine(model, None, plenty).scheduler.pool.num_blocks == 3 * 16
    with pytest.raises(ValueError, match="cache_memory_bytes = 100"):
        Engine(model, None, EngineConfig(cache_memory_bytes=100))


def test_a_stop_token_is_kept_in_the_ids_and_left_out_of_the_text(model, tokenizer):
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    (free,) = engine(model, tokenizer).generate([[0, 9]], params)[0]
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True, stop_token_ids=(stop,))
    (stopped,) = engine(model, tokenizer).generate([[0, 9]], params)[0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text == tokenizer.decode(free.token_ids[:first])
    assert (stopped.finish_reason, free.finish_reason) == ("stop", "length")


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_stop_string_ends_at_the_token_that_completes_it(model, tokenizer, drafts):
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    (free,) = engine(model, tokenizer).generate([[0, 9]], params)[0]
    stop = free.text[12:15]
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True, stop=("never", stop))
    (stopped,) = engine(model, tokenizer, num_draft_tokens=drafts).generate([[0, 9]], params)[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in tokenizer.decode(stopped.token_ids)
    assert stop not in tokenizer.decode(stopped.token_ids[:-1])


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(ValueError, match="need a tokenizer"):
        engine(model).add([5], SamplingParams(stop=("x",)))


def test_streamed_events_join_to_the_completion(model, tokenizer):
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    streaming = engine(model, tokenizer, num_draft_tokens=2)
    first = streaming.add([0, 9], params, stream=True)
    second = streaming.add([0, 10, 11], params, stream=True)
    tokens: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    ends = {}
    while streaming.num_unfinished:
        for event in streaming.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            texts[event.request_id] = texts.get(event.request_id, "") + event.text
            if event.completion is not None:
                ends[event.request_id] = event.completion
    for request_id in (*first, *second):
        assert tokens[request_id] == ends[request_id].token_ids
        assert texts[request_id] == ends[request_id].text == tokenizer.decode(tokens[request_id])
    (whole,) = engine(model, tokenizer).generate([[0, 9]], params)[0]
    assert ends[first[0]].token_ids == whole.token_ids
    assert ends[first[0]].text == whole.text


def test_abort_returns_what_there_was_and_frees_the_blocks(model, tokenizer):
    busy = engine(model, tokenizer, max_sequences=2)
    params = SamplingParams(max_tokens=20, seed=1, n=3, ignore_eos=True)
    running, other, waiting = busy.add([0, 9, 4, 4, 4, 4], params)
    for _ in range(5):
        busy.step()
    aborted = busy.abort(running)
    assert aborted is not None
    assert aborted.finish_reason == "abort"
    assert len(aborted.token_ids) == 5
    assert aborted.text == tokenizer.decode(aborted.token_ids)
    unstarted = busy.abort(waiting)
    assert unstarted is not None
    assert unstarted.token_ids == []
    assert busy.abort(waiting) is None
    while busy.num_unfinished:
        events = busy.step()
    assert [event.request_id for event in events] == [other]
    assert_empty(busy)


def test_new_weights_apply_to_every_cached_row(model):
    """After an update nothing computed by the old weights may be read: prefixes are forgotten, caches recomputed."""
    ours, new = build_model(CONFIG, seed=3), build_model(CONFIG, seed=4)
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True, logprobs=True)
    prompt = list(range(10, 30))
    updated = engine(ours)
    (old,) = updated.generate([prompt], params)[0]
    updated.update_weights(new, version=7)
    (fresh,) = updated.generate([prompt], params)[0]
    (expected,) = engine(new).generate([prompt], params)[0]
    assert fresh.token_ids == expected.token_ids
    assert fresh.token_ids != old.token_ids
    assert fresh.num_cached_tokens == 0
    assert (old.weights_version, fresh.weights_version) == (0, 7)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), new.parameters()))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(ours.parameters(), new.parameters()))


def test_weights_changed_in_place_flush_the_prefixes_and_bump_the_version():
    ours = build_model(CONFIG, seed=3)
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    sharing = engine(ours)
    sharing.generate([list(range(10, 30))], params)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    sharing.update_weights(ours)
    (got,) = sharing.generate([list(range(10, 30))], params)[0]
    assert got.token_ids == engine(ours).generate([list(range(10, 30))], params)[0][0].token_ids
    assert (got.weights_version, got.num_cached_tokens) == (1, 0)


def test_a_completion_under_way_keeps_its_tokens_and_names_the_weights_that_began_it():
    ours, new = build_model(CONFIG, seed=3), build_model(CONFIG, seed=4)
    updated = engine(ours, max_sequences=1)
    params = SamplingParams(max_tokens=10, seed=1, n=2, ignore_eos=True)
    first, second = updated.add([0, 9, 4], params)
    for _ in range(5):
        updated.step()
    updated.update_weights(dict(new.state_dict()))
    done = {}
    while updated.num_unfinished:
        done |= {event.request_id: event.completion for event in updated.step()}
    assert (done[first].weights_version, done[second].weights_version) == (0, 1)
    old = engine(build_model(CONFIG, seed=3)).generate([[0, 9, 4]], params)[0][0]
    assert done[first].token_ids[:5] == old.token_ids[:5]
    assert done[first].token_ids != old.token_ids
    assert done[second].token_ids == engine(new).generate([[0, 9, 4]], params)[0][1].token_ids


def test_weights_that_do_not_fit_are_refused_before_anything_is_copied():
    ours = build_model(CONFIG, seed=3)
    before = ours.lm_head.weight.clone()
    tensors = {name: torch.zeros_like(t) for name, t in ours.state_dict().items()}
    tensors["model.norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"model.norm.weight \(5,\)"):
        engine(ours).update_weights(tensors)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match="do not fit the model: model.norm.weight"):
        engine(ours).update_weights(tensors)
    assert torch.equal(ours.lm_head.weight, before)


def test_nan_weights_end_every_request_and_the_engine_survives():
    ours = build_model(CONFIG, seed=3)
    broken = engine(ours)
    params = SamplingParams(max_tokens=5, seed=1)
    healthy = broken.generate([[0, 9]], params)
    good = ours.lm_head.weight.detach().clone()
    with torch.no_grad():
        ours.lm_head.weight.fill_(float("nan"))
    (completion,) = broken.generate([[0, 9]], params)[0]
    assert (completion.finish_reason, completion.token_ids) == ("error", [])
    assert_empty(broken)
    with torch.no_grad():
        ours.lm_head.weight.copy_(good)
    assert broken.generate([[0, 9]], params) == healthy


@pytest.mark.parametrize("options", [{}, {"num_draft_tokens": 2}, {"overlap": True}, {"max_batch_tokens": 5}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_their_request_alone(options, value):
    """One token's embedding is poisoned. Its blocks, given to others afterwards, must not spoil them."""
    ours = build_model(CONFIG, seed=3)
    with torch.no_grad():
        ours.model.embed_tokens.weight[100] = value
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 100, 9], [11] * 9]
    small = engine(ours, num_blocks=30, **options)
    for _ in range(3):
        good, bad, other = (group[0] for group in small.generate(prompts, params))
        assert (bad.finish_reason, bad.token_ids) == ("error", [])
        assert [c.finish_reason for c in (good, other)] == ["length", "length"]
        alone = engine(ours).generate([prompts[0], prompts[2]], params)
        assert [good.token_ids, other.token_ids] == [group[0].token_ids for group in alone]
        assert_empty(small)


def test_a_step_that_fails_leaves_no_unwritten_block_in_the_prefix_index(model):
    failing = engine(model)
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    expected = engine(model).generate([list(range(20))], params)[0][0].token_ids
    (request_id,) = failing.add(list(range(20)), params)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        failing.step()
    hook.remove()
    done = [event for _ in range(8) for event in failing.step()]
    assert [event.request_id for event in done] == [request_id]
    assert done[0].completion is not None
    assert done[0].completion.token_ids == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_cannot_even_be_opened_takes_nobody_along(model, overlap):
    """No parameter that the checks let through does that: what one that got around them leaves is as before."""
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    prompts = [list(range(5)), list(range(20)), [3, 2, 1]]
    expected = [group[0].token_ids for group in engine(model).generate(prompts, params)]
    busy = engine(model, overlap=overlap)
    going = [busy.add(prompt, params)[0] for prompt in prompts[:2]]
    busy.step()
    bad = SamplingParams(max_tokens=8)
    object.__setattr__(bad, "top_k", 2**63)
    (poison,) = busy.add([0, 9], bad)
    going += busy.add(prompts[2], params)
    for _ in range(2):
        with pytest.raises(OverflowError):
            busy.step()
    busy.abort(poison)
    done = {}
    while busy.num_unfinished:
        done |= {event.request_id: event.completion for event in busy.step()}
    assert [done[request_id].token_ids for request_id in going] == expected
    assert_empty(busy)


@pytest.mark.parametrize("drafts", [0, 1])
def test_prompts_that_come_in_let_every_running_sequence_have_a_token_in_every_step(model, drafts):
    """However long they are: the budget of a step bounds the time between tokens, and decodes come first in it."""
    busy = engine(model, max_batch_tokens=12, num_draft_tokens=drafts, adaptive_drafts=False)
    params = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    running = [busy.add([5 + i], params, stream=True)[0] for i in range(3)]
    busy.step()
    for _ in range(8):
        busy.add(list(range(50)), params)
        before = busy.stats.num_run_tokens
        heard = {event.request_id for event in busy.step() if event.token_ids}
        assert heard >= set(running)
        assert busy.stats.num_run_tokens - before <= 12


def short_of_memory(engine: Engine, most: int) -> list[int]:
    """Let steps of more than `most` tokens fail; returns the sizes of those that do not, as they run."""
    launch, sizes = engine.runner.launch, []

    def limited(plan, num_drafts=0):
        if plan.num_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(plan.num_tokens)
        return launch(plan, num_drafts)

    engine.runner.launch = limited
    return sizes


@pytest.mark.parametrize("most", [1, 3, 9])
@pytest.mark.parametrize(
    "options", [{}, {"num_draft_tokens": 2}, {"overlap": True}, {"max_batch_tokens": 20}, {"num_blocks": 16}], ids=str
)
def test_a_step_without_memory_loses_no_request_and_no_token(model, options, most, capsys):
    params = SamplingParams(max_tokens=10, seed=1, ignore_eos=True, n=2)
    prompts = [list(range(20)), list(range(17)), [3, 2, 1], [7] * 12]
    expected = [[c.token_ids for c in group] for group in engine(model).generate(prompts, params)]
    small = engine(model, **options)
    sizes = short_of_memory(small, most)
    for _ in range(2):
        assert [[c.token_ids for c in group] for group in small.generate(prompts, params)] == expected
        assert_empty(small)
    assert sizes and max(sizes) <= most
    assert "no memory for a step of" in " ".join(capsys.readouterr().err.split())
    assert small.scheduler.limit == NO_LIMIT, "forgotten when all have ended"


def test_memory_that_runs_out_under_a_step_in_flight_costs_that_step_alone(model):
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    prompts = [list(range(9)), [3, 2, 1], [7] * 12]
    expected = [group[0].token_ids for group in engine(model).generate(prompts, params)]
    busy = engine(model, overlap=True)
    ids = [busy.add(prompt, params)[0] for prompt in prompts]
    for _ in range(3):
        busy.step()
    short_of_memory(busy, 2)
    done = {}
    while busy.num_unfinished:
        done |= {event.request_id: event.completion for event in busy.step()}
    assert [done[request_id].token_ids for request_id in ids] == expected
    assert_empty(busy)


def test_a_step_of_one_token_without_memory_is_an_error_that_the_engine_survives(model):
    params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    broken = engine(model)
    launch = broken.runner.launch
    short_of_memory(broken, 0)
    with pytest.raises(torch.OutOfMemoryError):
        broken.generate([[5, 6, 7]], params)
    assert_empty(broken)
    broken.runner.launch = launch
    assert broken.generate([[5, 6, 7]], params) == engine(model).generate([[5, 6, 7]], params)


def test_progress_counts_up_to_all_completions_and_tokens(model):
    seen: list[tuple[int, int, int]] = []
    params = SamplingParams(max_tokens=6, seed=1, n=2, ignore_eos=True)
    engine(model).generate([[0, 9], [0, 8, 7]], params, lambda *news: seen.append(news))
    assert len(seen) == 6
    assert seen[0] == (0, 4, 4)
    assert seen[-1] == (4, 4, 24)


def test_statistics_add_up(model):
    counted = engine(model, max_batch_tokens=8)
    prompt = list(range(10, 23))
    params = SamplingParams(max_tokens=6, seed=1, n=2, ignore_eos=True)
    counted.generate([prompt], params)
    stats = counted.stats
    assert stats.num_generated_tokens == 12
    assert stats.num_prefix_hit_tokens == 12
    assert stats.num_run_tokens == 13 + 1 + 2 * 5
    assert (stats.num_preemptions, stats.num_drafted) == (0, 0)
    assert stats.seconds > 0
    assert stats.tokens_per_second == pytest.approx(12 / stats.seconds)


def test_without_a_seed_two_runs_differ_and_with_one_they_agree(model):
    def texts(seed: int | None) -> list[list[int]]:
        params = SamplingParams(max_tokens=20, temperature=2.0, seed=seed, ignore_eos=True, n=2)
        return [c.token_ids for c in engine(model).generate([[0, 9]], params)[0]]

    assert texts(None) != texts(None)
    assert texts(5) == texts(5)
    assert texts(5)[0] != texts(5)[1]
    assert texts(5) != texts(6)


def test_one_sampling_params_per_prompt_or_one_for_all(model):
    with pytest.raises(ValueError, match="2 prompts but 1 SamplingParams"):
        engine(model).generate([[5], [6]], [SamplingParams()])


def leave_by_abort(engine: Engine) -> None:
    engine.abort(0)


def leave_by_new_weights(engine: Engine) -> None:
    good = {name: tensor.nan_to_num(0.0) for name, tensor in engine.model.state_dict().items()}
    engine.update_weights(good)


def leave_by_a_step_that_fails(engine: Engine) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    hook = engine.model.model.layers[1].register_forward_pre_hook(interrupt)
    with suppress(KeyboardInterrupt):  # where it has failed already, there is no step to run
        engine.step()
    hook.remove()
    engine.abort(0)


@pytest.mark.parametrize("leave", [leave_by_abort, leave_by_new_weights, leave_by_a_step_that_fails])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "options", [{"max_batch_tokens": 10}, {"max_batch_tokens": 10, "num_draft_tokens": 2}, {"overlap": True}], ids=str
)
def test_rows_that_are_not_finite_spoil_nobody_however_their_sequence_leaves(options, steps, leave):
    """A poisoned prompt leaves before anything was sampled of it, or before that is known: its blocks are others'."""
    ours = build_model(CONFIG, seed=3)
    with torch.no_grad():
        ours.model.embed_tokens.weight[100] = float("nan")
    params = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    small = engine(ours, num_blocks=12, **options)
    small.add([100] * 35, params)
    for _ in range(steps):
        small.step()
    leave(small)
    prompts = [[5, 6], [7, 8, 9], [11] * 5]
    after = [group[0] for group in small.generate(prompts, params)]
    assert [c.finish_reason for c in after] == ["length"] * 3
    assert [c.token_ids for c in after] == [group[0].token_ids for group in engine(ours).generate(prompts, params)]
    while small.num_unfinished:
        small.step()
    assert_empty(small)


def test_blocks_of_a_failed_sequence_are_not_cleared_once_they_are_others():
    """It failed while a second step of its was in flight, and that one was interrupted."""
    ours = build_model(CONFIG, seed=3)
    with torch.no_grad():
        ours.model.embed_tokens.weight[100] = float("nan")
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    overlapped = engine(ours, num_blocks=12, overlap=True)
    overlapped.add([5, 6, 100], params)
    overlapped.add([5, 6, 7], params)
    for _ in range(2):
        overlapped.step()
    leave_by_a_step_that_fails(overlapped)
    events = [event for _ in range(25) for event in overlapped.step()]
    (completion,) = [event.completion for event in events if event.request_id == 1]
    assert completion is not None
    assert completion.token_ids == engine(ours).generate([[5, 6, 7]], params)[0][0].token_ids
    assert_empty(overlapped)
