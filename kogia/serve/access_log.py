"""A line of JSON for each request: who asked, what it took and how it ended. No prompt, no answer, no key.

Lines are written by a thread of their own: a disk or a pipe that is slow holds no client up. Where it falls behind for
long, lines are lost, and counted.
"""

import json
import logging
import queue
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueListener, WatchedFileHandler
from typing import Any

from kogia import log
from kogia.serve.exchange import Exchange
from kogia.serve.state import Running, ServerState

MOST_WAITING = 10_000
"""Lines that are not written yet."""


@contextmanager
def access_log(state: ServerState) -> Iterator[None]:
    """Write what `ServeConfig.access_log` says until the block ends. Raises OSError for a file that cannot be written.

    A file that was renamed, as by logrotate, is made anew.
    """
    where = state.config.access_log
    if where is None:
        yield
        return
    target = logging.StreamHandler(sys.stdout) if where == "-" else WatchedFileHandler(where, encoding="utf-8")
    waiting: queue.Queue[Any] = queue.Queue(MOST_WAITING)
    listener, num_lost = QueueListener(waiting, target), 0

    def note(exchange: Exchange) -> None:
        nonlocal num_lost
        try:
            waiting.put_nowait(logging.makeLogRecord({"msg": json.dumps(line(exchange, state.clock()))}))
        except queue.Full:
            num_lost += 1

    state.on_exchange.append(note)
    listener.start()
    try:
        yield
    finally:
        state.on_exchange.remove(note)
        listener.stop()
        target.close()
        if num_lost:
            log.warn(f"{where}: {num_lost:,} lines were lost, as they could not be written in time")


def line(exchange: Exchange, now: float) -> dict[str, Any]:
    """What is told of one request. Seconds are since it came; null is what it did not get to."""
    told = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": exchange.id,
        "key": exchange.caller,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "seconds": round(now - exchange.began, 6),
    }
    return told | _work(exchange.running, exchange.began) if exchange.running else told


def _work(running: Sequence[Running], began: float) -> dict[str, Any]:
    """What the engine did for it."""
    completions = [each for own in running for each in own.stream.completions.values()]
    firsts = [own.first_token for own in running if own.first_token is not None]
    num_answers = sum(len(own.stream.request_ids) for own in running)
    reasons = [each.finish_reason for each in completions]
    return {
        "answer": running[0].id,
        "model": running[0].model.name,
        "prompt_tokens": sum(len(own.prompt_ids) for own in running),
        "cached_tokens": sum(own.num_cached for own in running),
        "completion_tokens": sum(own.num_tokens for own in running),
        "queue_seconds": round(max(each.times.queue for each in completions), 6) if completions else None,
        "first_token_seconds": round(min(firsts) - began, 6) if firsts else None,
        "finish_reasons": reasons + ["abort"] * (num_answers - len(completions)),
    }
