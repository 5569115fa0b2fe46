"""Verification in processes that can be killed: a hang or a crash in `verify` costs that sample and no other.

Every worker owns one socket and gets a chunk of samples at a time, in order; it says when it begins a chunk and
answers each sample when it is done. So the first unanswered sample of a chunk that was begun is the one being verified,
and the one to blame when the worker dies or exceeds the time limit. While a worker is stuck, idle ones take over the
rest of its chunk (`verify` is pure, the first answer counts).

Workers are interpreters of `kogia.process`, not of `multiprocessing`: the user's main script is not imported again,
needs no `__main__` guard, and torch stays out.

What is contained: time, memory, crashes, prints, and anything but the protocol on the socket; a worker sees no
environment and ends with this process. What is not: files, the network, other processes of the same user, and a check
that runs a model's code in its own interpreter and is talked into a wrong verdict by it.
"""

import contextlib
import json
import selectors
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from kogia.process import Child
from kogia.tasks.task import STATUSES, Problem, Response, Status, Verdict, load_task
from kogia.tasks.worker import read_verdict, write_problem

STARTUP_SECONDS = 120.0  # importing a task may mean importing much; no sample is charged for it
MAX_CHUNK = 32
MAX_TIMEOUT = 1e6
MAX_LINE_BYTES = 16 << 20
"""Longest answer of a worker; the verdict on a sample is far shorter."""
MEMORY_BYTES = 2 << 30
"""What checks may allocate in a worker above what loading the task took."""
MIN_SAMPLES, MOST_UNJUDGED = 8, 0.9
"""`require_scores` refuses a larger share of that many samples or more."""


