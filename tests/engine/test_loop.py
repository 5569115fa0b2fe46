"""Many callers, one engine: streams side by side, in threads and in asyncio, cancelled and failing."""

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from linecache import getline
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch

from kogia.engine import loop as loop_module
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.loop import Stream
from kogia.engine.request import Completion, SamplingParams, TokenEvent
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import train_bpe

CONFIG = ModelConfig(
    vocab_size=64, dim=32, num_layers=2, ffn_dim=64, max_position=128, init_std=0.2, num_mtp_layers=1,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
)  # fmt: skip
PARAMS = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(CONFIG, seed=3)


@pytest.fixture(params=[{}, {"overlap": True}, {"num_draft_tokens": 1}], ids=str)
def engine(model, request) -> Engine:
    return Engine(model, None, EngineConfig(block_size=4, num_blocks=200, **request.param))


def alone(model: Transformer, prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    fresh = Engine(model, None, EngineConfig(block_size=4, num_blocks=200))
    return fresh.generate([prompt], params)[0][0].token_ids


def assert_empty(engine: Engine) -> None:
    assert engine.num_unfinished == engine.loop.num_unfinished == 0
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert engine.scheduler.table.num_rows_free == engine.config.max_sequences


def test_interleaved_streams_each_get_all_of_their_tokens(engine, model):
    streams = [engine.submit([5, 6, n], PARAMS) for n in range(3)]
    tokens, logprobs = [[], [], []], [[], [], []]
    iterators = [iter(stream) for stream in streams]
    going = set(range(3))
    while going:
        for i in sorted(going):
            event = next(iterators[i], None)
            if event is None:
                going.remove(i)
                continue
            tokens[i] += event.token_ids
            logprobs[i] += event.logprobs
    for i, stream in enumerate(streams):
        assert tokens[i] == stream.result()[0].token_ids == alone(model, [5, 6, i])
        assert len(logprobs[i]) == 20
        assert all(value < 0 for value in logprobs[i])
    assert_empty(engine)


def run_to_end(engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    """Steps for whoever else has a request."""
    engine.generate([prompt], params)


def test_tokens_that_come_while_nobody_waits_are_one_event_and_cost_the_steps_none(engine, model):
    stream = engine.submit([5, 6], PARAMS)
    first = next(iter(stream)).token_ids
    made = []
    event_of = engine._event
    engine._event = lambda outcome: made.append(outcome.request.id) or event_of(outcome)
    run_to_end(engine, [9], SamplingParams(max_tokens=8, ignore_eos=True, seed=1))
    assert stream.request_ids[0] not in made
    second = next(iter(stream)).token_ids
    assert len(second) >= 7
    assert (first + second) == alone(model, [5, 6])[: len(first + second)]
    rest = [token for event in stream for token in event.token_ids]
    assert first + second + rest == stream.result()[0].token_ids
    assert_empty(engine)


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"num_draft_tokens": 2}, {"num_blocks": 20}], ids=str)
@pytest.mark.parametrize("asked", [{}, {"stop": ("e", "42")}, {"logprobs": 2}], ids=str)
def test_however_seldom_events_are_taken_they_join_to_the_completions(model, options, asked):
    """Two answers each, with and without stop strings, also where sequences are sent back for want of blocks."""
    tokenizer = train_bpe(["the answer is 42. " * 20], 280)
    wide = build_model(replace(CONFIG, vocab_size=tokenizer.vocab_size), seed=3)
    engine = Engine(wide, tokenizer, EngineConfig(block_size=4, **{"num_blocks": 200, **options}))
    random = Random(5)
    for _ in range(4):
        params = SamplingParams(**{"max_tokens": 24, "n": 2, "seed": random.randrange(99), "ignore_eos": True, **asked})
        streams = [engine.submit([5, 6, n], params) for n in range(2)]
        heard: dict[int, list[TokenEvent]] = {id: [] for stream in streams for id in stream.request_ids}
        while going := [stream for stream in streams if not stream.has_ended or stream._events]:
            run_to_end(engine, [7], SamplingParams(max_tokens=random.randint(1, 9), ignore_eos=True))
            event = next(iter(random.choice(going)), None)
            if event is not None:
                heard[event.request_id].append(event)
        for stream in streams:
            for id, completion in zip(stream.request_ids, stream.result(), strict=True):
                assert [token for event in heard[id] for token in event.token_ids] == completion.token_ids
                assert "".join(event.text for event in heard[id]) == completion.text
                assert [event.completion for event in heard[id]][-1] is completion
                if completion.logprobs is not None:
                    assert [value for event in heard[id] for value in event.logprobs] == completion.logprobs
                    assert [top for event in heard[id] for top in event.top_logprobs or ()] == completion.top_logprobs
    assert_empty(engine)


