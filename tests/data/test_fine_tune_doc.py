"""docs/fine-tune.md: its command lines and its recipe are read as a user would give them."""

import re
import shlex
import tomllib
from pathlib import Path

from kogia.config import from_dict, parse_args
from kogia.data.config import SourceConfig
from kogia.train.config import SupervisedConfig

DOC = (Path(__file__).parents[2] / "docs" / "fine-tune.md").read_text(encoding="utf-8")


def parsed(words: list[str]) -> SupervisedConfig:
    return parse_args(SupervisedConfig, words, prog="kogia sft", description="")


def test_the_command_lines_of_the_page_are_complete():
    lines = [shlex.split(line)[2:] for line in re.findall(r"^kogia sft --.*$", DOC, re.MULTILINE)]
    assert len(lines) == 2
    for words in lines:
        config = parsed(words)
        config.check_complete()
        assert config.data.sources == (SourceConfig("mine.jsonl"),)


def test_every_flag_of_the_page_is_one():
    required = ["--out", "o"]
    for line in re.findall(r"^\|.*\| `(--.*?)` \|$", DOC, re.MULTILINE):
        assert parsed([*required, *shlex.split(line)]) != parsed(required)


def test_the_recipe_of_the_page_is_complete():
    (recipe,) = re.findall(r"```toml\n(.*?)```", DOC, re.DOTALL)
    config = from_dict(SupervisedConfig, tomllib.loads(recipe))
    config.check_complete()
    assert [source.weight for source in config.data.sources] == [2.0, 1.0]
