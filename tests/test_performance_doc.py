from pathlib import Path

import pytest
from performance_doc import DOC, README, results, written


@pytest.mark.parametrize("page", [DOC, README], ids=lambda page: page.name)
def test_the_tables_of_the_performance_page_and_the_readme_are_the_committed_results(page: Path):
    assert page.read_text(encoding="utf-8") == written(page), "run python benchmarks/performance_doc.py"


def test_every_ratio_to_the_peer_that_misses_its_bar_is_named_on_the_page():
    missed = [
        id for id, row in results("engine_gpu").items() if id.endswith("-vs-vllm") and row["value"] < row["limit"]
    ]
    text = DOC.read_text(encoding="utf-8")
    assert [id for id in missed if id.removesuffix("-vs-vllm") not in text] == []
