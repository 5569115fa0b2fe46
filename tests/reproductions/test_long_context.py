"""The parts of benchmarks/long_context.py that nothing else runs."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("kogia_long_context", BENCHMARKS / "long_context.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kogia_long_context"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


def test_pieces_of_books_are_whole_again_and_no_more_of_them_than_asked(bench, tmp_path):
    pieces = [("a#0", "one "), ("a#1", "two"), ("b#0", "three "), ("c#0", "x" * 50), ("b#1", "four"), ("d#0", "five")]
    rows = "".join(json.dumps({"id": name, "title": "T", "text": text}) + "\n" for name, text in pieces)
    (tmp_path / "pieces.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    made = bench.whole_books(tmp_path / "pieces.jsonl.gz", tmp_path / "books.jsonl.gz", 60e-6)
    assert [row["text"] for row in bench.read_rows(made)] == ["one two", "three four", "x" * 50]
    whole = bench.whole_books(tmp_path / "pieces.jsonl.gz", tmp_path / "books.jsonl.gz", 1.0)
    assert len(list(bench.read_rows(whole))) == 4
