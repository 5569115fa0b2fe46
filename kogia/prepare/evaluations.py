"""What must not be in the training documents: words in a row of evaluation items, and the search for them.

The rule is DeepSeekMath's (section 2.1): a text with 10 words in a row of an item is removed, of shorter items, from 3
words on, all of them in a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from kogia.data.config import SourceConfig, is_of_files
from kogia.data.sources import read_rows
from kogia.prepare.config import EvaluationConfig
from kogia.prepare.words import Hashes, hash_words, runs, runs_at, split_words
from kogia.tasks.task import load_task

SHORTEST = 3
"""Items of fewer words are in too many texts by chance."""

Item = tuple[str, str]
"""Where it stands, and its text."""


Hit = tuple[int, int, int]
"""(item, first word, number of words) of a run of a text that is one of an item's."""
_SPARSE = 32
"""Places in a sieve for each number that it lets through: of others it lets through about one in so many."""


class Index:
    """Runs of words that give an item away, by their length.

    A text's places are sieved by the words that a run begins with, and what is left by its whole run: a table of bits
    tells at once of nearly every place that nothing begins there.
    """

    def __init__(self, tables: dict[int, tuple[Hashes, np.ndarray]], beginnings: Hashes) -> None:
        """`tables`: length -> (sorted hashes, the item of each); `beginnings` of all these runs, `SHORTEST` words."""
        self.tables, self.beginnings = tables, beginnings
        self._begins = _sieve(beginnings)
        self._sieves = {length: _sieve(hashes) for length, (hashes, _) in tables.items()}

    def find(self, words: Hashes) -> Hit | None:
        """The first run of a text that is in the index, the longest first."""
        return self.find_each([words])[0]

    def find_each(self, texts: Sequence[Hashes]) -> list[Hit | None]:
        """`find` of many texts at once."""
        sizes = np.array([len(words) for words in texts], "int64")
        words = np.concatenate([np.zeros(0, "uint64"), *texts])
        ends = np.cumsum(sizes)
        at = np.flatnonzero(_passes(self._begins, runs(words, SHORTEST)))
        text = np.searchsorted(ends, at, side="right")
        found: list[Hit | None] = [None] * len(texts)
        lengths = sorted(self.tables)
        for length, values in zip(lengths, runs_at(words, at, lengths), strict=True):
            likely = np.flatnonzero(_passes(self._sieves[length], values) & (at + length <= ends[text]))
            hashes, items = self.tables[length]
            place = np.minimum(np.searchsorted(hashes, values[likely]), len(hashes) - 1)
            same = hashes[place] == values[likely]
            hits, place = likely[same], place[same]
            owners, firsts = np.unique(text[hits], return_index=True)
            for owner, first in zip(owners.tolist(), firsts.tolist(), strict=True):
                begin = int(at[hits[first]] - ends[owner] + sizes[owner])
                found[owner] = int(items[place[first]]), begin, length
        return found

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            arrays: dict[str, Any] = {"lengths": np.array(sorted(self.tables), "int64"), "beginnings": self.beginnings}
            for length, (hashes, items) in self.tables.items():
                arrays |= {f"h{length}": hashes, f"i{length}": items}
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> "Index":
        with np.load(path) as data:
            tables = {int(n): (data[f"h{n}"], data[f"i{n}"]) for n in data["lengths"]}
            return cls(tables, data["beginnings"])


def _sieve(hashes: Hashes) -> Bool[np.ndarray, " places"]:
    """A table in which the places of these numbers are set: as many as are a power of two, and cover them thinly."""
    table = np.zeros(1 << max(8, (_SPARSE * len(hashes)).bit_length()), bool)
    table[hashes & np.uint64(len(table) - 1)] = True
    return table


def _passes(sieve: Bool[np.ndarray, " places"], hashes: Hashes) -> Bool[np.ndarray, " hashes"]:
    return sieve[hashes & np.uint64(len(sieve) - 1)]


