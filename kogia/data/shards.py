"""Tokenise every document once into memory-mapped arrays that any later epoch, run or resume reads.

A shard directory holds `train/` and `val/`, each with

    tokens.bin   uint16 or uint32 token ids of all sequences, end to end
    mask.bin     uint8, 1 where a token's log-probability counts
    offsets.bin  int64 [sequences + 1], sequence i is tokens offsets[i] to offsets[i + 1]
    meta.json    dtype, sequence ends of each source, counts

and is complete once it stands under its final name.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kogia import log
from kogia.config import to_dict
from kogia.data.config import DataConfig, file_kind
from kogia.data.rows import Document
from kogia.data.sources import read_source
from kogia.files import replacing_directory
from kogia.text.chat import render_example
from kogia.text.tokenizer import Tokenizer

CHUNK = 1024  # documents tokenised at a time, on all cores
FORMAT = 2
"""Counts the changes of what a document's tokens are; shards of another format are not taken for these."""

Example = tuple[list[int], list[int]]
"""Token ids and loss mask of one sequence."""


@dataclass(frozen=True)
class ShardCounts:
    """What tokenising saw, for the log and for error messages."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    too_long: int = 0
    """Replies left out because they and their prompt exceed max_seqlen."""
    replies: int = 0
    """Replies of the assistant that are learned."""


@dataclass(frozen=True)
class Shard:
    """One split, memory-mapped."""

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    source_ends: tuple[int, ...]
    """Sequence number after the last one of each source."""
    counts: ShardCounts

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1


def build_shards(data: DataConfig, tokenizer: Tokenizer, directory: Path) -> dict[str, Shard]:
    """{"train": ..., "val": ...} of `data` under `directory`, tokenising only if it is not there yet.

    Raises ValueError when no training sequence is left, and when `directory` holds shards of other settings.
    """
    fingerprint = shard_fingerprint(data, tokenizer)
    if data.cache_dir is not None:
        directory = Path(data.cache_dir).expanduser() / fingerprint
    if not (directory / "meta.json").exists():
        _write_directory(data, tokenizer, directory, fingerprint)
    found = _read_meta(directory).get("fingerprint")
    if found != fingerprint:
        raise ValueError(
            f"{directory} holds the tokens of other data settings, tokenizer or file versions (fingerprint {found}, "
            f"now {fingerprint}); delete that folder to tokenise again, or undo the change to resume exactly"
        )
    return {split: open_shard(directory / split) for split in ("train", "val")}


def open_shard(directory: Path) -> Shard:
    """Map one split of a finished shard directory."""
    meta = _read_meta(directory)
    try:
        counts, ends = _counts(meta["counts"]), tuple(map(int, meta["source_ends"]))
        tokens = _map(directory / "tokens.bin", {"uint16": "uint16", "uint32": "uint32"}[meta["dtype"]])
        mask, offsets = _map(directory / "mask.bin", "uint8"), np.fromfile(directory / "offsets.bin", "int64")
        whole = len(tokens) == len(mask) == counts.tokens == offsets[-1] and ends[-1] == len(offsets) - 1
        in_order = offsets[0] == 0 and (np.diff(offsets) > 0).all() and list(ends) == sorted(ends) and ends[0] >= 0
    except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise _damaged(directory, error) from None
    if not (whole and in_order):
        raise _damaged(directory, "tokens, mask and offsets disagree")
    return Shard(tokens, mask, offsets, ends, counts)


def _counts(values: Any) -> ShardCounts:
    if not isinstance(values, dict) or not all(type(value) is int for value in values.values()):
        raise TypeError(f"counts = {values!r:.80}")
    return ShardCounts(**values)


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(directory, error) from None
    if not isinstance(meta, dict):
        raise _damaged(directory, "meta.json holds no object")
    return meta


def _damaged(directory: Path, reason: object) -> ValueError:
    return ValueError(f"{directory}: damaged or truncated ({reason}); delete the folder to rebuild it")


def shard_fingerprint(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Hash of everything the tokens depend on: sources (files by size and time), lengths, split and tokenizer."""
    sources = []
    for source in data.sources:
        entry = {key: value for key, value in to_dict(source).items() if key != "weight"}
        if file_kind(source.spec) and (path := Path(source.spec).expanduser()).is_file():
            entry |= {"size": path.stat().st_size, "time": path.stat().st_mtime_ns}
        sources.append(entry)
    settings = {
        "format": FORMAT,
        "sources": sources,
        "max_seqlen": data.longest,
        "val_share": data.val_share,
        "ends": [tokenizer.bos, tokenizer.adds_bos, *tokenizer.eos_ids],
        "template": tokenizer.template_source,
    }
    text = json.dumps(settings, sort_keys=True) + tokenizer.backend.to_str()
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_held_out(document: Document, val_share: float) -> bool:
    """Whether a document belongs to validation: by hash of its first learned reply's prompt, or of its text."""
    prompt = document.prompt[: document.learned[0]] if document.learned else document.prompt
    key = "\x1f".join(f"{m.role}\x1e{m.content}" for m in prompt) if prompt else document.text
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return value < val_share * 2**64


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[Example]]]:
    """Documents with their examples, in order: a whole text of which all but the first token counts, or each reply.

    A reply that cannot be rendered is a ValueError that begins with the document's place.
    """
    documents = iter(documents)
    while chunk := list(itertools.islice(documents, CHUNK)):
        plain = iter(tokenizer.encode_documents([document.text for document in chunk if not document.prompt]))
        for document in chunk:
            if document.prompt:
                yield document, _chat_examples(document, tokenizer)
            else:
                ids = next(plain)
                yield document, [(ids, [0] + [1] * (len(ids) - 1))]


