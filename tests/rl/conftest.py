from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint
from tokenizer_families import V31, write_deepseek

from kogia.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with V3.1's template, which thinks or not."""
    root = tmp_path_factory.mktemp("hybrid")
    return save_tiny_checkpoint(root / "model", Tokenizer.load(write_deepseek(root / "tokenizer", V31)))
