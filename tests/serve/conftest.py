"""One server for the tests of a module, with a model that answers in no time and ends by itself."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs kogia[server]")
pytest.importorskip("uvicorn", reason="needs kogia[server]")

from inference.tiny import CONFIG
from serve.server import RunningServer, serving

from kogia.checkpoint.hf import save_model
from kogia.model.transformer import build_model
from kogia.serve.openai_completions import HOLES
from kogia.text.tokenizer import train_bpe
from kogia.text.tools import DEEPSEEK


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    calls = DEEPSEEK.before + DEEPSEEK.write("pick", '{"n": 1}') + DEEPSEEK.write("drop", '{"n": 2}') + DEEPSEEK.after
    tokenizer = train_bpe(["the answer is 42. " * 20, calls * 20], 400)
    tokenizer.backend.add_special_tokens([mark for marks in HOLES[:1] for mark in marks])
    config = replace(CONFIG, max_position=4096, vocab_size=tokenizer.vocab_size)
    return save_model(build_model(config, seed=5), tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def server(model) -> RunningServer:
    with serving(model) as running:
        yield running
