"""The pages of the repository against its tree: what they name is there, and what they tell to type is understood."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from kogia.cli import COMMANDS
from kogia.config import parse_args, resolve

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "checkpoints/kogia-nano", "reproductions/kogia-nano")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
NAMED = re.compile(r"`([\w-]+/[\w./-]+\.(?:py|cpp|h|toml|md|txt|service)|kogia/[\w/]+)`")
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
TYPED = re.compile(r"^ *(?:\$ )?(?:\.venv/bin/)?kogia ([a-z]+)((?: .*)?)$", re.MULTILINE)


def missing_files(text):
    """Paths that `text` names, from the root, the package or the server, and that are not there."""
    bases = ROOT, ROOT / "kogia", ROOT / "kogia/serve"
    return sorted(path for path in set(NAMED.findall(text)) if not any((base / path).exists() for base in bases))


def broken_links(page, text):
    """Relative links of a page to files or headings that are not there."""
    broken = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(f"{target}#{anchor}")
    return broken


def anchors(text):
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def typed_lines(text):
    """(command, words) of each line of a block that calls kogia, but for the remark behind two blanks."""
    for language, block in BLOCK.findall(text):
        for command, rest in TYPED.findall(block) if language in ("", "bash") else ():
            yield command, shlex.split(re.split("  +", rest)[0], comments=True)


def parsed(command, words):
    return parse_args(resolve(COMMANDS[command].config), words, prog=f"kogia {command}", description="")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_links_and_command_lines_of_a_page_are_real(page):
    text = page.read_text(encoding="utf-8")
    if page.name != "CHANGELOG.md":  # which may speak of what was
        assert missing_files(text) == []
    assert broken_links(page, text) == []
    for command, words in typed_lines(text):
        if not words or not words[0].endswith(".toml"):  # a recipe that stands on the page alone
            parsed(command, words)


def test_a_page_that_is_wrong_is_seen():
    wrong = "`kogia/ops/no.py`, `ops/cache.py`, `model/mal.py`, [a](docs/no.md), [b](README.md#the-tree), [c](#no)"
    assert missing_files(wrong) == ["kogia/ops/no.py", "model/mal.py"]
    assert broken_links(ROOT / "README.md", wrong) == ["docs/no.md#", "#no"]
    (line,) = typed_lines("```\n$ kogia chat PATH --singel      # a remark\n```\n")
    assert line == ("chat", ["PATH", "--singel"])
    with pytest.raises(SystemExit):
        parsed(*line)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_layers_of_a_page_are_those_that_are_enforced(page):
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    text = re.sub(r"^ +", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert "\n".join(layers) in text