@dataclass(frozen=True)
class Evaluations:
    """All sets and their index. `items[i]` is where item i stands."""

    index: Index
    items: list[str]
    sets: list[dict[str, Any]]
    """For the report: spec, items, runs, phrases and items that were too short, of each."""


def read_evaluations(sets: Sequence[EvaluationConfig], ngram: int, phrase_items: int) -> Evaluations:
    """Raises ValueError for what cannot be read or holds no item."""
    places: list[str] = []
    tables: dict[int, list[tuple[Hashes, np.ndarray]]] = {}
    beginnings = [np.zeros(0, "uint64")]
    told = []
    for each in sets:
        found = [(where, hash_words(split_words(text))) for where, text in _items(each)]
        first = len(places)
        places += [where for where, _ in found]
        of_set, phrases = _tables([words for _, words in found], first, ngram, phrase_items)
        for length, pair in of_set.items():
            tables.setdefault(length, []).append(pair)
        beginnings += [runs(words, SHORTEST) for _, words in found]
        short = sum(len(words) < SHORTEST for _, words in found)
        counts = {"items": len(found), "runs": sum(len(pair[0]) for pair in of_set.values())}
        told.append({"spec": each.spec, **counts, "phrases": phrases, "too_short": short, "removed": 0, "found": 0})
    joined = {length: _joined(pairs) for length, pairs in tables.items()}
    return Evaluations(Index(joined, np.unique(np.concatenate(beginnings))), places, told)


def _tables(
    items: Sequence[Hashes], first: int, ngram: int, phrase_items: int
) -> tuple[dict[int, tuple[Hashes, np.ndarray]], int]:
    """(the runs of a set by their length, how many were left out as phrases). Its items are numbered from `first`."""
    by_length: dict[int, list[tuple[Hashes, np.ndarray]]] = {}
    for number, words in enumerate(items, start=first):
        if len(words) >= SHORTEST:
            length = min(ngram, len(words))
            hashes = np.unique(runs(words, length))
            by_length.setdefault(length, []).append((hashes, np.full(len(hashes), number, "int32")))
    tables, phrases = {}, 0
    for length, pairs in by_length.items():
        hashes, numbers = _joined(pairs)
        _, counts = np.unique(hashes, return_counts=True)
        shared = np.repeat(counts, counts) > phrase_items
        phrases += int((counts > phrase_items).sum())
        if not shared.all():
            tables[length] = hashes[~shared], numbers[~shared]
    return tables, phrases


def _joined(pairs: Sequence[tuple[Hashes, np.ndarray]]) -> tuple[Hashes, np.ndarray]:
    hashes, numbers = (np.concatenate(each) for each in zip(*pairs, strict=True))
    order = np.argsort(hashes, kind="stable")
    return hashes[order], numbers[order]


def _items(evaluation: EvaluationConfig) -> Iterator[Item]:
    spec = evaluation.spec
    if is_of_files(spec):
        rows = read_rows(SourceConfig(spec))
        items = ((where, _text(row, where, evaluation.columns)) for where, row in rows)
    else:
        task = load_task(spec, evaluation.options)
        items = ((each.id, "\n".join(m.content for m in each.messages)) for each in task.problems("test"))
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise ValueError(f"evaluation set {spec!r}: no item in it; name a set that has some")


def _text(row: Any, where: str, columns: Sequence[str]) -> str:
    if isinstance(row, str):
        return row
    values = [row[name] for name in columns if name in row and row[name] is not None] if isinstance(row, dict) else []
    if not values:
        raise ValueError(
            f"{where}: none of the columns {', '.join(columns)} is there; name those of an item in `columns`"
        )
    return "\n".join(map(_spoken, values))


def _spoken(value: Any) -> str:
    """A text, or what the messages of a chat say."""
    parts = value if isinstance(value, list) else [value]
    return "\n".join(
        str(part["content"]) if isinstance(part, dict) and "content" in part else str(part) for part in parts
    )
