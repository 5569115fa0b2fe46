import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kogia.tasks.pool import VerifyPool, count_statuses, require_scores
from kogia.tasks.synthetic import cold_start_traces
from kogia.tasks.task import Problem, Response, Verdict, load_task
from kogia.tasks.worker import read_verdict
from kogia.text.chat import Message

MODULE = """
import ctypes, gc, json, math, os, resource, signal, socket, sys, threading, time
from kogia.tasks.task import Verdict

def say(text):
    # writes to the parent as only the worker should; finds the socket as hostile code would
    for fd in range(3, 64):
        try:
            channel = socket.socket(fileno=os.dup(fd))
            channel.getpeername()
            channel.sendall(text.encode())
        except OSError:
            pass

def say_later(text, seconds):
    if os.fork() == 0:
        time.sleep(seconds)
        say(text)
        os._exit(0)

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
            case "real-time signal": os.kill(os.getpid(), 40)
            case "no word":
                class Wordless(Exception):
                    def __str__(self): raise OSError("even this fails")
                raise Wordless
            case "kill": os.kill(os.getpid(), signal.SIGKILL)
            case "fork":
                os.fork()
                while True: time.sleep(1000)
            case "come back twice": os.fork()
            case "second answer": say_later('[%d, {"reward": 9.0}]' % problem.data["n"] + chr(10), 0.05)
            case "say":  say(problem.data["say"])
            case "say later": say_later(problem.data["say"], 0.1)
            case "allocate": return Verdict(float(len(bytes(problem.data["bytes"]))), True, "ok", {}, None)
            case "environment": return Verdict(0.0, True, "ok", {}, json.dumps(dict(os.environ)))
            case "limits":
                kinds = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE)
                return Verdict(0.0, True, "ok", {}, json.dumps([resource.getrlimit(kind)[0] for kind in kinds]))
            case "c": ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock all the while
            case "orphan":
                if os.fork() == 0: ctypes.PyDLL(None).sleep(1000)
                ctypes.PyDLL(None).sleep(1000)
            case "part": return Verdict(0.0, False, "wrong", {"x": math.nan}, None)
            case "inf": return Verdict(math.inf, True, "ok", {}, None)
            case "correct": return Verdict(0.0, math.nan, "ok", {}, None)
            case "surrogate": return Verdict(0.0, True, "ok", {"p" + chr(0xdc80): 1.0}, chr(0xd800), chr(0xdfff))
            case "long": return Verdict(0.0, True, "ok", {}, "x" * (17 << 20))
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
    bad = ["raise", "hang", "exit", "kill", "none", "sys.exit", "nan", "status", "fork", "part", "inf", "correct"]
    bad += ["real-time signal", "no word"]
    texts = [text for name in bad for text in (name, "fine", "fine")]
    with VerifyPool(spec, workers=2, timeout=1) as pool:
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
    assert "longer than 1 s" in found["hang"].detail
    assert count_statuses(verdicts) == {
        "ok": 28, "wrong": 0, "give_up": 0, "parse_fail": 0, "truncated": 0, "timeout": 2, "error": 12,
    }  # fmt: skip


@pytest.mark.parametrize("places", [(3, 4), (98, 99)])
def test_two_hanging_samples_among_a_hundred_cost_less_than_two_time_limits(spec, places):
    texts = ["fine"] * 100
    for place in places:
        texts[place] = "sleep"

    def seconds() -> float:
        with VerifyPool(spec, workers=2, timeout=1.5) as pool:
            start = time.perf_counter()
            verdicts = pool.verify_all(pairs(*texts))
            spent = time.perf_counter() - start
        assert [i for i, verdict in enumerate(verdicts) if verdict.status == "timeout"] == list(places)
        assert count_statuses(verdicts)["ok"] == 98
        return spent

    assert any(1.5 <= seconds() < 3.0 for _ in range(3))  # once more where the machine was busy


def test_slow_samples_within_the_limit_are_no_timeouts(spec):
    with VerifyPool(spec, workers=2, timeout=1) as pool:
        assert {verdict.status for verdict in pool.verify_all(pairs(*["slow"] * 24))} == {"ok"}


def test_the_pool_goes_on_after_bad_samples(spec):
    with VerifyPool(spec, workers=1, timeout=1) as pool:
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
    for timeout in (0.0, -1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ValueError, match="timeout="):
            VerifyPool("countdown", timeout=timeout)


def test_data_that_is_no_json_is_refused_with_the_problem_named(spec):
    with VerifyPool(spec, workers=1) as pool, pytest.raises(ValueError, match="problem 'x': data must hold JSON"):
        pool.verify_all([(Problem("x", (), {"n": {1, 2}}), Response("fine", 1, False))])


def forged(text, say):
    return Problem("forger", (Message("user", "q"),), {"n": 0, "say": say}), Response(text, 1, False)


VERDICT = '{"reward": 9.0, "correct": true, "status": "ok", "parts": {}, "extracted": null, "detail": ""}'
NO_PROTOCOL = [
    "null", "5", "[]", "{}", "[1]", "true", '"x"', "{", "\x00\xff", "[" * 100_000, "1" * 10_000, "x" * (17 << 20), "\n",
    '{"ready": null}', '{"ready": "boom"}', '{"begun": 0}', f"[-1, {VERDICT}]", f"[null, {VERDICT}]",
    f"[1000000, {VERDICT}]", '[0, null]', '[0, {"reward": NaN}]', f"[1.0, {VERDICT}]",
]  # fmt: skip


@pytest.mark.parametrize("how", ["say", "say later"])
def test_anything_but_the_protocol_costs_the_worker_and_nothing_else(spec, how):
    with VerifyPool(spec, workers=1, timeout=60) as pool:
        for say in NO_PROTOCOL:
            samples = [*pairs("fine"), forged(how, say + "\n"), *pairs("slow", "slow", "fine")]
            verdicts = pool.verify_all(samples)
            assert {verdict.status for verdict in [verdicts[0], *verdicts[2:]]} == {"ok"}, say[:20]
            assert max(verdict.reward for verdict in verdicts) == 1.0, say[:20]
            assert verdicts[1].status == ("error" if how == "say" else "ok"), say[:20]
            assert how == "say later" or "sent what is no answer" in verdicts[1].detail


@pytest.mark.parametrize("field", ["reward", "correct", "status", "parts", "extracted", "detail"])
@pytest.mark.parametrize("value", ["null", "[]", '"x"', "1e999", "NaN", "{}", '{"x": NaN}'])
def test_a_forged_verdict_has_all_its_fields_right_or_is_none(field, value):
    values = json.loads(VERDICT)
    values[field] = json.loads(value)
    allowed = {"extracted": ["null", '"x"'], "parts": ["{}"], "detail": ['"x"']}
    if value in allowed.get(field, []):
        assert read_verdict(values).reward == 9.0
    else:
        with pytest.raises(ValueError, match=r"no verdict|finite|status"):
            read_verdict(values)


@pytest.mark.parametrize("text", ["come back twice", "second answer"])
def test_the_second_answer_of_a_forked_child_changes_nothing(spec, text):
    with VerifyPool(spec, workers=1, timeout=60) as pool:
        for _ in range(3):
            verdicts = pool.verify_all(pairs("fine", text, *["slow"] * 3, "fine"))
            assert [(v.status, v.reward) for v in verdicts] == [("ok", 1.0)] * 6


@pytest.mark.parametrize("workers", [1, 3])
def test_an_idle_workers_death_blames_nobody(spec, workers):
    with VerifyPool(spec, workers=workers, timeout=60) as pool:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            for worker in pool._workers:
                os.kill(worker.child.process.pid, number)
            assert {verdict.status for verdict in pool.verify_all(pairs(*["fine"] * 20))} == {"ok"}


def test_an_idle_worker_that_no_longer_reads_blames_nobody(spec):
    with VerifyPool(spec, workers=1, timeout=1) as pool:
        os.kill(pool._workers[0].child.process.pid, signal.SIGSTOP)
        assert {verdict.status for verdict in pool.verify_all(pairs(*["fine"] * 40))} == {"ok"}


def test_a_task_that_no_longer_loads_closes_the_pool_with_a_word(folder):
    (Path(folder) / "fading.py").write_text(MODULE)
    with VerifyPool("fading:Trap", workers=1) as pool:
        (Path(folder) / "fading.py").unlink()
        with pytest.raises(ValueError, match="could not load the task.*No module named 'fading'"):
            pool.verify_all(pairs("fine", "kill", "fine"))
        with pytest.raises(ValueError, match="closed"):
            pool.verify_all(pairs("fine"))


def test_a_check_may_not_take_all_memory(spec):
    texts = [(problem, Response("allocate", 1, False)) for problem, _ in pairs("", "", "")]
    for (problem, _), num_bytes in zip(texts, (1 << 20, 1 << 40, 1 << 21), strict=True):
        problem.data["bytes"] = num_bytes
    with VerifyPool(spec, workers=1) as pool:
        assert [v.status for v in pool.verify_all(texts)] == ["ok", "error", "ok"]
    texts[1][0].data["bytes"] = 300 << 20
    for memory, status in ((200 << 20, "error"), (400 << 20, "ok")):
        with VerifyPool(spec, workers=1, memory=memory) as pool:
            verdict = pool.verify_all(texts)[1]
        assert verdict.status == status
        assert status == "ok" or "MemoryError" in verdict.detail


def test_every_worker_is_limited_and_sees_no_environment(spec, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    with VerifyPool(spec, workers=1, timeout=3) as pool:
        limits, environment = pool.verify_all(pairs("limits", "environment"))
    space, cpu, core = json.loads(limits.extracted)
    assert 2 << 30 < space < 3 << 30
    assert 12 <= cpu < 60
    assert core == 0
    assert json.loads(environment.extracted).keys() <= {
        "LC_CTYPE", "LD_LIBRARY_PATH", "TZ", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOMP_SPINCOUNT",
    }  # fmt: skip


def test_strings_that_no_file_can_hold_come_back_as_escapes(spec):
    with VerifyPool(spec, workers=1) as pool:
        (verdict,) = pool.verify_all(pairs("surrogate"))
    assert verdict == Verdict(0.0, True, "ok", {"p\\udc80": 1.0}, "\\ud800", "\\udfff")


def test_an_answer_without_end_is_an_error(spec):
    with VerifyPool(spec, workers=1, timeout=60) as pool:
        assert [v.status for v in pool.verify_all(pairs("fine", "long", "fine"))] == ["ok", "error", "ok"]


@pytest.mark.parametrize("verdicts", [["error"] * 8, ["timeout"] * 20, ["ok"] + ["error", "timeout"] * 5])
def test_a_verifier_that_nearly_always_fails_is_named_with_its_first_failure(verdicts):
    made = [Verdict(0.0, status == "ok", status, {}, None, f"{i}: {status}") for i, status in enumerate(verdicts)]
    first = next(v.detail for v in made if v.status != "ok")
    with pytest.raises(ValueError, match=rf"task 'mine:Task': \d+ of \d+ checks failed, the first with '{first}'"):
        require_scores("mine:Task", made)


@pytest.mark.parametrize("verdicts", [["error"] * 7, ["wrong"] * 20, ["ok"] * 2 + ["error"] * 10, []])
def test_a_verifier_that_works_now_and_then_is_let_be(verdicts):
    require_scores("mine:Task", [Verdict(0.0, False, status, {}, None) for status in verdicts])


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
@pytest.mark.parametrize("text", ["hang", "sleep", "c", "orphan"])
def test_workers_that_hang_end_with_their_parent(folder, signal_name, text):
    """A script without a __main__ guard, as users write them; Ctrl-C in the middle of a hanging verify.

    "c" and "orphan" hang in C with the interpreter's lock held, the latter in a forked child too.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, folder, text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    time.sleep(0.3)
    groups = {os.getpgid(worker) for worker in workers}
    process.send_signal(getattr(signal, signal_name))
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") <= 1  # the script's own KeyboardInterrupt and nothing from the workers
    deadline = time.monotonic() + 60
    while (left := _alive(groups)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _alive(groups):
    """Processes of these groups that are no zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, group = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(group) in groups and state != "Z":
                found.append(int(entry.name))
    return found