def test_who_cancels_a_stream_hears_what_had_come(engine, model):
    stream = engine.submit([5, 6], PARAMS)
    next(iter(stream))
    run_to_end(engine, [9], SamplingParams(max_tokens=8, ignore_eos=True, seed=1))
    stream.cancel()
    events = list(stream)
    (completion,) = stream.result()
    assert len(completion.token_ids) >= 8
    assert completion.token_ids[1:] == [token for event in events for token in event.token_ids]
    assert events[-1].completion is completion
    assert_empty(engine)


def test_an_event_loop_is_woken_once_for_all_of_its_streams(engine):
    async def main() -> tuple[int, int]:
        streams = [engine.submit([8, n], PARAMS) for n in range(8)]
        running, calls = asyncio.get_running_loop(), 0
        call = running.call_soon_threadsafe

        def counted(*args: Any) -> asyncio.Handle:
            nonlocal calls
            calls += 1
            return call(*args)

        running.call_soon_threadsafe = counted  # type: ignore[method-assign]
        rounds = 0
        while any(not stream.has_ended for stream in streams):
            await asyncio.gather(*(stream.arrived() for stream in streams))
            rounds += 1
        return calls, rounds

    calls, rounds = asyncio.run(main())
    assert calls <= 3 * rounds
    assert_empty(engine)


