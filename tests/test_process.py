"""Interpreters for code that is not ours: what they import, what they see, and that they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kogia.process import Child, environment, import_path

HOME = Path(__file__).parents[1]
PLANTED = (
    "json",
    "typing",
    "socket",
    "random",
    "jinja2",
    "sympy",
    "math_verify",
    "kogia",
    "sitecustomize",
    "usercustomize",
)
POOL = """
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Problem, Response
with VerifyPool("gsm8k", {"path": "questions"}, workers=1) as pool:
    print(pool.verify_all([(Problem("p", (), {"answer": "3"}), Response("x</think>\\\\boxed{3}", 1, False))])[0].status)
"""
TEMPLATE = """
from kogia.text.template import ChatTemplate
print(ChatTemplate("{{ [1] | tojson }}").render({}))
"""
FRONT = "import sys; sys.path.insert(0, '')\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A directory of modules that leave a mark when they are imported, as the current one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    monkeypatch.chdir(folder)
    return folder


def run(code, *, front):
    """Runs a script as the installed command runs: without the current directory at the front of its path.

    With `front` it comes there after kogia is loaded, as by a script in that directory.
    """
    loaded = "import kogia.tasks.pool, kogia.tasks.gsm8k, kogia.text.template\n"
    command = [sys.executable, "-P", "-c", loaded + FRONT * front + code]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(HOME)}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(("code", "printed"), [(POOL, "ok\n"), (TEMPLATE, "[1]\n")])
def test_no_module_of_the_current_directory_runs_in_place_of_an_installed_one(planted, code, printed, front):
    for split in ("train", "test"):
        (planted / "questions").mkdir(exist_ok=True)
        (planted / "questions" / f"{split}.jsonl").write_text('{"question": "1+2?", "answer": "#### 3"}\n')
    result = run(code, front=front)
    assert (result.stdout, result.returncode) == (printed, 0), result.stderr
    assert not (planted.parent / "ran").exists(), (planted.parent / "ran").read_text()


def test_a_users_task_in_the_current_directory_is_still_found(planted):
    source = (HOME / "tests" / "toy_task.py").read_text()
    (planted / "my_very_own_task.py").write_text(source)
    code = POOL.replace('"gsm8k", {"path": "questions"}', '"my_very_own_task:Hopeless"')
    result = run(code, front=False)
    assert result.stdout == "wrong\n", result.stderr


def test_the_current_directory_comes_last_whatever_put_it_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for here in ("", ".", str(tmp_path), str(tmp_path / "link"), f"{tmp_path}/"):
        monkeypatch.setattr(sys, "path", [here, "/a", "/b"])
        assert import_path() == ["/a", "/b", str(tmp_path.resolve())]
    monkeypatch.setattr(sys, "path", ["/a", "/b"])
    assert import_path() == ["/a", "/b"]


def test_next_to_nothing_of_the_environment_is_passed_on(monkeypatch):
    for name in ("HF_TOKEN", "PYTHONPATH", "LD_PRELOAD", "HOME", "PATH"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("TZ", "UTC")
    assert environment() | {"LD_LIBRARY_PATH": ""} == {
        "TZ": "UTC", "LD_LIBRARY_PATH": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip


def test_a_child_ends_once(tmp_path):
    child = Child("kogia.tasks.worker", stdout=subprocess.DEVNULL)
    assert child.process.poll() is None
    child.end()
    child.end()
    assert child.process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(child.process.pid, 0)


PARENT = """
import os, sys, threading
from kogia.text.template import ChatTemplate
template = ChatTemplate("{% for i in range(99999) %}{% for j in range(n) %}{% endfor %}{% endfor %}")
thread = threading.Thread(target=template.render, args=({"n": 0},))
thread.start()
thread.join()
template.render({"n": 0})
print(template._worker._child.process.pid, flush=True)
template.render({"n": 99999})
"""


def test_a_template_ends_with_its_program_and_not_with_the_thread_that_started_it():
    """2 s of computing are allowed; after the kill it ends at once, whatever else the machine does."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=HOME)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    computed = before = _computed(child)
    while computed == before:
        time.sleep(0.02)
        computed = _computed(child)
    parent.kill()
    parent.wait()
    while (seconds := _computed(child)) is not None:
        computed = seconds
        time.sleep(0.02)
    assert computed - before < 1.5


def _computed(process: int) -> float | None:
    """Seconds of CPU that a process has taken; None where it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else sum(map(int, fields[10:12])) / os.sysconf("SC_CLK_TCK")


def test_openmp_threads_spin_shortly_unless_the_user_says_how_they_wait():
    """Whichever way kogia comes into a program, and before anything of it loads torch."""
    for module in ("kogia", "kogia.cli", "kogia.engine.config", "kogia.tasks.task"):
        code = f"import os, sys, {module}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
        for given, seen in (({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")):
            inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
            variables = inherited | given | {"PYTHONPATH": str(HOME)}
            command = [sys.executable, "-c", code]
            assert subprocess.run(command, env=variables, capture_output=True, text=True).stdout == f"{seen} False\n"
