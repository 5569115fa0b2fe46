"""A process that has torch and kogia loaded and forks a child for every command: a kill costs no imports.

    python tests/faults/server.py       JSON lines in, one JSON line out for each

A child is a user's command: its own session, current directory, output files and exit. It can be killed at the n-th
change of the file system below its directory, which an audit hook and a counting `os.fsync` see just before it
happens, or after so many seconds. What it leaves behind comes to this process, which tells of it: a process of a
killed command that lives on is a fault.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # the tests, and the kogia beside them

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock")
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_SECONDS = 60.0
"""A worker is killed by the kernel with the command that started it; it may take so long on a busy machine."""
POLL_SECONDS = 0.002


def main() -> None:
    """Serve standard input until it ends."""
    import torch

    from kogia.cli import COMMANDS

    for command in COMMANDS.values():
        importlib.import_module(command.main.partition(":")[0])
    for late in ("torch._dynamo", "tyro", "tomli_w", "matplotlib.backends.backend_svg"):  # what else they come to need
        importlib.import_module(late)
    torch.set_num_threads(1)
    gc.freeze()  # else every child's collector would copy what it shares with this process
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to whoever asks
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Fork a child for `words` in `folder` and tell how it ended.

    `event` is the change at which it is sent `signal`, `after` the seconds until then; without both it is left alone.
    Past `limit` seconds it counts as hung.
    """
    folder = Path(job["folder"])
    out, err, trace = folder.with_suffix(".out"), folder.with_suffix(".err"), folder.with_suffix(".trace")
    trace.unlink(missing_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(job, folder, out, err, trace)
    sent, hung, status, computed = job.get("after") is None, False, None, 0.0
    while status is None:
        found, code, usage = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - began
        if found:
            status, computed = os.waitstatus_to_exitcode(code), usage.ru_utime + usage.ru_stime
        elif not sent and seconds >= job["after"]:
            os.kill(pid, job["signal"])
            sent = True
        elif seconds > job["limit"]:
            os.killpg(pid, signal.SIGKILL)
            hung = True
            job["limit"] = float("inf")
        else:
            time.sleep(POLL_SECONDS)
    return {
        "status": status,
        "hung": hung,
        "orphans": _orphans(),
        "seconds": time.monotonic() - began,
        "computed": computed,
        "out": out.read_text(errors="replace")[-20_000:],
        "err": err.read_text(errors="replace")[-20_000:],
        "events": trace.read_text().splitlines() if trace.exists() else [],
    }


def _child(job: dict[str, Any], folder: Path, out: Path, err: Path, trace: Path) -> None:
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
        os.chdir(folder)
        _watch(folder, job.get("event"), job.get("signal", signal.SIGKILL), None if job.get("quick") else trace)
        from kogia.cli import main as kogia

        status = kogia(job["words"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what the interpreter would print
        traceback.print_exc()
        status = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(folder: Path, event: int | None, number: int, trace: Path | None) -> None:
    """Count the changes below `folder`, note them in `trace`, and send this process a signal before one of them."""
    root, count, sync = f"{folder}{os.sep}", 0, os.fsync
    notes = None if trace is None else os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def change(what: str, place: str) -> None:
        nonlocal count
        count += 1
        if notes is not None:
            os.write(notes, f"{what} {place.removeprefix(root)}\n".encode(errors="replace"))
        if count == event:
            os.kill(os.getpid(), number)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif name in CHANGES:
            path = arguments[0]
        else:
            return
        place = _place(path)
        if place.startswith(root):
            change(name, place)

    def counted(descriptor: int) -> None:
        change("fsync", _place(descriptor))
        sync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)


def _place(path: Any) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    return os.path.abspath(os.fsdecode(path))


def _orphans() -> int:
    """How many processes of the last command live on; they are ended."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if found == 0 and time.monotonic() > deadline:
            break
        time.sleep(0 if found else POLL_SECONDS)
    alive = [int(pid) for pid in Path("/proc/self/task").joinpath(str(os.getpid()), "children").read_text().split()]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(alive)


if __name__ == "__main__":
    main()
