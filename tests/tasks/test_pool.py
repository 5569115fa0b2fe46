import os
import signal
import subprocess
import sys
import time

import pytest

from kogia.tasks.pool import VerifyPool, count_statuses
from kogia.tasks.synthetic import cold_start_traces
from kogia.tasks.task import Problem, Response, Verdict, load_task
from kogia.text.chat import Message

MODULE = """
import os, signal, sys, time
from kogia.tasks.task import Verdict

class Trap:
    name = "trap"
    def __init__(self, torch_forbidden: bool = True): pass
    def problems(self, split): return []
    def verify(self, problem, response):
        match response.text:
            case "raise": raise KeyError("no such thing")
            case "hang":
                while True: pass
            case "sleep": time.sleep(1000)
            case "slow": time.sleep(0.1)
            case "exit": os._exit(3)
            case "sys.exit": sys.exit(0)
            case "kill": os.kill(os.getpid(), signal.SIGKILL)
            case "fork":
                os.fork()
                while True: time.sleep(1000)
            case "none": return None
            case "nan": return Verdict(float("nan"), False, "wrong", {}, None)
            case "status": return Verdict(0.0, False, "splendid", {}, None)
            case "print": print("noise " * 100000)
            case "torch": return Verdict(0.0, "torch" in sys.modules, "ok", {}, None)
        seen = f"{problem.id} {problem.data['n']} {problem.messages[0].content}"
        return Verdict(1.0, True, "ok", {"accuracy": 1.0}, seen)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "pool_traps.py").write_text(MODULE)
    return str(folder)


@pytest.fixture(scope="module")
def spec(folder):
    sys.path.insert(0, folder)
    yield "pool_traps:Trap"
    sys.path.remove(folder)


def pairs(*texts):
    return [
        (Problem(f"p{i}", (Message("user", f"q{i}"),), {"n": i}), Response(text, 1, False))
        for i, text in enumerate(texts)
    ]


def test_verdicts_come_back_in_order_and_equal_the_direct_ones():
    samples = [
        (problem, Response(text, 9, i % 7 == 0))
        for i, (problem, text) in enumerate(cold_start_traces(300, 0, num_problems=200))
    ]
    task = load_task("countdown", {"format_weight": 0.1})
    with VerifyPool("countdown", {"format_weight": 0.1}, workers=2) as pool:
        assert pool.verify_all(samples) == [task.verify(*sample) for sample in samples]
        assert pool.verify_all([]) == []
        assert pool.verify_all(samples[:1]) == [task.verify(*samples[0])]


def test_each_bad_sample_costs_only_itself(spec):
    bad = ["raise", "hang", "exit", "kill", "none", "sys.exit", "nan", "status", "fork"]
    texts = [text for name in bad for text in (name, "fine", "fine")]
    with VerifyPool(spec, workers=2, timeout=0.5) as pool:
        verdicts = pool.verify_all(pairs(*texts))
    found = {text: verdict for text, verdict in zip(texts, verdicts, strict=True) if text != "fine"}
    good = [verdict for text, verdict in zip(texts, verdicts, strict=True) if text == "fine"]
    assert {verdict.status for verdict in good} == {"ok"}
    assert verdicts[1] == Verdict(1.0, True, "ok", {"accuracy": 1.0}, "p1 1 q1")
    statuses = {name: verdict.status for name, verdict in found.items()}
    assert statuses == dict.fromkeys(bad, "error") | {"hang": "timeout", "fork": "timeout"}
    assert all((verdict.reward, verdict.correct, verdict.parts) == (0.0, False, {}) for verdict in found.values())
    assert "KeyError: 'no such thing'" in found["raise"].detail
    assert "exit code 3" in found["exit"].detail
    assert "SIGKILL" in found["kill"].detail
    assert "returned NoneType, must return a Verdict" in found["none"].detail
    assert "longer than 0.5 s" in found["hang"].detail
    assert count_statuses(verdicts) == {
        "ok": 18, "wrong": 0, "give_up": 0, "parse_fail": 0, "truncated": 0, "timeout": 2, "error": 7,
    }  # fmt: skip


@pytest.mark.parametrize("places", [(3, 4), (98, 99)])
def test_two_hanging_samples_among_a_hundred_cost_less_than_two_time_limits(spec, places):
    texts = ["fine"] * 100
    for place in places:
        texts[place] = "sleep"
    with VerifyPool(spec, workers=2, timeout=1.5) as pool:
        start = time.perf_counter()
        verdicts = pool.verify_all(pairs(*texts))
        seconds = time.perf_counter() - start
    assert [i for i, verdict in enumerate(verdicts) if verdict.status == "timeout"] == list(places)
    assert count_statuses(verdicts)["ok"] == 98
    assert 1.5 <= seconds < 3.0


def test_slow_samples_within_the_limit_are_no_timeouts(spec):
    with VerifyPool(spec, workers=2, timeout=0.6) as pool:
        assert {verdict.status for verdict in pool.verify_all(pairs(*["slow"] * 16))} == {"ok"}


def test_the_pool_goes_on_after_bad_samples(spec):
    with VerifyPool(spec, workers=1, timeout=0.3) as pool:
        for _ in range(2):
            assert [verdict.status for verdict in pool.verify_all(pairs("hang", "fine"))] == ["timeout", "ok"]


def test_prints_of_a_task_do_no_harm(spec):
    with VerifyPool(spec, workers=1) as pool:
        assert [verdict.status for verdict in pool.verify_all(pairs("print", "fine"))] == ["ok", "ok"]


def test_workers_do_not_import_torch(spec):
    with VerifyPool(spec, workers=1) as pool:
        assert not pool.verify_all(pairs("torch"))[0].correct


def test_a_warm_pool_is_fast():
    samples = [(problem, Response(text, 9, False)) for problem, text in cold_start_traces(512, 1, num_problems=200)]
    with VerifyPool("countdown", workers=2) as pool:
        pool.verify_all(samples)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            pool.verify_all(samples)
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3  # 0.02 s when the machine is free; the type checks of the test run slow this side down


def test_processes_end_when_the_pool_is_closed(spec):
    pool = VerifyPool(spec, workers=2)
    ids = [worker.child.process.pid for worker in pool._workers]
    pool.close()
    pool.close()
    for process in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    with pytest.raises(ValueError, match="closed"):
        pool.verify_all(pairs("fine"))


def test_a_wrong_task_or_option_is_reported_at_once():
    with pytest.raises(ValueError, match="did you mean 'numbers'"):
        VerifyPool("countdown", {"number": 3})
    with pytest.raises(ValueError, match="workers=0"):
        VerifyPool("countdown", workers=0)


def test_data_that_is_no_json_is_refused_with_the_problem_named(spec):
    with VerifyPool(spec, workers=1) as pool, pytest.raises(ValueError, match="problem 'x': data must hold JSON"):
        pool.verify_all([(Problem("x", (), {"n": {1, 2}}), Response("fine", 1, False))])


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Problem, Response
pool = VerifyPool("pool_traps:Trap", workers=2, timeout=100)
print(*[worker.child.process.pid for worker in pool._workers], flush=True)
pool.verify_all([(Problem("p", (), {}), Response("hang", 1, False))] * 2)
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_workers_that_hang_end_with_their_parent(folder, signal_name):
    """A script without a __main__ guard, as users write them; Ctrl-C in the middle of a hanging verify."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    time.sleep(0.3)
    process.send_signal(getattr(signal, signal_name))
    _, errors = process.communicate(timeout=10)
    assert errors.count("Traceback") <= 1  # the script's own KeyboardInterrupt and nothing from the workers
    deadline = time.monotonic() + 5
    while any(_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(worker) for worker in workers)


def _alive(process):
    try:
        with open(f"/proc/{process}/stat") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