def test_streams_in_threads_share_the_engine_and_its_steps(engine, model):
    found: dict[int, list[int]] = {}

    def listen(n: int) -> None:
        found[n] = [token for event in engine.submit([9, n], PARAMS) for token in event.token_ids]

    threads = [threading.Thread(target=listen, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: alone(model, [9, n]) for n in range(8)}
    assert engine.stats.num_steps < 8 * 20, "some steps must have served several streams"
    assert_empty(engine)


def test_generate_in_threads_beside_a_stream(engine, model):
    stream = engine.submit([1, 2], PARAMS)
    results: list[list[list[Completion]]] = []
    threads = [threading.Thread(target=lambda: results.append(engine.generate([[3], [4, 5]], PARAMS))) for _ in "ab"]
    for thread in threads:
        thread.start()
    heard = [token for event in stream for token in event.token_ids]
    for thread in threads:
        thread.join(60)
    assert heard == alone(model, [1, 2])
    for groups in results:
        assert [group[0].token_ids for group in groups] == [alone(model, [3]), alone(model, [4, 5])]
    assert_empty(engine)


def test_asyncio_waits_without_blocking(engine, model):
    async def listen(n: int) -> list[int]:
        return [token async for event in engine.submit([8, n], PARAMS) for token in event.token_ids]

    async def main() -> tuple[list[list[int]], list[Completion], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        heard, whole = await asyncio.gather(asyncio.gather(*(listen(n) for n in range(5))), all_of_it())
        ticking.cancel()
        return heard, whole, ticks

    async def all_of_it() -> list[Completion]:
        return await engine.submit([7], SamplingParams(max_tokens=10, n=3, seed=1, ignore_eos=True))

    heard, whole, ticks = asyncio.run(main())
    assert heard == [alone(model, [8, n]) for n in range(5)]
    assert [len(c.token_ids) for c in whole] == [10, 10, 10]
    assert ticks > 20
    assert_empty(engine)


def test_a_cancelled_stream_keeps_what_it_has_and_frees_its_blocks(engine, model):
    first, second = engine.submit([5, 6, 7], PARAMS), engine.submit([5, 6, 8], PARAMS)
    events = iter(first)
    heard = [token for _ in range(4) for token in next(events).token_ids]
    first.cancel()
    (completion,) = first.result()
    assert completion.finish_reason == "abort"
    assert completion.token_ids[: len(heard)] == heard == alone(model, [5, 6, 7])[: len(heard)]
    first.cancel()  # once more does nothing
    assert second.result()[0].token_ids == alone(model, [5, 6, 8])
    assert_empty(engine)


@pytest.mark.parametrize("in_asyncio", [False, True])
def test_who_looks_while_an_end_is_handed_over_gets_it(engine, in_asyncio):
    """The last event of a stream is not lost to a thread that sees a moment before that all have ended."""
    found: list[list[TokenEvent]] = []

    async def arrived(stream: Stream) -> list[TokenEvent]:
        news: list[TokenEvent] = []
        while more := await stream.arrived():
            news += more
        return news

    def look(stream: Stream) -> None:
        found.append(asyncio.run(arrived(stream)) if in_asyncio else list(stream))

    def looked_at(stream: Stream) -> None:
        threads.append(threading.Thread(target=look, args=(stream,)))
        threads[-1].start()
        threads[-1].join(0.1)

    threads: list[threading.Thread] = []
    engine.loop.submit([4, 5, 6], SamplingParams(max_tokens=3), on_end=looked_at).result()
    threads[0].join(5)
    assert [event.completion is not None for event in found[0]][-1:] == [True]


def test_who_walks_through_completions_is_not_disturbed_by_another_end(engine):
    walks: list[Iterator[Completion]] = []

    def walk(stream: Stream) -> None:
        walks.append(iter(stream.completions.values()))

    engine.loop.submit([4, 5, 6], SamplingParams(max_tokens=3, n=3), on_end=walk).result()
    assert [len(list(each)) for each in walks] == [1, 2, 3]


def test_cancelling_before_the_first_step_and_after_the_end(engine):
    early = engine.submit([5], PARAMS)
    early.cancel()
    assert early.result()[0].finish_reason == "abort"
    assert list(early)[-1].completion is not None
    done = engine.submit([5], PARAMS)
    done.result()
    done.cancel()
    assert done.result()[0].finish_reason == "length"
    assert_empty(engine)


def test_a_thread_may_cancel_what_another_waits_for(engine):
    stream = engine.submit([5], SamplingParams(max_tokens=100, ignore_eos=True))
    heard: list[int] = []

    def listen() -> None:
        for event in stream:
            heard.extend(event.token_ids)
            time.sleep(0.001)

    thread = threading.Thread(target=listen)
    thread.start()
    while len(heard) < 5:
        time.sleep(0.001)
    stream.cancel()
    thread.join(60)
    assert stream.result()[0].finish_reason == "abort"
    assert_empty(engine)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_step_that_fails_reaches_who_waits_and_the_others_go_on(engine, model, in_background):
    stream, other = engine.submit([5, 6], PARAMS), engine.submit([5, 7], PARAMS)

    def fail(*_) -> None:
        raise MemoryError("out of memory, say")

    hook = model.model.layers[1].register_forward_pre_hook(fail)

    async def wait() -> None:
        await stream

    with pytest.raises(MemoryError, match="say"):
        asyncio.run(wait()) if in_background else stream.result()
    hook.remove()
    if not in_background:  # the one that ran the step was told; nobody else need know
        assert other.result()[0].token_ids == alone(model, [5, 7])
    for left in (stream, other):
        left.cancel()
    engine.loop.wait(lambda: engine.loop.num_unfinished == 0)
    assert_empty(engine)


def test_requests_are_taken_while_there_is_room_and_arrive_as_they_end(engine, model):
    taken: list[int] = []

    def requests():
        for n in range(12):
            taken.append(n)
            yield [n, n + 1], SamplingParams(max_tokens=3 + n % 4, seed=1, ignore_eos=True, n=2)

    places = []
    for place, completions in engine.loop.complete(requests(), ahead=4):
        assert len(taken) <= place + 1 + 4
        assert [len(c.token_ids) for c in completions] == [3 + place % 4] * 2
        places.append(place)
    assert sorted(places) == list(range(12))
    assert_empty(engine)


def test_an_iterator_that_is_closed_leaves_nothing_behind(engine):
    iterator = engine.loop.complete([([n], PARAMS) for n in range(6)])
    next(iterator)
    iterator.close()
    assert_empty(engine)


def test_weights_are_replaced_between_steps_whoever_runs_them(model):
    ours, new = build_model(CONFIG, seed=3), build_model(CONFIG, seed=4)
    engine = Engine(ours, None, EngineConfig(block_size=4, num_blocks=200))
    stream = engine.submit([5, 6], SamplingParams(max_tokens=100, seed=1, ignore_eos=True))
    thread = threading.Thread(target=stream.result)
    thread.start()
    while engine.stats.num_generated_tokens < 5:
        time.sleep(0.001)
    engine.update_weights(new)
    thread.join(60)
    assert len(stream.result()[0].token_ids) == 100
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), new.parameters()))
    assert engine.generate([[9]], PARAMS)[0][0].token_ids == alone(new, [9])
    assert_empty(engine)


