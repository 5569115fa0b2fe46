"""One server for the tests of a module, with a model that answers in no time and ends by itself."""

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs kogia[server]")
pytest.importorskip("uvicorn", reason="needs kogia[server]")

from inference.tiny import CONFIG
from serve.server import RunningServer, serving

from kogia.checkpoint.hf import save_model
from kogia.model.transformer import build_model
from kogia.text.tokenizer import train_bpe


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    tokenizer = train_bpe(["the answer is 42. " * 20], 280)
    return save_model(build_model(CONFIG, seed=5), tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def server(model) -> RunningServer:
    with serving(model) as running:
        yield running
