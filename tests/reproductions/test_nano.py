"""The parts of reproductions/kogia-nano/run.py and benchmarks/nano.py; its README has the rehearsal of all of it."""

import gzip
import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kogia.checkpoint.hf import load_model, read_stored, save_model
from kogia.config import load_toml
from kogia.data.config import SourceConfig
from kogia.data.sources import read_source
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.costs import num_active_params, num_mtp_params, num_params
from kogia.model.packed import pack
from kogia.model.transformer import build_model
from kogia.prepare.config import PrepareConfig
from kogia.text.tokenizer import train_bpe
from kogia.train.config import SupervisedConfig

ROOT = Path(__file__).parent.parent.parent


def load(name: str, file: Path):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


run = load("kogia_nano_run", ROOT / "reproductions/kogia-nano/run.py")
bench = load("kogia_nano_bench", ROOT / "benchmarks/nano.py")
TINY = ModelConfig(
    vocab_size=300,
    dim=32,
    num_layers=2,
    ffn_dim=48,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
    num_mtp_layers=1,
    tie_embeddings=True,
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Books and problems in the layout that `pack` reads."""
    paragraphs = "\n\n".join(f"Paragraph {i} of a tale. " + "It was late. " * 40 for i in range(40))
    books = [
        {"id": f"books/{i}", "title": f"Book {i}", "author": "A", "year": "1900", "text": paragraphs} for i in range(60)
    ]
    solution = "She has 2+3=<<2+3=5>>5 apples.\n#### 5"
    problems = [
        {"id": f"p/{i}", "question": f" How many are 2 and {i}? ", "solution": solution, "answer": "5"}
        for i in range(3)
    ]
    problems.append(problems[0] | {"id": "p/empty", "answer": ""})
    for name, rows in (
        ("text/books_part1", books[:30]),
        ("text/books_part2", books[30:]),
        *((f"math/{name}_{split}", problems) for name in ("gsm8k", "math") for split in ("train", "test")),
    ):
        run.write_rows(tmp_path / "raw" / f"{name}.jsonl.gz", rows)
    return tmp_path / "raw"


def test_packed_books_are_whole_and_none_stands_on_both_sides(raw, tmp_path):
    for work in ("a", "b"):
        run.pack(raw, run.Job(tmp_path / work, tmp_path))
    packed = tmp_path / "a/raw"
    assert {f.name: f.read_bytes() for f in packed.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "b/raw").iterdir()
    }
    train, held_out = (run.read_rows(packed / f"books_{side}.jsonl.gz") for side in ("train", "heldout"))
    titles = [{row["title"] for row in rows} for rows in (train, held_out)]
    assert not titles[0] & titles[1]
    assert len(titles[0] | titles[1]) == 60
    assert 0 < len(titles[1]) < 12
    whole = "".join(row["text"] for row in train if row["title"] == train[0]["title"])
    original = next(run.read_rows(raw / "text/books_part1.jsonl.gz")[i]["text"] for i in range(1))
    assert whole.removesuffix("\n\n") == original
    assert max(len(row["text"]) for row in train) < run.CHUNK + 1000


def test_packed_problems_lose_calculator_marks_and_those_without_an_answer(raw, tmp_path):
    run.pack(raw, run.Job(tmp_path / "w", tmp_path))
    rows = run.read_rows(tmp_path / "w/raw/gsm8k_train.jsonl.gz")
    assert len(rows) == 3
    assert rows[0]["solution"] == "She has 2+3=5 apples."
    assert rows[0]["question"] == "How many are 2 and 0?"
    (first, *_) = read_source(SourceConfig(str(tmp_path / "w/raw/gsm8k_traces.jsonl.gz")))
    assert first.prompt[0].content == rows[0]["question"]
    assert first.text.endswith("</think>\n\n5") or first.text.endswith("</think>\n5")


def test_the_recipes_are_a_model_that_fits_and_a_twin_of_as_many_active_parameters():
    base = load_toml(run.HERE / "base.toml", SupervisedConfig)
    sft = load_toml(run.HERE / "sft.toml", SupervisedConfig)
    for name in ("prepare", "sft_data"):
        load_toml(run.HERE / f"{name}.toml", PrepareConfig).check_complete()
    base.check_complete()
    sft.check_complete()
    assert base.model is not None
    twin = replace(base.model, moe=None)
    assert num_active_params(base.model) == pytest.approx(num_active_params(twin), rel=0.01)
    assert 12e6 < num_active_params(base.model) < 25e6
    total = num_params(base.model) + num_mtp_params(base.model)
    embedding = base.model.vocab_size * base.model.dim
    assert total + embedding + 2**20 < 56 * 2**20  # a byte each, two of the embedding, and the rest


def test_the_twin_has_the_recipe_of_the_base_in_all_but_its_experts(tmp_path):
    recipes = []
    for name in ("base", "dense"):
        job = run.Job(tmp_path, tmp_path, until=0.0)  # out of time: nothing runs, the recipe is written
        assert run.train(job, name) is False
        recipes.append(load_toml(tmp_path / f"recipes/{name}.toml", SupervisedConfig))
    base, dense = recipes
    assert dense.model == replace(base.model, moe=None)
    assert replace(dense, model=base.model, out=base.out) == base
    assert base.data.sources[0].spec == str(tmp_path / "data")


def test_a_stage_is_told_to_stop_in_time_and_its_seconds_are_kept(tmp_path, monkeypatch):
    until = time.monotonic() + run.GRACE + 0.3
    job = run.Job(tmp_path, tmp_path, until=until)
    monkeypatch.setitem(run.STAGES, "measure", lambda job: run.call(job, ["-c", "import time; time.sleep(60)"]))
    assert run.run_stage("measure", job) is False
    kept = json.loads((tmp_path / "stages.json").read_text())["measure"]
    assert kept["done"] is False
    assert 0.2 < kept["seconds"] < 20
    monkeypatch.setitem(run.STAGES, "measure", lambda job: run.call(job, ["-c", "pass"]))
    assert run.run_stage("measure", run.Job(tmp_path, tmp_path)) is True
    again = json.loads((tmp_path / "stages.json").read_text())["measure"]
    assert again["done"]
    assert again["seconds"] > kept["seconds"]
    with pytest.raises(run.subprocess.CalledProcessError):
        run.call(run.Job(tmp_path, tmp_path), ["-c", "raise SystemExit(2)"])


def test_an_exported_model_is_the_same_without_copies_in_small_files(tmp_path, monkeypatch):
    model = build_model(TINY, device="cpu", dtype=torch.float32, seed=0)
    save_model(model, tmp_path / "whole")
    monkeypatch.setattr(run, "SHARD_BYTES", 20_000)
    (tmp_path / "small").mkdir()
    run.without_copies(tmp_path / "whole", tmp_path / "small")
    assert json.loads((tmp_path / "small/generation_config.json").read_text())["do_sample"] is False
    files = list((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 2
    names = json.loads((tmp_path / "small/model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.endswith((".2.embed_tokens.weight", "shared_head.head.weight")) for name in names)
    again = load_model(read_stored(tmp_path / "small"), device="cpu", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_card_has_every_figure_put_in(tmp_path):
    (tmp_path / "data").mkdir()
    source = {
        "spec": "raw/books.jsonl.gz",
        "documents": 9,
        "removed": {"equal": 2, "empty": 0},
        "tokens": 70,
        "epochs": 6.0,
    }
    (tmp_path / "data/report.json").write_text(json.dumps({"sources": [source]}))
    (tmp_path / "stages.json").write_text(json.dumps({"base": {"seconds": 60.0, "watt_hours": 5.0, "done": True}}))
    ids = ("nano-parameters", "nano-active-parameters", "nano-tokens", "nano-bpb-ratio")
    rows = [{"id": id, "value": 1e6, "low": 0.9, "high": 1.1, "unit": "u"} for id in ids]
    figures = {"rows": rows, "hardware": {"gpus": ["A GPU"], "cpu": "c"}, "commit": "abc", "date": "2026-01-01"}
    (tmp_path / "nano.json").write_text(json.dumps(figures))
    text = run.card(run.Job(tmp_path, tmp_path))
    assert "{{" not in text
    for said in ("5 Wh", "A GPU", "| books.jsonl.gz | 9 | 2 equal | 70 | 6 |", "nano-bpb-ratio", "1 minutes"):
        assert said in text


def test_bits_of_a_piece_are_those_of_its_windows_each_token_once(tmp_path):
    texts = ["a tale of two ships that met at sea, " * 3, "short", "x" * 500]
    tokenizer = train_bpe(texts * 3, 300)
    model = build_model(TINY, device="cpu", dtype=torch.float32, seed=0)
    found = bench.piece_nats(model, tokenizer, texts, 16)
    for ids, nats in zip(tokenizer.encode_documents(texts), found, strict=True):
        windows = [ids[i : i + 16] for i in range(0, len(ids) - 1, 15)]
        assert sum(len(window) - 1 for window in windows) == len(ids) - 1
        expected = sum(-model.logprobs(pack([window])).sum().item() for window in windows)
        assert nats == pytest.approx(expected, rel=1e-4)


def test_the_interval_of_a_ratio_is_that_of_pairs():
    rng = np.random.default_rng(1)
    twin = rng.uniform(100, 900, 50)
    ours = 0.97 * twin + rng.normal(0, 1, 50)
    low, high = bench.resampled(lambda i: ours[i].sum() / twin[i].sum(), 50)
    assert 0.965 < low < 0.97 < high < 0.975
    assert bench.by_book(["a"] * 25 + ["b"] * 25, ours, twin).keys() == {"a", "b"}


def test_rows_are_written_as_they_are_read(tmp_path):
    run.write_rows(tmp_path / "x.jsonl.gz", [{"text": "a\u2028b\nc"}])
    assert run.read_rows(tmp_path / "x.jsonl.gz") == [{"text": "a\u2028b\nc"}]
    assert gzip.decompress((tmp_path / "x.jsonl.gz").read_bytes()).count(b"\n") == 1
