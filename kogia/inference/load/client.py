"""One request of a load: sent, followed while it streams, and read when it has ended."""

import json
from collections.abc import Callable
from typing import Any

from kogia.inference.load.connections import Connections, Response, error_text
from kogia.inference.load.outcome import Outcome

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
DONE = b"[DONE]"
Clock = Callable[[], float]


async def follow(connections: Connections, path: str, body: dict[str, Any], began: float, clock: Clock) -> Outcome:
    """What becomes of a request. Whatever goes wrong is its `error`."""
    outcome = Outcome(began)
    try:
        await _follow(connections, path, json.dumps(body).encode(), outcome, clock)
    except (OSError, ValueError) as error:
        outcome.error = str(error) or type(error).__name__
    outcome.ended = outcome.ended or clock()
    return outcome


async def _follow(connections: Connections, path: str, body: bytes, outcome: Outcome, clock: Clock) -> None:
    response = await connections.ask("POST", path, body)
    try:
        if response.status != 200:
            raise ValueError(f"{response.status}: {error_text(await response.body())}")
        arrived = await _events(response, clock)
    finally:
        connections.release(response)
    outcome.ended = clock()
    read(arrived, outcome)


async def _events(response: Response, clock: Clock) -> list[tuple[float, bytes]]:
    """(when it came, data) of all events. They are read when all is there: nothing is done between two of them."""
    arrived, pending = [], b""
    async for part in response.parts():
        now = clock()
        *lines, pending = (pending + part).split(b"\n")
        arrived += [(now, line[5:].strip()) for line in lines if line.startswith(b"data:")]
    return arrived


def read(arrived: list[tuple[float, bytes]], outcome: Outcome) -> None:
    """Fill in what the events say. Raises ValueError for an error among them, and for a stream that breaks off."""
    has_ended, usage = False, None
    for time, data in arrived:
        if data == DONE:
            has_ended = True
            continue
        event = json.loads(data)
        if not isinstance(event, dict) or event.get("error"):
            raise ValueError(error_text(data))
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            has_ended |= bool(choice.get("finish_reason"))
            if _has_text(choice):
                outcome.times.append(time)
    if not has_ended:
        raise ValueError("the stream broke off before its end")
    usage = usage or {}
    outcome.num_prompt = usage.get("prompt_tokens") or 0
    outcome.num_output = usage.get("completion_tokens") or len(outcome.times)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))
