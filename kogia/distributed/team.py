"""Rank 0's side of a group: the processes of the other ranks, what they are told, and what happens when one ends.

Every other rank is an interpreter of `kogia.process`, started for the purpose and bound to this process. It is told
what to do over a socket of its own, in order, and answers only when it is ready, or when it fails. A rank that ends
ends the team: the others could only wait for it, in the middle of a sum.
"""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from kogia.process import Child

START_SECONDS = 300.0
"""For importing torch, which can take long on a busy machine, and for reading a model."""
BLAME_SECONDS = 5.0


class Team:
    """The ranks from 1 on, each running `main(socket)` of a module: see `Told`.

    Messages are pickled; both sides are this program. Close it; it also ends with this process.
    """

    def __init__(self, module: str, size: int) -> None:
        self.size = size
        self.failure: str | None = None
        """Why the team has ended."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called, in a thread of the team's, when a rank has ended by itself."""
        self._folder = tempfile.mkdtemp(prefix="kogia-team-")
        self.meeting_place = str(Path(self._folder) / "ranks")
        """A file for `kogia.distributed.group.join`."""
        self._changed = threading.Condition()
        self._said = dict.fromkeys(range(1, size), "")
        self._children: list[Child] = []
        self._connections: list[Connection] = []
        try:
            for rank in range(1, size):
                self._children.append(Child(module, stdout=2, env=os.environ))
                self._connections.append(Connection(os.dup(self._children[-1].channel.fileno())))
                self._connections[-1].send((rank, size, self.meeting_place))
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._listen, name="kogia-team", daemon=True).start()

    def tell(self, *message: Any) -> None:
        """Send every rank a message. A rank that is gone is found out by `check`."""
        for connection in self._connections:
            with suppress(OSError):
                connection.send(message)

    def wait_until(self, word: str) -> None:
        """Block until all ranks have said it. Raises ChildProcessError when one ends instead."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self.failure is not None or set(self._said.values()) == {word}, START_SECONDS
            )
        self.check()
        if not done:
            late = [rank for rank, said in self._said.items() if said != word]
            self.close(f"ranks {late} did not say {word!r} within {START_SECONDS:g} s")
            self.check()

    def check(self) -> None:
        """Raise ChildProcessError when the team has ended."""
        if self.failure is not None:
            raise ChildProcessError(self._message())

    def blame(self, error: BaseException) -> None:
        """End the team for an error of rank 0 in what all ranks do: nobody can tell how far the others have come.

        Raises ChildProcessError where the error only follows from the end of another rank.
        """
        with self._changed:
            if isinstance(error, RuntimeError):  # of an exchange, which can break off before the reason is heard
                self._changed.wait_for(lambda: self.failure is not None, BLAME_SECONDS)
            follows = self.failure is not None and isinstance(error, RuntimeError)
        self.close(f"rank 0: {type(error).__name__}: {error}")
        if follows:
            raise ChildProcessError(self._message()) from error

    def close(self, reason: str = "it was closed") -> None:
        """End all ranks; harmless when called twice. The first reason stays."""
        with self._changed:
            self.failure = self.failure or reason
            self._changed.notify_all()
        for child in self._children:
            child.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _message(self) -> str:
        return f"tensor parallel over {self.size} processes has ended: {self.failure}"

    def _listen(self) -> None:
        ranks = dict(zip(self._connections, range(1, self.size)))
        while self.failure is None:
            for connection in wait(self._connections):
                assert isinstance(connection, Connection)
                self._hear(ranks[connection], connection)

    def _hear(self, rank: int, connection: Connection) -> None:
        try:
            said = connection.recv()
        except (EOFError, OSError):
            said = f"it ended ({self._children[rank - 1].exit_reason()})"
        with self._changed:
            is_news = said not in _WORDS and self.failure is None
            if is_news:
                self.failure = f"rank {rank}: {said}"
            else:
                self._said[rank] = said
            self._changed.notify_all()
        if is_news:
            self.on_failure()


HERE, READY = "here", "ready"
_WORDS = (HERE, READY)


class Told:
    """Another rank's side: messages of `Team.tell`, and the words that it says back."""

    def __init__(self, channel: int) -> None:
        self._connection = Connection(channel)
        self.rank, self.size, self.meeting_place = self.next()

    def say(self, word: str) -> None:
        """`HERE`, `READY`, or what has gone wrong, which ends the team."""
        self._connection.send(word)

    def next(self) -> tuple[Any, ...]:
        """The next message. Raises EOFError when the team is closed."""
        return self._connection.recv()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, in which the ranks move together; then it raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # who hears of no signals
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
