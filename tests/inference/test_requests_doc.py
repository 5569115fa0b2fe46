"""docs/requests.md: its blocks run, and no field is left out."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

import kogia
from kogia.engine.request import SamplingParams

DOC = (Path(__file__).parents[2] / "docs" / "requests.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


def test_every_block_of_the_page_runs(llm, monkeypatch, tmp_path):
    pytest.importorskip("llguidance", reason="formats take llguidance: pip install 'kogia[grammars]'")
    monkeypatch.setattr(kogia, "LLM", lambda _: llm, raising=False)
    script = tmp_path / "page.py"
    script.write_text("\n".join(BLOCKS), encoding="utf-8")
    runpy.run_path(str(script))


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_every_field_has_an_example(name):
    assert re.search(rf"\b{name}=", "".join(BLOCKS)), name
    assert f"`{name}`" in DOC, name
