"""The tables of the pages on active experts and on deterministic steps are the committed results."""

import json
from pathlib import Path

import activation
import deterministic
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("benchmark", [activation, deterministic], ids=lambda module: module.__name__)
def test_the_tables_are_the_committed_results(benchmark):
    name = benchmark.__name__
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    table = text.split(benchmark.BEGIN)[1].split(benchmark.END)[0]
    assert table.strip() == benchmark.figures(result), f"run python benchmarks/{name}.py --docs docs/{name}.md"
