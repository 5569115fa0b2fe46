from pathlib import Path

import pytest
from e2e.kogia_cli import PRETRAIN, kogia_here
from tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pretrain.toml and the run `base` that it made."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pretrain.toml").write_text(PRETRAIN)
    kogia_here(folder, "pretrain", "pretrain.toml")
    return folder
