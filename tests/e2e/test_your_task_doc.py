"""docs/your-task.md: its file and its commands, from nothing to a rising curve; and the same task in README.md."""

import json
import re
import shlex
import sys
from pathlib import Path
from statistics import fmean

import pytest
from e2e.kogia_cli import kogia_here

from kogia.log import read_metrics
from kogia.model.costs import num_params
from kogia.model.presets import preset
from kogia.train.rates import FINE_TUNING, FROM_SCRATCH, REINFORCING, default_rate

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "your-task.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^kogia .*$", DOC, re.MULTILINE)]
pytestmark = pytest.mark.timeout(900)
THREAD = {"sft": ["--threads", "1"], "rl": ["--threads", "1"], "eval": ["--threads", "1"]}
TABLE = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", DOC, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the file and the commands of the page were run, as they stand there."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_tasks.py").write_text("\n\n".join(CODE), encoding="utf-8")
    path = sys.path.copy()
    sys.modules.pop("my_tasks", None)
    try:
        for words in COMMANDS:
            if "MODEL" not in words:
                kogia_here(folder, *words, *THREAD.get(words[0], []))
        yield folder
    finally:
        sys.path[:] = path
        sys.modules.pop("my_tasks", None)


def test_the_accuracy_of_the_page_s_run_rises(folder):
    accuracy = [line["accuracy"] for line in read_metrics(folder / "runs/largest/rl") if "accuracy" in line]
    assert len(accuracy) == 25
    assert fmean(accuracy[:5]) < 0.8
    assert fmean(accuracy[-5:]) > fmean(accuracy[:5]) + 0.1
    evals = folder / "runs/largest"
    start, after = (json.loads((evals / run / "evals/Largest.json").read_text()) for run in ("start", "rl"))
    assert after["pass@1"][0] > start["pass@1"][0] + 0.1
    assert after["compare"]["pass@1"]["significant"]
    assert (evals / "report.html").exists()


def test_a_model_of_the_same_directory_takes_the_place_of_the_published_one(folder):
    (words,) = [words for words in COMMANDS if "MODEL" in words]
    words = ["runs/largest/start" if word == "MODEL" else word for word in words]
    plan, _ = kogia_here(folder, *words)
    assert "the default of reinforcement learning for" in plan


def test_no_command_of_the_page_needs_a_learning_rate():
    assert COMMANDS and not any("--optim.lr" in words for words in COMMANDS)


def test_the_table_of_rates_is_what_is_taken():
    assert len(TABLE) == 6
    for name, size, *rates in TABLE:
        model = preset(name)
        number, unit = size.split()
        assert float(number) * {"M": 1e6, "B": 1e9}[unit] == pytest.approx(num_params(model), rel=0.04)
        expected = [default_rate(kind, model) for kind in (FROM_SCRATCH, FINE_TUNING, REINFORCING)]
        assert [float(rate) for rate in rates] == expected


def test_the_readme_shows_the_page_s_task_and_no_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Your own task")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert code == CODE[0]
    commands = [shlex.split(line)[1:] for line in re.findall(r"^kogia .*$", section, re.MULTILINE)]
    assert commands == [words for words in COMMANDS if words[0] in ("sft", "rl") and "MODEL" not in words]
