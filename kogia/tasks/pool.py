"""Verification in processes that can be killed: a hang or a crash in `verify` costs that sample and no other.

Every worker owns one socket and gets a chunk of samples at a time, in order; it answers each sample when it is done. So
the first unanswered sample is the one being verified, and the one to blame when the worker dies or exceeds the time
limit. While a worker is stuck, idle ones take over the rest of its chunk (`verify` is pure, the first answer counts).

Workers are started as plain `python -c`, not by `multiprocessing`: the user's main script is not imported again, needs
no `__main__` guard, and torch stays out.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from kogia.tasks.task import STATUSES, Problem, Response, Status, Verdict, load_task
from kogia.tasks.worker import write_problem

STARTUP_SECONDS = 120.0  # importing a task may mean importing much; no sample is charged for it
MAX_CHUNK = 32

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from kogia.tasks.worker import main; main(int(sys.argv[2]))"
)


class VerifyPool:
    """Verifies samples of one task in `workers` processes with a wall clock of `timeout` seconds per sample.

    Not thread-safe. Close it, or use it as a context manager; workers also end with this process, however it ends.
    """

    def __init__(
        self, spec: str, options: Mapping[str, Any] | None = None, *, workers: int = 2, timeout: float = 5.0
    ) -> None:
        if workers < 1 or timeout <= 0:
            raise ValueError(f"workers={workers}, timeout={timeout}: need at least one worker and a positive time")
        load_task(spec, options)  # a wrong name or option is reported here, not from a worker
        self.timeout = timeout
        self._stall = min(0.2, timeout / 8)
        self._setup = {"spec": spec, "options": dict(options or {})}
        self._next_job = 0
        self._workers: list[_Worker] = []
        try:
            self._workers = [_Worker(self._setup) for _ in range(workers)]
            for worker in self._workers:
                worker.wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VerifyPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills all workers; harmless when called twice."""
        while self._workers:
            self._workers.pop().kill()

    def verify_all(self, pairs: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """One verdict per pair, in order. A hanging sample gives "timeout", a raising or crashing one "error"."""
        if not self._workers:
            raise ValueError("this VerifyPool is closed; make a new one")
        batch = _Batch(self._next_job, pairs)
        self._next_job += len(pairs)  # never reused: late answers of an interrupted call match nothing
        chunk = max(1, min(MAX_CHUNK, len(pairs) // (4 * len(self._workers))))
        while batch.verdicts.keys() != batch.lines.keys():
            self._dispatch(batch, chunk)
            for worker in self._readable():
                answers, alive = worker.read()
                for job, values in answers:
                    batch.settle(job, Verdict(**values))
                if not alive:
                    self._lose(worker, batch, "error", f"the worker process died in verify: {worker.exit_reason()}")
            self._lose_overdue(batch)
        return [batch.verdicts[job] for job in batch.lines]

    def _dispatch(self, batch: "_Batch", chunk: int) -> None:
        """Gives every idle worker a chunk; with none left, what is queued behind a stalled sample."""
        for worker in self._workers:
            if not worker.ready or worker.pending:
                continue
            if not batch.waiting:
                batch.waiting.extend(filter(batch.is_open, self._behind_stalled()))
            jobs = [batch.waiting.popleft() for _ in range(min(chunk, len(batch.waiting)))]
            if jobs:
                worker.assign({job: batch.lines[job] for job in jobs})

    def _behind_stalled(self) -> list[int]:
        now = time.monotonic()
        for worker in self._workers:
            if len(worker.pending) > 1 and not worker.shared and now - worker.since > self._stall:
                worker.shared = True
                return list(worker.pending)[1:]
        return []

    def _readable(self) -> "list[_Worker]":
        """Workers with something to read, after at most the time to the next deadline or stall."""
        now = time.monotonic()
        pause = min((worker.since + self.timeout - now for worker in self._workers if worker.pending), default=1.0)
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            return [key.data for key, _ in selector.select(max(0.0, min(pause, self._stall)))]

    def _lose_overdue(self, batch: "_Batch") -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.pending and now - worker.since > self.timeout:
                self._lose(worker, batch, "timeout", f"verify took longer than {self.timeout:g} s")
            elif not worker.ready and now - worker.since > STARTUP_SECONDS:
                raise RuntimeError(f"a verification worker did not start within {STARTUP_SECONDS:g} s")

    def _lose(self, worker: "_Worker", batch: "_Batch", status: Status, detail: str) -> None:
        """Replaces a worker, blames its first unanswered sample and queues the others, unless another has them."""
        worker.kill()
        if not worker.ready:
            raise RuntimeError(f"a verification worker ended while it was starting: {worker.exit_reason()}")
        self._workers[self._workers.index(worker)] = _Worker(self._setup)
        if worker.pending:
            batch.settle(worker.pending.popleft(), Verdict(0.0, False, status, {}, None, detail))
            elsewhere = set(batch.waiting).union(*(other.pending for other in self._workers))
            batch.waiting.extend(job for job in worker.pending if batch.is_open(job) and job not in elsewhere)


def count_statuses(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many verdicts have each status; every status is present, none folded into another."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {status: counts[status] for status in STATUSES}


class _Batch:
    """The samples of one call under their job numbers, as the JSON text that goes to a worker."""

    def __init__(self, first_job: int, pairs: Sequence[tuple[Problem, Response]]) -> None:
        self.lines = {job: _encode(*pair) for job, pair in enumerate(pairs, start=first_job)}
        self.waiting = deque(self.lines)
        self.verdicts: dict[int, Verdict] = {}

    def is_open(self, job: int) -> bool:
        return job in self.lines and job not in self.verdicts

    def settle(self, job: int, verdict: Verdict) -> None:
        """Keeps the first verdict of a job of this batch."""
        if self.is_open(job):
            self.verdicts[job] = verdict


class _Worker:
    """One process and this side of its socket. `pending`: jobs it has not answered, the first being verified."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.pending: deque[int] = deque()
        self.ready = False
        self.shared = False
        self.since = time.monotonic()  # start of the sample being verified, or of the process
        self._partial = b""
        self.channel, theirs = socket.socketpair()
        with theirs:
            # An own session keeps the terminal's Ctrl-C away from it and makes its children killable with it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # a task's prints are kept out of the output of the program
                start_new_session=True,
            )
        self.channel.sendall(json.dumps(setup).encode() + b"\n")

    def wait_ready(self) -> None:
        """Blocks until the task is loaded there."""
        self.channel.settimeout(STARTUP_SECONDS)
        try:
            while not self.ready:
                if not self.read()[1]:
                    raise RuntimeError(f"a verification worker ended while it was starting: {self.exit_reason()}")
        except TimeoutError as error:
            raise RuntimeError(f"a verification worker did not start within {STARTUP_SECONDS:g} s") from error
        self.channel.settimeout(None)

    def assign(self, lines: Mapping[int, str]) -> None:
        self.pending.extend(lines)
        self.since, self.shared = time.monotonic(), False
        chunk = ",".join(f"[{job},{line[1:-1]}]" for job, line in lines.items())
        with contextlib.suppress(OSError):  # it died while idle: the next read says so
            self.channel.sendall(f"[{chunk}]\n".encode())

    def read(self) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
        """Answers that have arrived, and whether the process still lives. Blocks when there is nothing to read."""
        try:
            data = self.channel.recv(1 << 18)
        except ConnectionError:
            data = b""
        *lines, self._partial = (self._partial + data).split(b"\n")
        answers = []
        for line in lines:
            message = json.loads(line)
            self.since, self.shared = time.monotonic(), False
            if isinstance(message, dict):
                self._start(message["ready"])
                continue
            job, values = message
            head = self.pending.popleft()
            assert job == head, f"answered {job} while {head} was first"
            answers.append((job, values))
        return answers, bool(data)

    def kill(self) -> None:
        """Kills the process with its children and reaps it."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait()
        self.channel.close()

    def exit_reason(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _start(self, failure: str | None) -> None:
        if failure is not None:
            raise RuntimeError(f"a verification worker could not load the task: {failure}")
        self.ready = True


def _encode(problem: Problem, response: Response) -> str:
    try:
        return json.dumps([write_problem(problem), asdict(response)])
    except (TypeError, ValueError) as error:
        raise ValueError(f"problem {problem.id!r}: data must hold JSON values only ({error})") from error
