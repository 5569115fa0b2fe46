"""The process in which `verify` runs: reads chunks of samples from a socket, answers one line per sample.

Both directions are JSON lines: what comes back may have been written by code that ran a model's output, so the parent
takes nothing but what `read_verdict` lets through. A thread reads, so that the process ends with its parent also where
the kernel does not see to it.
"""

import json
import math
import os
import queue
import resource
import socket
import threading
from collections.abc import Mapping
from typing import Any

from kogia.log import writable
from kogia.process import allow_cpu_seconds, limit_memory, limit_resource
from kogia.tasks.task import STATUSES, Problem, Response, Task, Verdict, load_task
from kogia.text.chat import Message

CPU_PER_SECOND = 4.0
"""Seconds of computing per second of the time limit: the limit ends a check first unless nobody watches it any more."""


def main(channel: socket.socket) -> None:
    """Serves the socket. First line in: the task, its options and limits. First line out: {"ready": error or null}.

    Then per chunk {"began": its first job} and per sample [job, verdict].
    """
    chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, chunks), daemon=True).start()
    setup = chunks.get()
    try:
        task = load_task(setup["spec"], setup["options"])
    except BaseException as error:
        return _send(channel, {"ready": str(error) if isinstance(error, ValueError) else describe(error)})
    limit_resource(resource.RLIMIT_CORE, 0)
    limit_memory(setup["memory"])
    _send(channel, {"ready": None})
    while True:
        _serve(channel, task, chunks.get(), setup["timeout"])


def _serve(channel: socket.socket, task: Task, chunk: list[Any], timeout: float) -> None:
    owner = os.getpid()
    _send(channel, {"began": chunk[0][0]})
    for job, problem, response in chunk:
        allow_cpu_seconds(CPU_PER_SECOND * timeout)
        verdict = judge(task, problem, response)
        if os.getpid() != owner:  # `verify` forked and its child came back too: one answer is enough
            os._exit(0)
        _send(channel, [job, verdict])


def judge(task: Task, problem: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    """One verdict as JSON values. Whatever `verify` raises or returns wrongly becomes an "error" with its reason."""
    try:
        verdict = task.verify(read_problem(problem), Response(**response))
        return write_verdict(verdict)
    except BaseException as error:  # also SystemExit, and math-verify's TimeoutException, which is no Exception
        return write_verdict(Verdict(0.0, False, "error", {}, None, describe(error)))


def describe(error: BaseException) -> str:
    """Kind and words of an exception, kept short."""
    return f"{type(error).__name__}: {error}"[:500]


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
    if verdict.correct not in (True, False):
        raise ValueError(f"correct={verdict.correct!r}: must be True or False")
    values = {
        "reward": float(verdict.reward),
        "correct": bool(verdict.correct),
        "status": verdict.status,
        "parts": {str(name): float(value) for name, value in verdict.parts.items()},
        "extracted": None if verdict.extracted is None else str(verdict.extracted),
        "detail": str(verdict.detail),
    }
    read_verdict(values)
    return values


def read_verdict(values: Any) -> Verdict:
    """The inverse of `write_verdict`, for values that anybody may have written. Raises ValueError for what is none."""
    match values:
        case {
            "reward": float() as reward,
            "correct": bool() as correct,
            "status": str() as status,
            "parts": dict() as parts,
            "extracted": str() | None as extracted,
            "detail": str() as detail,
        }:
            _check_numbers({"reward": reward, **parts})
            if status not in STATUSES:
                raise ValueError(f"status={status!r}: must be one of {', '.join(STATUSES)}")
            clean = {writable(name): value for name, value in parts.items()}
            extracted = None if extracted is None else writable(extracted)
            return Verdict(reward, correct, status, clean, extracted, writable(detail))
    raise ValueError("these values are no verdict: reward, correct, status, parts, extracted and detail make one")


def _check_numbers(numbers: Mapping[str, Any]) -> None:
    for name, value in numbers.items():
        if not isinstance(value, float) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r:.100}: must be a finite number")


def _read(channel: socket.socket, chunks: queue.SimpleQueue) -> None:
    try:
        with channel.makefile("rb") as lines:
            for line in lines:
                chunks.put(json.loads(line))
    finally:
        os._exit(0)  # the parent closed the socket or is gone, or a check left no memory to read on


def _send(channel: socket.socket, values: Any) -> None:
    channel.sendall(json.dumps(values).encode() + b"\n")
