"""docs/data-formats.md: every row on the page, and what the page says is learned from it."""

import re
from pathlib import Path

import numpy as np
import pytest

from kogia.data.config import DataConfig, SourceConfig
from kogia.data.loader import gather_batch
from kogia.data.rows import document_from_row
from kogia.data.shards import build_shards
from kogia.data.sources import read_source
from kogia.text.tokenizer import Tokenizer, train_bpe

DOC = Path(__file__).parents[2] / "docs" / "data-formats.md"
BLOCK = re.compile(r"```jsonl\n(.*?)```\n\n```(sequences|errors)\n(.*?)```", re.DOTALL)
BLOCKS = [match.groups() for match in BLOCK.finditer(DOC.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["Whales sing. Be brief. And 3+3? Add the numbers."], 300)


def shown(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    """A sequence as the page shows it."""
    text = ""
    for i, on in enumerate(mask):
        edge = "⟦" if on and not mask[i - 1] else ""
        end = "⟧" if on and not (mask[i + 1 :] or [0])[0] else ""
        text += edge + tokenizer.decode([ids[i]]) + end
    return text.replace("\n", "⏎")


def sequences(tokenizer: Tokenizer, path: Path, out: Path) -> list[str]:
    shard = build_shards(DataConfig(files=(str(path),)), tokenizer, out)["train"]
    batches = [gather_batch(shard, np.array([i])) for i in range(shard.num_sequences)]
    return [shown(tokenizer, b.tokens.token_ids.tolist(), b.loss_mask.int().tolist()) for b in batches]


def errors(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        single = path.with_name(f"{number}.jsonl")
        single.write_text("\n" * (number - 1) + line, encoding="utf-8")
        with pytest.raises(ValueError) as error:
            list(read_source(SourceConfig(str(single))))
        found.append(str(error.value).replace(str(single), "mine.jsonl"))
    return found


@pytest.mark.parametrize(("rows", "kind", "expected"), BLOCKS)
def test_the_page_shows_what_is_learned_and_what_is_refused(tmp_path, tokenizer, rows, kind, expected):
    path = tmp_path / "mine.jsonl"
    path.write_text(rows, encoding="utf-8")
    found = sequences(tokenizer, path, tmp_path / "data") if kind == "sequences" else errors(path)
    assert "\n".join(found) == expected.strip("\n")


def test_the_page_has_a_block_for_every_layout():
    rows = "".join(rows for rows, _, _ in BLOCKS)
    for column in ("text", "prompt", "completion", "messages", "conversations", "instruction", "reasoning_content"):
        assert f'"{column}": ' in rows
    with pytest.raises(ValueError, match="another layout of docs/data-formats.md"):
        document_from_row({}, "here")
