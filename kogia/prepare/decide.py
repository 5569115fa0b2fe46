"""Which documents stay. Each that goes has one reason, the first that holds: empty, contaminated, equal, alike.

Of documents that are equal or alike the first stays, in the order of the sources and of what they hold. Where B is like
A and C is like B, both B and C go. Memory is about 60 bytes per document, whatever its length; signatures and what
bands are told by lie in files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kogia.files import writing
from kogia.prepare.config import Dedup
from kogia.prepare.part import NO_ITEM, StoredPart
from kogia.prepare.words import BANDS, PERMUTATIONS, band_keys

KEPT, EMPTY, CONTAMINATED, EQUAL, ALIKE = range(5)
REASONS = {EMPTY: "empty", CONTAMINATED: "contaminated", EQUAL: "equal", ALIKE: "alike"}
ROUNDS = 8
"""With so many earlier texts of its band a text is compared."""
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Decision:
    """One entry per document, in the order of the parts."""

    reasons: np.ndarray
    """uint8, KEPT or why not."""
    like: np.ndarray
    """Of a document that is EQUAL or ALIKE, the earlier one; else -1."""
    similarity: np.ndarray
    """float32, how alike they are."""


def decide(parts: Sequence[tuple[Path, Dedup]], threshold: float, scratch: Path) -> Decision:
    """`parts` are those of all sources in order, each with the level of its source; `scratch` is a directory."""
    levels, digests, reasons = _read(parts)
    like, similarity = np.full(len(reasons), -1, "int64"), np.ones(len(reasons), "float32")
    _mark_equal(np.flatnonzero((reasons == KEPT) & (levels > 0)), digests, reasons, like)
    if (levels > 1).any():
        with _Signatures(parts, len(reasons), scratch) as signatures:
            for band in range(BANDS):
                _mark_alike(band, levels > 1, signatures, threshold, reasons, like, similarity)
    return Decision(reasons, like, similarity)


def _read(parts: Sequence[tuple[Path, Dedup]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(level 0 to 2, digest, reason so far) of every document."""
    levels, digests, reasons = [], [], []
    for path, dedup in parts:
        part = StoredPart(path)
        level = np.full(len(part.nbytes), ("none", "exact", "near").index(dedup), "uint8")
        level[part.words == 0] = np.minimum(level[part.words == 0], 1)  # of marks alone: nothing to compare
        levels.append(level)
        digests.append(part.digest)
        empty = np.bincount(np.repeat(np.arange(len(level)), part.sequences), minlength=len(level)) == 0
        no_text = empty & (part.too_long == 0)
        reasons.append(np.where(no_text, EMPTY, np.where(part.item == NO_ITEM, KEPT, CONTAMINATED)).astype("uint8"))
    return np.concatenate(levels), np.concatenate(digests), np.concatenate(reasons)


def _mark_equal(among: np.ndarray, digests: np.ndarray, reasons: np.ndarray, like: np.ndarray) -> None:
    order = among[np.lexsort((digests[among, 1], digests[among, 0]))]  # stable: of equal ones the first stays first
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    heads = _heads(order, same)
    repeated = np.flatnonzero(heads != order)
    reasons[order[repeated]] = EQUAL
    like[order[repeated]] = heads[repeated]


def _heads(order: np.ndarray, same: np.ndarray) -> np.ndarray:
    """The first of the group that each is in; `same[i]`: i + 1 is in the group of i."""
    begins = np.concatenate([[True], ~same])[: len(order)]
    return order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]


def _mark_alike(
    band: int,
    wanted: np.ndarray,
    signatures: "_Signatures",
    threshold: float,
    reasons: np.ndarray,
    like: np.ndarray,
    similarity: np.ndarray,
) -> None:
    """Compare those whose keys of a band are equal with the first of them, then what is left with the next first."""
    members = np.flatnonzero(wanted & (reasons == KEPT))
    for _ in range(ROUNDS):
        keys = signatures.keys[members, band]
        order = np.argsort(keys, kind="stable")
        members, keys = members[order], keys[order]
        heads = _heads(members, keys[1:] == keys[:-1])
        others = np.flatnonzero(heads != members)
        members, heads = members[others], heads[others]
        if not len(members):
            return
        found = signatures.similarity(members, heads)
        alike = found >= threshold
        reasons[members[alike]] = ALIKE
        like[members[alike]], similarity[members[alike]] = heads[alike], found[alike]
        members = np.sort(members[~alike])


class _Signatures:
    """Signatures and band keys of all documents, in files that are gone afterwards."""

    def __init__(self, parts: Sequence[tuple[Path, Dedup]], count: int, scratch: Path) -> None:
        self._files = scratch / "signatures.bin", scratch / "keys.bin"
        # written, not mapped: a disk that fills up under a mapping kills the process
        with writing(scratch), self._files[0].open("wb") as signatures, self._files[1].open("wb") as keys:
            for path, dedup in parts:
                part = StoredPart(path)
                found = part.signatures if dedup == "near" else np.zeros((len(part.nbytes), PERMUTATIONS), "uint32")
                signatures.write(found.tobytes())
                keys.write(band_keys(found).tobytes())
        self._all = np.memmap(self._files[0], "uint32", "r", shape=(count, PERMUTATIONS))
        self.keys = np.memmap(self._files[1], "uint64", "r", shape=(count, BANDS))

    def __enter__(self) -> "_Signatures":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.unlink()

    def similarity(self, these: np.ndarray, those: np.ndarray) -> np.ndarray:
        """Of each document with another, as the share of equal numbers."""
        found = np.zeros(len(these), "float32")
        for start in range(0, len(these), _BLOCK):
            block = slice(start, start + _BLOCK)
            found[block] = (self._all[these[block]] == self._all[those[block]]).mean(axis=1)
        return found
