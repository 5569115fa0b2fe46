"""One at a time, and callers by turns."""

import asyncio
import pkgutil
import threading
from functools import partial

import pytest
from serve.asks import HELLO, post

from kogia.serve.exchange import QUICK_BYTES
from kogia.serve.turns import Turns, in_thread


def run(asked: str, leave: tuple[int, ...] = ()) -> list[str]:
    """In which order those get their turn who ask in this one, each by the letter of its caller and its place. Those at
    the places of `leave` go before it is theirs."""

    async def work() -> list[str]:
        turns, order, most = Turns(), list[str](), 0
        inside = 0

        async def one(place: int, caller: str) -> None:
            nonlocal inside, most
            await turns.take(caller)
            inside, most = inside + 1, max(most, inside + 1)
            try:
                await asyncio.sleep(0.001)
                order.append(f"{caller}{place}")
            finally:
                inside -= 1
                turns.pass_on()

        tasks = [asyncio.ensure_future(one(place, caller)) for place, caller in enumerate(asked)]
        await asyncio.sleep(0)
        for place in leave:
            tasks[place].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 1
        await turns.take("x")
        return order

    return asyncio.run(asyncio.wait_for(work(), 5))


def test_whoever_asks_for_many_waits_for_his_own():
    assert run("aaaab") == ["a0", "a1", "b4", "a2", "a3"]
    assert run("abab") == ["a0", "b1", "a2", "b3"]


def test_those_who_leave_are_passed_over_whenever_they_do():
    assert run("aaab", leave=(1,)) == ["a0", "b3", "a2"]
    assert run("abc", leave=(0,)) == ["b1", "c2"]
    assert run("abc", leave=(0, 1, 2)) == []


def test_a_turn_that_comes_to_one_who_leaves_goes_on_to_the_next():
    async def work() -> None:
        turns = Turns()
        await turns.take("a")
        waiting = [asyncio.ensure_future(turns.take(name)) for name in "bc"]
        await asyncio.sleep(0)
        turns.pass_on()
        waiting[0].cancel()  # its turn has come, and it does not know yet
        await asyncio.sleep(0)
        await asyncio.wait_for(waiting[1], 1)

    asyncio.run(work())


def test_work_that_has_begun_keeps_its_turn_until_it_is_done_though_nobody_waits_for_it():
    async def work() -> None:
        turns, ended, given_up, done = Turns(), threading.Event(), list[str](), list[str]()

        def first() -> str:
            assert ended.wait(5)
            done.append("first")
            return "first"

        def second() -> None:
            done.append("second")

        asked = [
            asyncio.ensure_future(in_thread(first, turns, "a", give_up=given_up.append)),
            asyncio.ensure_future(in_thread(partial(done.append, "never"), turns, "a")),
            asyncio.ensure_future(in_thread(second, turns, "b")),
        ]
        await asyncio.sleep(0.01)
        for each in asked[:2]:
            each.cancel()
        await asyncio.sleep(0.05)
        assert not done and all(each.cancelled() for each in asked[:2])
        ended.set()
        await asyncio.wait_for(asked[2], 5)
        assert done == ["first", "second"] and given_up == ["first"]

    asyncio.run(work())


LONG = [{"role": "user", "content": "the answer is " * (QUICK_BYTES // 14)}]
FORMAT = {"structured_outputs": {"choice": ["42"]}}


@pytest.mark.parametrize(
    ("path", "body", "written", "begun"),
    [
        ("/v1/chat/completions", {"messages": HELLO}, ["loop"], ["loop"]),
        ("/v1/chat/completions", {"messages": LONG}, ["thread"], ["thread"]),
        ("/v1/chat/completions", {"messages": HELLO, **FORMAT}, ["loop"], ["thread"]),
        ("/v1/messages", {"messages": HELLO}, ["loop"], ["loop"]),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}, ["loop"], ["loop", "thread", "thread"]),
    ],
)
def test_what_is_quick_is_done_at_once_and_the_rest_in_threads(server, monkeypatch, path, body, written, begun):
    """A prompt of a few words, and the first request of a body without a format."""
    where = {"written": [], "begun": []}

    def noted(name, work):
        def call(*args, **kwargs):
            is_pool = threading.current_thread().name.startswith("asyncio_")
            where[name].append("thread" if is_pool else "loop")
            return work(*args, **kwargs)

        return call

    for name in ("chat.render", "openai_completions._encode"):
        monkeypatch.setattr(f"kogia.serve.{name}", noted("written", pkgutil.resolve_name(f"kogia.serve.{name}")))
    monkeypatch.setattr(server.engine, "submit", noted("begun", server.engine.submit))
    assert post(server, path, {**body, "max_tokens": 1}).status_code == 200
    assert where == {"written": written, "begun": begun}
