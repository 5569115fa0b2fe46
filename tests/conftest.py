"""Shared settings: one thread per test process, and hypothesis without deadlines.

Where CI is set, what is drawn is the same in every run: the examples of hypothesis, and the seeds of requests that
bring none. Elsewhere it is not, so that a test which depends on a draw is found.
"""

import os
import random
import signal
from types import SimpleNamespace

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell starts background jobs with Ctrl-C ignored; the tests of Ctrl-C need it to arrive
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported: they run as Python on the CPU

import pytest
import typecheck  # noqa: F401  # before kogia is imported, whose functions it has checked
from hypothesis import HealthCheck, settings

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without a seed get theirs from the name of the test where CI is set."""
    if os.environ.get("CI"):
        draw = random.Random(request.node.nodeid).randbytes
        monkeypatch.setattr("kogia.engine.request.os", SimpleNamespace(urandom=draw))
