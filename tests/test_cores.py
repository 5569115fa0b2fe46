"""Cores: what the user names is what all threads run on, and more threads than cores is an error before any work."""

import json
import os
import subprocess
import sys

import pytest

from kogia.cli import main
from kogia.cores import check_threads, keep_to_cores, usable_cores
from kogia.inference.llm import LLM

USABLE = usable_cores()
pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no such bound")

# what `kogia --cores` does, and then products and a kernel that are worth several threads
RUN = """
import json, os, sys
from kogia.cli import _on_cores
words = _on_cores(sys.argv[1:])
import torch
torch.set_num_threads(2)
x = torch.randn(600, 600)
for _ in range(3): (x @ x).exp().sum()
masks = {int(task): sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
print(json.dumps([words, len(masks), sorted(map(list, {tuple(mask) for mask in masks.values()}))]))
"""


def run(*words: str) -> list:
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("flag", ["--cores {}", "--cores={}"])
def test_every_thread_stays_on_the_cores_that_are_named(flag):
    one = str(USABLE[-1])
    words, threads, masks = run("chat", *flag.format(one).split(), "model")
    assert words == ["chat", "model"]
    assert threads >= 2  # PyTorch's, however few cores there are
    assert masks == [[USABLE[-1]]]


def test_torch_starts_no_more_threads_than_the_cores_that_are_named():
    code = "from kogia.cli import _on_cores; _on_cores(['--cores', '%d']); import torch; print(torch.get_num_threads())"
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    command = [sys.executable, "-c", code % USABLE[0]]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=inherited).stdout == "1\n"


@pytest.fixture
def restored():
    yield
    os.sched_setaffinity(0, USABLE)


def test_spans_and_numbers_name_cores(restored):
    keep_to_cores(",".join(map(str, USABLE)))
    assert usable_cores() == USABLE
    keep_to_cores(f"{USABLE[0]}-{USABLE[0]}")
    assert usable_cores() == USABLE[:1]
    with pytest.raises(ValueError, match="this process may use"):  # what was left out stays out
        keep_to_cores(str(USABLE[-1] + 1))


def test_a_thread_that_openmp_has_bound_says_nothing_of_the_process():
    code = "import torch; torch.ones(9); from kogia.cores import check_threads, usable_cores; check_threads(%d)"
    variables = os.environ | {"OMP_PROC_BIND": "true"}
    subprocess.run([sys.executable, "-c", code % len(USABLE)], check=True, env=variables)


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "3-1", "0,,1", "0 1", "0-99999999999", "1.5", "²"])
def test_what_is_no_list_of_cores_is_refused(text):
    with pytest.raises(ValueError, match="give numbers and spans of cores, as 0-3,8"):
        keep_to_cores(text)


def test_cores_that_are_not_there_are_named_with_those_that_are(capsys):
    assert main(["doctor", "--cores", "4000-4001,4003"]) == 2
    error = capsys.readouterr().err
    assert "--cores 4000-4001,4003: this process may use " in error
    assert error.endswith(", not 4000-4001,4003\n")
    assert main(["doctor", "--cores"]) == 2
    assert "--cores: say which, as --cores 0-3" in capsys.readouterr().err
    assert usable_cores() == USABLE


@pytest.mark.parametrize(
    "command", [["chat", "m"], ["generate", "m"], ["bench", "m"], ["eval", "m", "--tasks", "x"], ["demo"]]
)
def test_more_threads_than_cores_is_an_error_before_anything_is_read(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = len(USABLE) + 1
    assert main([*command, "--threads", str(many)]) == 2
    assert f"threads = {many}: this process may use {len(USABLE)} core" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_threads_of_a_program_are_checked_before_the_model_is_looked_for():
    for threads in (0, len(USABLE) + 1):
        with pytest.raises(ValueError, match=f"threads = {threads}: this process may use .*; give 1 to {len(USABLE)}"):
            LLM("no/such/model", threads=threads)
    check_threads(None)
    check_threads(len(USABLE))
