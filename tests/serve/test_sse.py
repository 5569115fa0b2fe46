"""How a stream of events goes out: what in one call of the system, and what of it to a client that has left."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs kogia[server]")

from kogia.serve.sse import KEEP_ALIVE, EventStream


async def at_once() -> AsyncGenerator[bytes, None]:
    yield b"first"
    yield b"last"


async def late() -> AsyncGenerator[bytes, None]:
    await asyncio.sleep(0.2)
    yield b"first"


def sent(events: AsyncGenerator[bytes, None], keep_alive: float = 60, *, leaves: bool = False) -> list[tuple[str, int]]:
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
        await EventStream(events, keep_alive)({}, receive, send)  # pyright: ignore[reportArgumentType]

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
