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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kogia.config import to_dict
from kogia.data.config import DataConfig, is_file_spec
from kogia.data.sources import Document, read_source
from kogia.files import replacing_directory
from kogia.text.chat import render_example
from kogia.text.tokenizer import BOS, EOS, Tokenizer

CHUNK = 1024  # documents tokenised at a time, on all cores


@dataclass(frozen=True)
class ShardCounts:
    """What tokenising saw, for the log and for error messages."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    too_long: int = 0
    """Chat examples left out because they exceed max_seqlen."""


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
    found = json.loads((directory / "meta.json").read_text())["fingerprint"]
    if found != fingerprint:
        raise ValueError(
            f"{directory} holds the tokens of other data settings, tokenizer or file versions (fingerprint {found}, "
            f"now {fingerprint}); delete that folder to tokenise again, or undo the change to resume exactly"
        )
    return {split: open_shard(directory / split) for split in ("train", "val")}


def open_shard(directory: Path) -> Shard:
    """Map one split of a finished shard directory."""
    meta = json.loads((directory / "meta.json").read_text())
    counts = ShardCounts(**meta["counts"])
    tokens = _map(directory / "tokens.bin", meta["dtype"])
    mask, offsets = _map(directory / "mask.bin", "uint8"), np.fromfile(directory / "offsets.bin", "int64")
    if not len(tokens) == len(mask) == counts.tokens == offsets[-1]:
        raise ValueError(
            f"{directory}: tokens, mask and offsets disagree (truncated?); delete the folder to rebuild it"
        )
    return Shard(tokens, mask, offsets, tuple(meta["source_ends"]), counts)


def shard_fingerprint(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Hash of everything the tokens depend on: sources (files by size and time), lengths, split and tokenizer."""
    sources = []
    for source in data.sources:
        entry = {key: value for key, value in to_dict(source).items() if key != "weight"}
        if is_file_spec(source.spec) and (path := Path(source.spec).expanduser()).is_file():
            entry |= {"size": path.stat().st_size, "time": path.stat().st_mtime_ns}
        sources.append(entry)
    settings = {"sources": sources, "max_seqlen": data.max_seqlen, "val_share": data.val_share}
    template = tokenizer.template
    marks = (tokenizer.bos, tokenizer.eos, None if template is None else template.source)
    text = json.dumps(settings, sort_keys=True) + tokenizer.backend.to_str()
    text += json.dumps(marks) if marks != (BOS, EOS, None) else ""  # the built-in format came before there were others
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_held_out(document: Document, val_share: float) -> bool:
    """Whether a document belongs to validation: by hash of its prompt, or of its text when there is none."""
    key = "\x1f".join(f"{m.role}\x1e{m.content}" for m in document.prompt) if document.prompt else document.text
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return value < val_share * 2**64


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int], list[int]]]:
    """(document, token ids, loss mask) in order: [BOS] text EOS with all but the first counting, or a chat example."""
    documents = iter(documents)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    while chunk := list(itertools.islice(documents, CHUNK)):
        plain = iter(tokenizer.encode_batch([document.text for document in chunk if not document.prompt]))
        for document in chunk:
            if document.prompt:
                ids, mask = render_example(document.prompt, document.text, tokenizer)
            else:
                ids = [*start, *next(plain), tokenizer.eos_id]
                mask = [0] + [1] * (len(ids) - 1)
            yield document, ids, mask


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
        self.documents = self.sequences = self.tokens = self.loss_tokens = self.too_long = 0
        self.source_ends: list[int] = []
        self.files[2].write(np.zeros(1, "int64").tobytes())

    def add(self, document: Document, ids: Sequence[int], mask: Sequence[int], max_seqlen: int) -> None:
        self.documents += 1
        if document.prompt and len(ids) > max_seqlen:
            self.too_long += 1
            return
        for piece, piece_mask in cut(ids, mask, max_seqlen):
            self.files[0].write(np.asarray(piece, self.dtype).tobytes())
            self.files[1].write(np.asarray(piece_mask, "uint8").tobytes())
            self.sequences += 1
            self.tokens += len(piece)
            self.loss_tokens += sum(piece_mask)
            self.files[2].write(np.int64(self.tokens).tobytes())

    def finish(self) -> None:
        counts = ShardCounts(self.documents, self.sequences, self.tokens, self.loss_tokens, self.too_long)
        meta = {"dtype": self.dtype, "source_ends": self.source_ends, "counts": asdict(counts)}
        (self.directory / "meta.json").write_text(json.dumps(meta))


def _write_directory(data: DataConfig, tokenizer: Tokenizer, directory: Path, fingerprint: str) -> None:
    with replacing_directory(directory) as draft:  # what stands there has no meta.json: a deletion was interrupted
        with ExitStack() as stack:
            dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
            train, val = (_SplitWriter(draft / split, dtype, stack) for split in ("train", "val"))
            for source in data.sources:
                for document, ids, mask in tokenise(read_source(source), tokenizer):
                    writer = val if is_held_out(document, data.val_share) else train
                    writer.add(document, ids, mask, data.max_seqlen)
                for writer in (train, val):
                    writer.source_ends.append(writer.sequences)
            _check_not_empty(data, train, val)
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
            f"data.max_seqlen = {data.max_seqlen}); raise max_seqlen or lower val_share = {data.val_share}"
        )


def _map(path: Path, dtype: str) -> np.ndarray:
    # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
