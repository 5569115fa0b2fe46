"""How a stream of events goes out: what in one call of the system, and what of it to a client that has left."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs kogia[server]")

from kogia.serve.sse import KEEP_ALIVE, WRITE, EventStream, until_gone


async def at_once() -> AsyncGenerator[bytes, None]:
    yield b"first"
    yield b"last"


async def late() -> AsyncGenerator[bytes, None]:
    await asyncio.sleep(0.2)
    yield b"first"


def sent(
    events: AsyncGenerator[bytes, None],
    keep_alive: float = 60,
    *,
    leaves: bool = False,
    scope: dict[str, Any] | None = None,
) -> list[tuple[str, int]]:
    """What is sent, and in which go of the event loop: what is written in one goes out in one call of the system."""
    found: list[tuple[str, int]] = []

    async def run() -> None:
        loop, go = asyncio.get_running_loop(), 0

        def count() -> None:
            nonlocal go
            go += 1
            loop.call_soon(count)

        async def send(message: dict[str, Any]) -> None:
            body = message.get("body", b"head")
            found.append(("end" if not message.get("more_body", True) else body.decode().strip(": \n"), go))

        async def receive() -> dict[str, str]:
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        count()
        await EventStream(events, keep_alive)(scope or {}, receive, send)  # pyright: ignore[reportArgumentType]

    asyncio.run(run())
    return found


def test_the_head_goes_out_with_the_first_chunk_and_the_end_with_the_last():
    found = sent(at_once())
    assert [what for what, _ in found] == ["head", "first", "last", "end"]
    assert len({go for _, go in found}) == 1


def test_comments_come_behind_the_head_while_a_stream_is_silent_and_none_behind_its_end():
    found = [what for what, _ in sent(late(), keep_alive=0.02)]
    comment = KEEP_ALIVE.decode().strip(": \n")
    assert found[0] == "head" and found[-2:] == ["first", "end"]
    assert len(found) > 3 and set(found[1:-2]) == {comment}


def test_a_generator_is_closed_and_says_no_more_when_its_client_has_left():
    events = late()
    assert "first" not in [what for what, _ in sent(events, leaves=True)]
    with pytest.raises(StopAsyncIteration):
        asyncio.run(anext(events))  # pyright: ignore[reportArgumentType]


def test_chunks_are_written_past_what_lies_between_where_the_connection_takes_them():
    written: list[bytes] = []

    def write(chunk: bytes) -> bool:
        if chunk == b"first":  # as where its client does not keep up
            return False
        written.append(chunk)
        return True

    found = [what for what, _ in sent(at_once(), scope={"extensions": {WRITE: write}})]
    assert found == ["head", "first", "end"] and written == [b"last"]


def test_nobody_watches_for_a_client_to_leave_before_the_work_waits():
    asked: list[str] = []

    async def receive() -> dict[str, str]:
        asked.append("receive")
        return {"type": "http.disconnect"}

    async def at_once() -> str:
        return "done"

    async def waits() -> str:
        try:
            await asyncio.sleep(20)
        finally:
            asked.append("cancelled")
        return "done"

    async def go() -> tuple[str | None, str | None, int]:
        first = await until_gone(receive, at_once())
        await asyncio.sleep(0.01)
        assert not asked
        task = asyncio.current_task()
        assert task is not None
        return first, await until_gone(receive, waits()), task.cancelling()

    assert asyncio.run(go()) == ("done", None, 0)
    assert asked == ["receive", "cancelled"]


def test_who_cancels_work_besides_is_not_taken_for_a_client_that_left():
    async def receive() -> dict[str, str]:
        await asyncio.sleep(20)
        return {"type": "http.disconnect"}

    async def go() -> None:
        task = asyncio.ensure_future(until_gone(receive, asyncio.sleep(20)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
