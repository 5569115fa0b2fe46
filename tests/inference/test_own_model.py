"""`kogia chat`, `generate` and `serve` without a path."""

import pytest

from kogia.checkpoint import own
from kogia.inference.config import ChatConfig, GenerateConfig
from kogia.serve.config import ServeConfig

COMMANDS = (ChatConfig, GenerateConfig, ServeConfig)


@pytest.mark.parametrize("cls", COMMANDS)
def test_without_a_path_the_model_of_the_checkout_is_taken_and_a_named_one_before_it(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / own.OWN).mkdir(parents=True)
    (tmp_path / own.OWN / "config.json").write_text("{}")
    assert cls().path == own.OWN
    assert cls("other").path == "other"


@pytest.mark.parametrize("cls", COMMANDS)
def test_where_there_is_none_the_error_says_what_to_name(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "OWN", "checkpoints/nobodys")
    with pytest.raises(ValueError, match=r"no model is named, and there is no checkpoints/nobodys here or in .*name a"):
        cls()