def test_an_event_loop_that_is_gone_stops_nobody(engine, model):
    """It is closed while the step is under way after which the stream it gave up would have heard of its end."""
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
    other = engine.submit([5, 7], PARAMS)

    async def give_up() -> None:
        await asyncio.wait_for(engine.submit([5, 6], PARAMS), 0.1)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(give_up())
    hook.remove()
    assert other.result()[0].token_ids == alone(model, [5, 7])
    assert_empty(engine)


def test_several_tasks_may_wait_for_one_stream(engine, model):
    async def whole(stream: Stream) -> list[int]:
        return (await stream)[0].token_ids

    async def main() -> list[list[int]]:
        stream = engine.submit([5, 6], PARAMS)
        return await asyncio.wait_for(asyncio.gather(*(whole(stream) for _ in range(3))), 30)

    assert asyncio.run(main()) == [alone(model, [5, 6])] * 3
    assert_empty(engine)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_other_streams_take_no_request_its_turn(engine, model, ahead):
    others = [engine.submit([40, n], SamplingParams(max_tokens=100, ignore_eos=True)) for n in range(6)]
    found = dict(engine.loop.complete((([n], PARAMS) for n in range(5)), ahead=ahead))
    assert {n: completions[0].token_ids for n, completions in found.items()} == {n: alone(model, [n]) for n in range(5)}
    for other in others:
        other.cancel()
    engine.loop.wait(lambda: engine.loop.num_unfinished == 0)
    assert_empty(engine)