class VerifyPool:
    """Verifies samples of one task in `workers` processes with a wall clock of `timeout` seconds per sample.

    `memory` is what checks may allocate in a worker, in bytes above what loading the task takes.

    Not thread-safe. Close it, or use it as a context manager; workers also end with this process, however it ends.
    """

    def __init__(
        self,
        spec: str,
        options: Mapping[str, Any] | None = None,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        memory: int = MEMORY_BYTES,
    ) -> None:
        if workers < 1 or not 0 < timeout <= MAX_TIMEOUT:
            raise ValueError(
                f"workers={workers}, timeout={timeout}: need at least one worker and 0 to {MAX_TIMEOUT:g} seconds"
            )
        load_task(spec, options)  # a wrong name or option is reported here, not from a worker
        self.spec, self.timeout = spec, timeout
        self._stall = min(0.2, timeout / 8)
        self._setup = {"spec": spec, "options": dict(options or {}), "timeout": timeout, "memory": memory}
        self._next_job = 0
        self._fruitless = 0  # workers lost since the last verdict, each without a sample to blame
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
            self._workers.pop().child.end()

    def verify_all(self, pairs: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """One verdict per pair, in order. A hanging sample gives "timeout", a raising or crashing one "error"."""
        if not self._workers:
            raise ValueError("this VerifyPool is closed; make a new one")
        batch = _Batch(self._next_job, pairs)
        self._next_job += len(pairs)  # never reused: late answers of an interrupted call match nothing
        chunk = max(1, min(MAX_CHUNK, len(pairs) // (4 * len(self._workers))))
        try:
            while not batch.is_complete:
                self._dispatch(batch, chunk)
                for worker in self._readable():
                    self._receive(worker, batch)
                self._lose_overdue(batch)
        except Exception:  # no worker can be started: half a pool is of no use
            self.close()
            raise
        return [batch.verdicts[job] for job in batch.lines]

    def _receive(self, worker: "_Worker", batch: "_Batch") -> None:
        try:
            for job, verdict in worker.read():
                batch.settle(job, verdict)
                self._fruitless = 0
        except _ProtocolBroken:
            self._lose(
                worker, batch, "error", "the worker process sent what is no answer to this sample", certain=False
            )
        except _Ended as end:
            self._lose(worker, batch, "error", f"the worker process died in verify: {end}", certain=True)

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
                selector.register(worker.child.channel, selectors.EVENT_READ, worker)
            return [key.data for key, _ in selector.select(max(0.0, min(pause, self._stall)))]

    def _lose_overdue(self, batch: "_Batch") -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.pending and now - worker.since > self.timeout:
                self._lose(worker, batch, "timeout", f"verify took longer than {self.timeout:g} s", certain=True)
            elif not worker.ready and now - worker.since > STARTUP_SECONDS:
                raise RuntimeError(f"a verification worker did not start within {STARTUP_SECONDS:g} s")

    def _lose(self, worker: "_Worker", batch: "_Batch", status: Status, detail: str, *, certain: bool) -> None:
        """Replaces a worker; settles the sample to blame, queues the others unless another worker has them.

        Where the blame is not `certain`, as after a late answer by a process that an earlier sample left behind, the
        sample gets a second chance in a fresh worker. Nobody is blamed for a worker that had not begun its chunk.
        """
        worker.child.end()
        self._workers[self._workers.index(worker)] = _Worker(self._setup)
        if worker.begun and worker.pending and (certain or batch.suspect_again(worker.pending[0])):
            batch.settle(worker.pending.popleft(), Verdict(0.0, False, status, {}, None, detail))
            self._fruitless = 0
        else:
            self._count_fruitless(detail)
        elsewhere = set(batch.waiting).union(*(other.pending for other in self._workers))
        batch.waiting.extend(job for job in worker.pending if batch.is_open(job) and job not in elsewhere)

    def _count_fruitless(self, detail: str) -> None:
        """Raises RuntimeError where workers end again and again before they do anything."""
        self._fruitless += 1
        if self._fruitless > 4 * len(self._workers):
            raise RuntimeError(f"verification workers of task {self.spec!r} keep ending; the last: {detail}")


def count_statuses(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many verdicts have each status; every status is present, none folded into another."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {status: counts[status] for status in STATUSES}


def require_scores(spec: str, verdicts: Sequence[Verdict]) -> None:
    """Raises ValueError, with the first failure, where nearly all checks of a task failed: its verifier is broken."""
    failed = [verdict for verdict in verdicts if not verdict.is_judged]
    if len(verdicts) >= MIN_SAMPLES and len(failed) >= MOST_UNJUDGED * len(verdicts):
        raise ValueError(
            f"task {spec!r}: {len(failed)} of {len(verdicts)} checks failed, the first with {failed[0].detail!r}; "
            "no model can be judged by this verifier: mend its verify, or allow it more time with --verify-timeout"
        )


class _Batch:
    """The samples of one call under their job numbers, as the JSON text that goes to a worker."""

    def __init__(self, first_job: int, pairs: Sequence[tuple[Problem, Response]]) -> None:
        self.lines = {job: _encode(*pair) for job, pair in enumerate(pairs, start=first_job)}
        self.waiting = deque(self.lines)
        self.verdicts: dict[int, Verdict] = {}
        self._suspects: set[int] = set()

    @property
    def is_complete(self) -> bool:
        return len(self.verdicts) == len(self.lines)

    def suspect_again(self, job: int) -> bool:
        """Suspects a job of what befell its worker; whether it was suspected before."""
        known = job in self._suspects
        self._suspects.add(job)
        return known

    def is_open(self, job: int) -> bool:
        return job in self.lines and job not in self.verdicts

    def settle(self, job: int, verdict: Verdict) -> None:
        """Keeps the first verdict of a job of this batch."""
        if self.is_open(job):
            self.verdicts[job] = verdict


class _Ended(Exception):
    """A worker closed its side; the text says how."""


class _ProtocolBroken(Exception):
    """A worker, or what a check left running in it, sent anything but what was its turn to send."""


class _Worker:
    """One process and this side of its socket. `pending`: jobs it has not answered, the first being verified."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.pending: deque[int] = deque()
        self.ready = False
        self.begun = False
        """Whether it has taken up the chunk it was given."""
        self.shared = False
        self.since = time.monotonic()  # start of the sample being verified, or of the process
        self._timeout = setup["timeout"]
        self._partial = b""
        self.child = Child("kogia.tasks.worker", stdout=2)  # a task's prints are kept out of the output of the program
        self._send(json.dumps(setup))

    def wait_ready(self) -> None:
        """Blocks until the task is loaded there. Raises ValueError where it cannot be loaded."""
        channel, deadline = self.child.channel, self.since + STARTUP_SECONDS
        try:
            while not self.ready:
                channel.settimeout(max(0.01, deadline - time.monotonic()))
                list(self.read())
        except TimeoutError as error:
            raise RuntimeError(f"a verification worker did not start within {STARTUP_SECONDS:g} s") from error
        except _Ended as end:
            raise RuntimeError(f"a verification worker ended while it was starting: {end}") from None

    def assign(self, lines: Mapping[int, str]) -> None:
        self.pending.extend(lines)
        self.since, self.begun, self.shared = time.monotonic(), False, False
        self._send("[" + ",".join(f"[{job},{line[1:-1]}]" for job, line in lines.items()) + "]")

    def read(self) -> Iterator[tuple[int, Verdict]]:
        """Answers that have arrived; blocks while there is nothing. Raises where the worker is of no more use."""
        try:
            data = self.child.channel.recv(1 << 18)
        except ConnectionError:
            data = b""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            yield from self._take(line)
        if len(self._partial) > MAX_LINE_BYTES:
            raise _ProtocolBroken
        if not data:
            raise _Ended(self.child.exit_reason())

    def _take(self, line: bytes) -> Iterator[tuple[int, Verdict]]:
        """The answer that a line is, if it is one. A worker is ready, begins a chunk, answers its samples in turn."""
        head = self.pending[0] if self.pending else None
        match _parse(line):
            case {"ready": None} if not self.ready:
                self.ready = True
            case {"ready": str() as failure} if not self.ready:
                raise ValueError(f"a verification worker could not load the task: {failure}")
            case {"began": int() as job} if job == head and not self.begun:
                self.begun = True
            case [int() as job, values] if job == head and self.begun:
                verdict = _verdict(values)
                self.pending.popleft()
                yield job, verdict
            case _:
                raise _ProtocolBroken
        self.since, self.shared = time.monotonic(), False

    def _send(self, line: str) -> None:
        """Sends, or leaves it where the process is dead or does not read: the next read, or the clock, says so."""
        self.child.channel.settimeout(self._timeout)
        with contextlib.suppress(OSError):
            self.child.channel.sendall(line.encode() + b"\n")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise _ProtocolBroken from None


def _verdict(values: Any) -> Verdict:
    try:
        return read_verdict(values)
    except ValueError:
        raise _ProtocolBroken from None


def _encode(problem: Problem, response: Response) -> str:
    try:
        return json.dumps([write_problem(problem), asdict(response)])
    except (TypeError, ValueError) as error:
        raise ValueError(f"problem {problem.id!r}: data must hold JSON values only ({error})") from error