def _chat_examples(document: Document, tokenizer: Tokenizer) -> list[Example]:
    try:
        return [render_example(prompt, reply, tokenizer) for prompt, reply in document.examples()]
    except ValueError as error:
        raise ValueError(f"{document.where}: {error}") from error


def join(examples: Iterable[Example]) -> list[Example]:
    """Each example that begins with the whole of the one before it continues it, so that no token is seen twice.

    Where the template drops earlier thoughts the prompt of the next reply is another text, and stays a sequence.
    """
    joined: list[Example] = []
    for ids, mask in examples:
        if joined and ids[: len(joined[-1][0])] == joined[-1][0]:
            before = joined.pop()[1]
            mask = before + mask[len(before) :]
        joined.append((ids, mask))
    return joined


def cut(ids: Sequence[int], mask: Sequence[int], max_seqlen: int) -> Iterator[tuple[Sequence[int], list[int]]]:
    """A long text in pieces that share one token: the last of a piece opens the next.

    So every token but the first is predicted exactly once; the first token of a sequence is never predicted.
    """
    for start in range(0, max(1, len(ids) - 1), max_seqlen - 1):
        yield ids[start : start + max_seqlen], [0, *mask[start + 1 : start + max_seqlen]]


class _SplitWriter:
    """Appends sequences to the three files of one split."""

    def __init__(self, directory: Path, dtype: str, stack: ExitStack) -> None:
        directory.mkdir()
        self.directory, self.dtype = directory, dtype
        self.files: list[BinaryIO] = [
            stack.enter_context((directory / name).open("wb")) for name in ("tokens.bin", "mask.bin", "offsets.bin")
        ]
        self.documents = self.sequences = self.tokens = self.loss_tokens = self.too_long = self.replies = 0
        self.source_ends: list[int] = []
        self.files[2].write(np.zeros(1, "int64").tobytes())

    def add(self, document: Document, examples: Sequence[Example], max_seqlen: int) -> None:
        self.documents += 1
        if not document.prompt:
            for ids, mask in examples:
                self._write(cut(ids, mask, max_seqlen))
            return
        kept = [example for example in examples if len(example[0]) <= max_seqlen]
        self.replies += len(kept)
        self.too_long += len(examples) - len(kept)
        self._write(join(kept))

    def _write(self, sequences: Iterable[tuple[Sequence[int], list[int]]]) -> None:
        for ids, mask in sequences:
            self.files[0].write(np.asarray(ids, self.dtype).tobytes())
            self.files[1].write(np.asarray(mask, "uint8").tobytes())
            self.sequences += 1
            self.tokens += len(ids)
            self.loss_tokens += sum(mask)
            self.files[2].write(np.int64(self.tokens).tobytes())

    def finish(self) -> None:
        counts = ShardCounts(*(getattr(self, each.name) for each in fields(ShardCounts)))
        meta = {"dtype": self.dtype, "source_ends": self.source_ends, "counts": asdict(counts)}
        (self.directory / "meta.json").write_text(json.dumps(meta))


def _write_directory(data: DataConfig, tokenizer: Tokenizer, directory: Path, fingerprint: str) -> None:
    with replacing_directory(directory) as draft:  # what stands there has no meta.json: a deletion was interrupted
        with ExitStack() as stack:
            dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
            train, val = (_SplitWriter(draft / split, dtype, stack) for split in ("train", "val"))
            for source in data.sources:
                for document, examples in tokenise(read_source(source), tokenizer):
                    writer = val if is_held_out(document, data.val_share) else train
                    writer.add(document, examples, data.longest)
                for writer in (train, val):
                    writer.source_ends.append(writer.sequences)
            _check_not_empty(data, train, val)
            if replies := train.replies + val.replies:
                log.info(f"data: {replies:,} replies of the assistant count in the loss, and none of what they answer")
            train.finish()
            val.finish()
        (draft / "meta.json").write_text(json.dumps({"fingerprint": fingerprint}))


def _check_not_empty(data: DataConfig, train: _SplitWriter, val: _SplitWriter) -> None:
    """Before anything is kept, so that the next run reads its sources again."""
    if train.documents + val.documents == 0:
        specs = ", ".join(source.spec for source in data.sources)
        raise ValueError(f"data: {specs}: no document in it; name a source that has some, or fill it first")
    if train.sequences == 0:
        raise ValueError(
            f"data: no training sequence ({train.documents} documents read, {train.too_long} chat examples above "
            f"data.max_seqlen = {data.longest}); raise max_seqlen or lower val_share = {data.val_share}"
        )


def _map(path: Path, dtype: str) -> np.ndarray:
    # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