@pytest.mark.parametrize("n", [1, 2])
def test_readers_at_any_line_find_the_last_event_of_what_has_ended_and_the_completion_of_what_they_read(engine, n):
    """They look, as another thread would, before each line that the loop runs."""
    stream = engine.submit([5, 6], replace(PARAMS, n=n))
    found: list[tuple[bool, list[TokenEvent], list[int]]] = []

    def take() -> None:
        has_ended, events = stream.has_ended, asyncio.run(stream.arrived())
        found.append((has_ended, events, list(stream.completions)))

    def look(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != loop_module.__file__:
            return None
        if event == "line" and stream._has_news() and not (found and found[-1][0]):
            reader = threading.Thread(target=take)
            reader.start()
            reader.join(20)
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        engine.loop.wait(lambda: stream.has_ended)
    finally:
        sys.settrace(before)
    for _, events, known in found:
        assert {event.request_id for event in events if event.completion is not None} <= set(known)
    ends = [event.completion for _, events, _ in found for event in events if event.completion is not None]
    assert sorted(end.token_ids for end in ends) == sorted(end.token_ids for end in stream.result())


def test_who_takes_news_while_they_are_handed_over_and_waits_again_hears_of_the_next(engine):
    """In another thread's event loop, before one after the other of the lines that the loop runs from there."""
    stream = engine.submit([5, 6], SamplingParams(max_tokens=100, ignore_eos=True))
    readers, waits, num_lines = asyncio.new_event_loop(), [], 0
    thread = threading.Thread(target=readers.run_forever, daemon=True)
    thread.start()

    async def has_news_after_waiting() -> bool:
        await stream.next()
        return stream._has_news()

    async def take() -> None:
        await stream.arrived()
        waits.append(asyncio.ensure_future(has_news_after_waiting()))
        await asyncio.sleep(0)

    def look(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != loop_module.__file__:
            return None
        if event == "line" and stream._events:
            nonlocal num_lines
            num_lines += 1
            if num_lines > len(waits) % 40:
                num_lines = 0
                asyncio.run_coroutine_threadsafe(take(), readers).result(20)
        return look

    async def all_heard() -> list[bool]:
        return await asyncio.wait_for(asyncio.gather(*waits), 20)

    before = sys.gettrace()
    sys.settrace(look)
    try:
        while not stream.has_ended:
            loop_module.ask([stream])
            seen = engine.loop.num_steps
            engine.loop.wait(lambda seen=seen: engine.loop.num_steps > seen)
    finally:
        sys.settrace(before)
    heard = asyncio.run_coroutine_threadsafe(all_heard(), readers).result(30)
    assert len(heard) > 40 and all(heard)
    readers.call_soon_threadsafe(readers.stop)
    thread.join(5)
    readers.close()


def test_who_waits_for_what_another_asks_for_hears_of_that_and_of_the_end_unasked(engine):
    async def main() -> tuple[bool, int]:
        stream = engine.submit([5, 6], SamplingParams(max_tokens=100, ignore_eos=True))
        other = engine.submit([7], PARAMS)
        await stream.arrived()
        waiting = asyncio.ensure_future(stream.next())
        await asyncio.sleep(0)
        loop_module.ask([other, stream])
        await asyncio.wait_for(waiting, 20)
        had_news, num_waits = bool(await stream.arrived()), 0
        await other
        while not stream.has_ended:
            await asyncio.wait_for(stream.next(), 20)
            num_waits += 1
        assert [event.completion is not None for event in await stream.arrived()][-1]
        return had_news, num_waits

    had_news, num_waits = asyncio.run(main())
    assert had_news and num_waits <= 2
    assert_empty(engine)


@pytest.mark.parametrize("moment", ["before the step", "within the step", "with its news there"])
def test_one_who_asks_is_brought_news_once_whenever_that_is(engine, moment):
    stream = engine.submit([5, 6], SamplingParams(max_tokens=100, ignore_eos=True))

    def ask(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is loop_module.StreamLoop._release.__code__ and event == "call" and not stream._events:
            loop_module.ask([stream])

    def run_steps(count: int) -> None:
        last = engine.loop.num_steps + count
        engine.loop.wait(lambda: engine.loop.num_steps >= last)

    if moment == "before the step":
        loop_module.ask([stream])
    before = sys.gettrace()
    sys.settrace(ask if moment == "within the step" else before)
    try:
        engine.loop.wait(lambda: bool(stream._events))
    finally:
        sys.settrace(before)
    if moment == "with its news there":
        loop_module.ask([stream])
    assert asyncio.run(stream.arrived())
    run_steps(5)
    assert not stream._events
    loop_module.ask([stream])
    assert len(asyncio.run(stream.arrived())) == 1
    stream.cancel()


@contextmanager
def interrupted_at(line: int, package: Path) -> Iterator[None]:
    """Ctrl-C before the `line`-th line that runs in files of `package`.

    Not before those of a `with`, which Python traces once more where it is left, and where no signal can come.
    """
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(str(package)):
            return None
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def generate_in_a_thread(engine: Engine) -> list[int] | None:
    """What a request comes to, or None if nothing has come after 20 seconds."""
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(engine.generate([[9]], PARAMS)[0][0].token_ids), daemon=True)
    thread.start()
    thread.join(20)
    return found[0] if found else None


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"num_draft_tokens": 2}], ids=str)
def test_wherever_ctrl_c_comes_the_engine_goes_on(model, options):
    """At every 499th line of three requests, with a stream of somebody else's beside them."""
    package, want, line, is_over = Path(loop_module.__file__).parent, alone(model, [9]), 1, False
    short = SamplingParams(max_tokens=2, seed=3, ignore_eos=True)
    while not is_over:
        engine = Engine(model, None, EngineConfig(block_size=4, num_blocks=12, max_sequences=2, **options))
        engine.submit([9, 8], PARAMS)
        with suppress(KeyboardInterrupt), interrupted_at(line, package):
            engine.generate([[5], [6, 7], [4] * 9], short)
            is_over = True
        assert generate_in_a_thread(engine) == want, f"interrupted at line {line}"
        engine.loop.wait(lambda loop=engine.loop: loop.num_unfinished == 0)
        assert_empty(engine)
        line += 499
    assert line > 2000
