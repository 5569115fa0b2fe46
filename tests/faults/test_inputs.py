"""A short campaign of mutated inputs; benchmarks/faults.py has the long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.inputs import TARGETS, outcome
from kogia.config import resolve

INPUTS = Path(__file__).parent / "inputs.py"
COUNT = 800


def run(*words: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(INPUTS.parents[1]), str(INPUTS.parents[2])])  # the tests, and the kogia beside them
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=280)


def test_whatever_is_read_is_read_or_refused_in_words_and_in_time():
    pytest.importorskip("gguf")
    done = run(str(INPUTS), str(COUNT), "1")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.keys() == TARGETS.keys()
    faults = {name: counts for name, counts in results.items() if counts.keys() & {"traceback", "hang"}}
    assert faults == {}, done.stderr
    shares = sum(target.share for target in TARGETS.values())
    for name, counts in results.items():
        assert counts.get("read", 0) + counts.get("refused", 0) >= COUNT * TARGETS[name].share // shares, name
    assert sum(counts.get("refused", 0) for counts in results.values()) > COUNT / 4


def exits(code: int) -> None:
    sys.exit(code)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (lambda: 5, "read"),
        (lambda: resolve("no colon"), "refused"),
        (lambda: Path("/no/such/file").read_text(), "refused"),
        (lambda: exits(2), "refused"),
        (lambda: exits(1), "traceback"),
        (lambda: {}["x"], "traceback"),
        (lambda: json.loads("{"), "traceback"),
    ],
)
def test_an_outcome_is_what_the_command_line_would_show(case, kind):
    assert outcome(case)[0] == kind


HANGING = """
import sys, tempfile, time
from pathlib import Path
from faults.inputs import TARGETS, Target, run
def make(folder):
    return lambda draw: (lambda number=draw.randrange(4): (time.sleep(100 * (number == 1)), 1 / (number - 2), exit(3)))
TARGETS["bad"] = Target(make, 1, 1.0)
found = run("bad", 12, 5, Path(tempfile.mkdtemp()))
print(dict(found.counts))
"""


def test_a_case_that_hangs_or_raises_is_counted_and_the_others_are_tried():
    done = run("-c", HANGING)
    assert done.returncode == 0, done.stderr
    counts = eval(done.stdout, {})  # noqa: S307 - a dict of numbers, printed above
    assert counts.keys() == {"hang", "traceback"}
    assert sum(counts.values()) == 12
