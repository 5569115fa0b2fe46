"""Interpreters for code that is not ours: started clean, bound to this process, killed with all they started.

A child imports nothing of the current directory or the environment before our own code, gets one socket, and a
lifeline: a pipe whose other end only this process and its forks hold. When that end closes, however this process
ended, the kernel kills the child's process group, also in the middle of a long C call.
"""

import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT_VARIABLES = ("LD_LIBRARY_PATH", "TZ")
"""All of the environment that a child sees: by the first an interpreter may find its own library."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Children are many and small, and a numerical library reserves address space for every thread it may start."""

# `-I` keeps the current directory out of these imports; kogia itself is taken from where it is here.
_START = """
import json, sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
home, path, module, channel, lifeline = json.loads(sys.argv[1])
spec = PathFinder.find_spec("kogia", [home])
sys.modules["kogia"] = kogia = module_from_spec(spec)
spec.loader.exec_module(kogia)
sys.path[:] = path
from kogia.process import serve
serve(module, channel, lifeline)
"""


class Child:
    """An interpreter that runs `main(socket)` of a module of kogia, and this side of the socket."""

    def __init__(self, module: str, *, stdout: int, env: Mapping[str, str] | None = None) -> None:
        """`env` is all of the environment that it sees: for code that is not ours next to nothing, the default."""
        self.channel, theirs = socket.socketpair()
        their_lifeline, self._lifeline = os.pipe()
        fds = (theirs.fileno(), their_lifeline)
        home = str(Path(__file__).parents[1])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps([home, import_path(), module, *fds])],
                pass_fds=fds,
                env=environment() if env is None else env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                start_new_session=True,  # keeps the terminal's Ctrl-C away and makes its children killable with it
            )
        except BaseException:
            self.channel.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(their_lifeline)

    def end(self) -> None:
        """Kills the process with its group and reaps it; harmless when called twice."""
        if self._lifeline < 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.channel.close()
        os.close(self._lifeline)
        self._lifeline = -1

    def exit_reason(self) -> str:
        """How the process ended, in words."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"exit code {code}"
        names = {number.value: number.name for number in signal.Signals}  # some of the real-time ones have none
        return f"signal {names.get(-code, -code)}"


class WorkerLost(Exception):
    """A process did not answer. The text says why, and follows the name of what it worked on."""


class LineWorker:
    """A child that is asked in JSON lines and answers each with one. The first line it gets is `setup`."""

    def __init__(self, module: str, setup: Any, *, cpu_seconds: float, wall_seconds: float) -> None:
        """The child itself sees to it that no answer takes more than `cpu_seconds`, by a timer whose signal is SIGPROF;
        `wall_seconds` only end the wait for one that does not run at all."""
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._child = Child(module, stdout=subprocess.DEVNULL)
        self.close = weakref.finalize(self, self._child.end)
        self._child.channel.settimeout(wall_seconds)
        self._replies = self._child.channel.makefile("rb")
        self._unsent = json.dumps(setup).encode() + b"\n"

    def ask(self, question: Any) -> dict[str, Any]:
        """The answer, an object. Raises WorkerLost; the worker is then of no more use."""
        request, self._unsent = self._unsent + json.dumps(question).encode() + b"\n", b""
        line = b""
        try:
            self._child.channel.sendall(request)
            line = self._replies.readline()
        except TimeoutError:
            raise WorkerLost(f"gave no answer within {self._wall_seconds:g} s") from None
        except OSError:  # its end: the exit code below says why
            pass
        if not line.endswith(b"\n"):
            raise WorkerLost(self._ending())
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(reply := json.loads(line), dict):
                return reply
        raise WorkerLost("did not answer in JSON")

    def _ending(self) -> str:
        process = self._child.process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        if process.returncode == -signal.SIGPROF:
            return f"takes more than {self._cpu_seconds:g} s of CPU time"
        return f"ended its process (exit code {process.returncode})"


def import_path() -> list[str]:
    """This process's import path with the current directory last: no file there hides an installed module."""
    here = os.path.realpath(os.getcwd())
    path = [entry for entry in sys.path if os.path.realpath(entry) != here]
    return path if len(path) == len(sys.path) else [*path, here]


def environment() -> dict[str, str]:
    """What a child sees of this process's environment: next to nothing, so neither tokens nor settings."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | ONE_THREAD


def serve(module: str, channel: int, lifeline: int) -> None:
    """The child's side: binds this process to its parent and runs the module's `main` on the socket."""
    for fd in (channel, lifeline):
        os.set_inheritable(fd, False)  # programs that the child starts have no part in them
    _bind(lifeline)
    importlib.import_module(module).main(socket.socket(fileno=channel))


def _bind(lifeline: int) -> None:
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere a child ends when it next reads its socket
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # the parent was gone before the signal was asked for
        os._exit(0)


def limit_resource(kind: int, limit: int) -> None:
    """Sets a limit of this process for good, or keeps a lower one that it already has."""
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def limit_memory(extra: int) -> None:
    """Bounds this process's address space to `extra` bytes more than it has now."""
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    limit_resource(resource.RLIMIT_AS, used + extra)


def allow_cpu_seconds(seconds: float) -> None:
    """Lets this process, and each one it starts, compute for so long from now; then the kernel kills it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
