"""A part: some consecutive documents of a source, hashed and tokenised. What a worker makes of a chunk.

Nothing is decided here but what a document alone decides. Which ones stay is decided over all parts, in `decide`.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kogia.data.rows import Document
from kogia.data.shards import is_held_out, sequences_of, token_dtype, tokenise
from kogia.prepare.evaluations import Index
from kogia.prepare.words import PERMUTATIONS, hash_words, signature, split_words
from kogia.text.chat import Message
from kogia.text.tokenizer import Tokenizer

PREVIEW = 160
"""Characters of a document that the report may show."""
NO_ITEM = -1


@dataclass(frozen=True)
class Recipe:
    """What all parts have in common."""

    tokenizer: Tokenizer
    index: Index
    max_seqlen: int | None
    val_share: float


@dataclass(frozen=True)
class Part:
    """Arrays with one entry per document, unless said."""

    tokens: np.ndarray
    """Of all sequences, end to end."""
    mask: np.ndarray
    """The same, 1 where a token counts in the loss."""
    lengths: np.ndarray
    """Of the sequences."""
    sequences: np.ndarray
    """How many there are of a document."""
    nbytes: np.ndarray
    """Of its text."""
    is_chat: np.ndarray
    is_held_out: np.ndarray
    replies: np.ndarray
    too_long: np.ndarray
    """Replies left out."""
    words: np.ndarray
    item: np.ndarray
    """Evaluation item of which it holds words, or NO_ITEM."""
    digest: np.ndarray
    """uint64 [documents, 2], of the whole text."""
    signatures: np.ndarray
    """uint32 [documents, 128]; [0, 128] where texts that are alike are not looked for."""
    notes: np.ndarray
    """JSON: where each document stands, how it begins, and the words that it shares with an item."""

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez(file, **vars(self))
        return file.getvalue()


def make_part(documents: Sequence[Document], recipe: Recipe, *, near: bool) -> Part:
    """Empty documents, of blanks alone, have no tokens. `near`: with signatures."""
    texts = [_whole_text(document) for document in documents]
    words = [split_words(text) for text in texts]
    hashes = [hash_words(each) for each in words]
    found = recipe.index.find_each(hashes)
    signatures = [signature(each) if len(each) else np.zeros(PERMUTATIONS, "uint32") for each in hashes if near]
    shared = [
        None if hit is None else " ".join(each[hit[1] : hit[1] + hit[2]])
        for hit, each in zip(found, words, strict=True)
    ]
    notes = [[d.where, text[:PREVIEW], run] for d, text, run in zip(documents, texts, shared, strict=True)]
    return Part(
        **_tokens(documents, texts, recipe),
        nbytes=np.array([len(text.encode()) for text in texts], "int64"),
        is_chat=np.array([bool(document.prompt) for document in documents], "uint8"),
        is_held_out=np.array([is_held_out(document, recipe.val_share) for document in documents], "uint8"),
        words=np.array([len(each) for each in words], "int64"),
        item=np.array([NO_ITEM if hit is None else hit[0] for hit in found], "int32"),
        digest=np.frombuffer(b"".join(map(_digest, texts)), "uint64").reshape(len(texts), 2),
        signatures=np.array(signatures, "uint32").reshape(-1, PERMUTATIONS),
        notes=np.frombuffer(json.dumps(notes).encode(), "uint8"),
    )


def _whole_text(document: Document) -> str:
    return "\n".join([*(message.content for message in document.prompt), document.text])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _tokens(documents: Sequence[Document], texts: Sequence[str], recipe: Recipe) -> dict[str, np.ndarray]:
    filled = [document for document, text in zip(documents, texts, strict=True) if text.strip()]
    made = tokenise(filled, recipe.tokenizer)
    found = [sequences_of(*next(made), recipe.max_seqlen) if text.strip() else ([], 0, 0) for text in texts]
    sequences = [example for examples, _, _ in found for example in examples]
    dtype = token_dtype(recipe.tokenizer)
    return {
        "tokens": np.concatenate([np.zeros(0, dtype), *(np.array(ids, dtype) for ids, _ in sequences)]),
        "mask": np.concatenate([np.zeros(0, "uint8"), *(np.array(mask, "uint8") for _, mask in sequences)]),
        "lengths": np.array([len(ids) for ids, _ in sequences], "int64"),
        "sequences": np.array([len(examples) for examples, _, _ in found], "int64"),
        "replies": np.array([replies for _, replies, _ in found], "int64"),
        "too_long": np.array([too_long for _, _, too_long in found], "int64"),
    }


class StoredPart:
    """A part on disk, whose arrays are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._data = np.load(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        self.path = path

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self._data[name]
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(self.path, error) from error

    @property
    def notes(self) -> list[list[Any]]:
        """(where, how it begins, words shared or None) of each document."""
        return json.loads(self.__getattr__("notes").tobytes())

    def texts(self) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """(ids, mask) of the sequences of each document."""
        ends = np.cumsum(self.lengths)
        ids, masks = (np.split(each, ends[:-1]) if len(ends) else [] for each in (self.tokens, self.mask))
        pairs = iter(zip(ids, masks, strict=True))
        for count in self.sequences:
            yield [next(pairs) for _ in range(count)]


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged ({error}); delete it and run the same command again, which makes it anew")


def to_json(document: Document) -> list[Any]:
    """A document for a worker."""
    prompt = [[message.role, message.content, message.reasoning] for message in document.prompt]
    return [document.text, prompt, list(document.learned), document.where]


def from_json(value: Sequence[Any]) -> Document:
    """The inverse of `to_json`."""
    text, prompt, learned, where = value
    return Document(text, tuple(Message(*message) for message in prompt), tuple(learned), where)
