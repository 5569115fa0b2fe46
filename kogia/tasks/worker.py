"""The process in which `verify` runs: reads chunks of samples from a socket, answers one line per sample.

Both directions are JSON lines: what comes back may have been written by code that ran a model's output. A thread reads,
so that the process ends with its parent even while `verify` hangs.
"""

import json
import math
import os
import queue
import socket
import threading
from typing import Any

from kogia.tasks.task import STATUSES, Problem, Response, Task, Verdict, load_task
from kogia.text.chat import Message


def main(fd: int) -> None:
    """Serves the socket `fd`. First line in: the task and its options. First line out: {"ready": error or null}."""
    channel = socket.socket(fileno=fd)
    chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, chunks), daemon=True).start()
    setup = chunks.get()
    try:
        task = load_task(setup["spec"], setup["options"])
    except BaseException as error:
        _send(
            channel, {"ready": f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)}
        )
        return
    _send(channel, {"ready": None})
    while True:
        for job, problem, response in chunks.get():
            _send(channel, [job, judge(task, problem, response)])


def judge(task: Task, problem: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    """One verdict as JSON values. Whatever `verify` raises or returns wrongly becomes an "error" with its reason."""
    try:
        verdict = task.verify(read_problem(problem), Response(**response))
        return write_verdict(verdict)
    except BaseException as error:  # also SystemExit, and math-verify's TimeoutException, which is no Exception
        return write_verdict(Verdict(0.0, False, "error", {}, None, f"{type(error).__name__}: {error}"[:500]))


def write_problem(problem: Problem) -> dict[str, Any]:
    """A problem as JSON values."""
    messages = [[message.role, message.content, message.reasoning] for message in problem.messages]
    return {"id": problem.id, "messages": messages, "data": dict(problem.data)}


def read_problem(values: dict[str, Any]) -> Problem:
    """The inverse of `write_problem`."""
    messages = tuple(Message(*message) for message in values["messages"])
    return Problem(values["id"], messages, values["data"])


def write_verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values. Raises TypeError or ValueError for what is no proper verdict."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"verify returned {type(verdict).__name__}, must return a Verdict")
    if verdict.status not in STATUSES:
        raise ValueError(f"status={verdict.status!r}: must be one of {', '.join(STATUSES)}")
    reward = float(verdict.reward)
    if not math.isfinite(reward):
        raise ValueError(f"reward={reward}: must be finite")
    return {
        "reward": reward,
        "correct": bool(verdict.correct),
        "status": verdict.status,
        "parts": {str(name): float(value) for name, value in verdict.parts.items()},
        "extracted": None if verdict.extracted is None else str(verdict.extracted),
        "detail": str(verdict.detail),
    }


def _read(channel: socket.socket, chunks: queue.SimpleQueue) -> None:
    with channel.makefile("rb") as lines:
        for line in lines:
            chunks.put(json.loads(line))
    os._exit(0)  # the parent closed the socket or is gone


def _send(channel: socket.socket, values: Any) -> None:
    channel.sendall(json.dumps(values).encode() + b"\n")
