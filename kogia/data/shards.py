"""Tokenise every document once into memory-mapped arrays that any later epoch, run or resume reads.

A shard directory holds `train/` and `val/`, each with

    tokens.bin   uint16 or uint32 token ids of all texts, end to end
    offsets.bin  int64 [texts + 1], text i is tokens offsets[i] to offsets[i + 1]
    mask.bin     uint8, 1 where a token's log-probability counts; where there is no chat, it is all but the first
    whole.bin    uint8 [texts], 1 for a chat, which is not to be cut; where there is one
    meta.json    dtype, text ends of each source, counts, checksums

and is complete once it stands under its final name. Texts are whole: they are cut to sequences when a shard is opened,
so that one directory serves any context.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kogia import log
from kogia.config import to_dict
from kogia.data.config import PREPARED, DataConfig, SourceConfig, is_of_files, is_prepared
from kogia.data.rows import Document
from kogia.data.sources import read_source, source_files
from kogia.files import replacing_directory, write_json
from kogia.text.chat import render_example
from kogia.text.tokenizer import Tokenizer

CHUNK = 1024  # documents tokenised at a time, on all cores
META = "meta.json"
SPLITS = "train", "val"
CHECKED_BYTES = 4 << 30
"""Larger files are not read through to compare their checksum."""
FORMAT = 3
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
    """One split, memory-mapped, its texts cut to sequences. Of the arrays, `starts` and `lengths` are per sequence."""

    tokens: np.ndarray
    mask: np.ndarray | None
    """None: every token of a text but its first counts."""
    starts: np.ndarray
    lengths: np.ndarray
    source_ends: tuple[int, ...]
    """Sequence number after the last one of each source."""
    counts: ShardCounts
    weights: tuple[float, ...] = ()
    """How often an epoch visits each source."""
    names: tuple[str, ...] = ()
    """What each source is."""

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def source_tokens(self) -> list[int]:
        """Tokens of the sequences of each source."""
        parts = np.split(self.lengths, self.source_ends[:-1])
        return [int(part.sum()) for part in parts]


def build_shards(data: DataConfig, tokenizer: Tokenizer, directory: Path) -> dict[str, Shard]:
    """{"train": ..., "val": ...} of `data` under `directory`, tokenising only if it is not there yet.

    Raises ValueError when no training sequence is left, and when `directory` holds shards of other settings.
    """
    prepared = prepared_directory(data)
    fingerprint = read_prepared(prepared)["fingerprint"] if prepared else shard_fingerprint(data, tokenizer)
    if data.cache_dir is not None and prepared is None:
        directory = Path(data.cache_dir).expanduser() / fingerprint
    if not (directory / META).exists():
        if prepared is not None:
            write_json(directory / META, {"fingerprint": fingerprint})
        else:
            _write_directory(data, tokenizer, directory, fingerprint)
    meta = _read_meta(directory)
    if (found := meta.get("fingerprint")) != fingerprint:
        raise ValueError(
            f"{directory} holds the tokens of other data settings, tokenizer or file versions (fingerprint {found}, "
            f"now {fingerprint}); delete that folder to tokenise again, or undo the change to resume exactly"
        )
    if prepared is not None:
        return _open_prepared(prepared, data, tokenizer)
    specs = tuple((source.weight, source.spec) for source in data.sources)
    train = _open(directory / "train", data.piece, *zip(*specs, strict=True))
    val = _open(directory / "val", data.longest, *zip(*specs, strict=True))
    if meta.get("splits", splits := splits_digest(directory)) != splits:  # earlier ones do not tell
        raise _damaged(directory, "its train/ and val/ are not those that it was finished with")
    return {"train": train, "val": val}


def prepared_directory(data: DataConfig) -> Path | None:
    """The directory of `kogia prepare` that is the only source, if it is one. ValueError where it is beside others."""
    found = [source for source in data.sources if is_prepared(source.spec)]
    if not found:
        return None
    spec, (prepared, *_) = found[0].spec, found
    if len(data.sources) > 1:
        raise ValueError(f"data source {spec!r}: what was prepared stands alone; add the others to its recipe")
    if prepared != SourceConfig(spec):
        raise ValueError(f"data source {spec!r}: takes no weight, num or other setting: they are in its {PREPARED}")
    if data.val_share:
        raise ValueError(
            f"data.val_share = {data.val_share}: {spec} has held out its own documents; leave val_share out here"
        )
    return Path(spec).expanduser()


def read_prepared(directory: Path) -> dict[str, Any]:
    """meta.json of a directory of `kogia prepare`. ValueError if it was not finished or is damaged."""
    if not (directory / META).is_file():
        raise ValueError(f"{directory}: was not finished; run `kogia prepare {directory / PREPARED}` to go on with it")
    meta = _read_meta(directory)
    weights, names = meta.get("weights"), meta.get("names")
    sound = isinstance(weights, list) and isinstance(names, list) and len(weights) == len(names) > 0
    if not sound or not all(isinstance(meta.get(key), str) for key in ("fingerprint", "tokenizer")):
        raise _damaged(directory, f"{META} lacks entries")
    return meta


def splits_digest(directory: Path, *more: str) -> str:
    """Hash of what the two splits of a directory say of themselves: others of the same form, or exchanged, differ."""
    return digest(json.dumps([*more, *((directory / split / META).read_text(encoding="utf-8") for split in SPLITS)]))


def _open_prepared(directory: Path, data: DataConfig, tokenizer: Tokenizer) -> dict[str, Shard]:
    meta = read_prepared(directory)
    if meta["tokenizer"] != tokenizer_digest(tokenizer):
        raise ValueError(
            f"{directory}: was tokenised with another tokenizer than the model's; leave `tokenizer` out to take "
            f"{directory / 'tokenizer'}, or prepare it with the model's"
        )
    weights, names = map(float, meta["weights"]), map(str, meta["names"])
    shards = {"train": _open(directory / "train", data.piece, tuple(weights), tuple(names))}
    if len(shards["train"].source_ends) != len(meta["names"]):
        raise _damaged(directory, f"{META} and train/{META} disagree")
    shards["val"] = _open(directory / "val", data.longest)
    if splits_digest(directory, meta["tokenizer"]) != meta["fingerprint"]:
        raise _damaged(directory, "its train/ and val/ are not those that it was finished with")
    return shards


def _open(directory: Path, longest: int, weights: tuple[float, ...] = (), names: tuple[str, ...] = ()) -> Shard:
    return replace(open_shard(directory, longest), weights=weights, names=names)


def open_shard(directory: Path, max_seqlen: int) -> Shard:
    """Map one split of a finished shard directory, its texts cut to `max_seqlen`. Chats above it are left out."""
    meta = _read_meta(directory)
    try:
        counts, ends = _counts(meta["counts"]), tuple(map(int, meta["source_ends"]))
        sums = dict(meta["crc32"])
        tokens = _map(directory / "tokens.bin", {"uint16": "uint16", "uint32": "uint32"}[meta["dtype"]])
        mask = _map(directory / "mask.bin", "uint8") if "mask.bin" in sums else None
        whole = np.fromfile(directory / "whole.bin", "uint8") if "whole.bin" in sums else None
        offsets = np.fromfile(directory / "offsets.bin", "int64")
        sizes = {len(tokens), counts.tokens, int(offsets[-1])} | (set() if mask is None else {len(mask)})
        complete = (
            len(sizes) == 1
            and ends[-1] == len(offsets) - 1
            and len(whole if whole is not None else offsets[1:]) == ends[-1]
        )
        in_order = offsets[0] == 0 and (np.diff(offsets) > 0).all() and list(ends) == sorted(ends) and ends[0] >= 0
        changed = [name for name, value in sums.items() if _checksum(directory / name) not in (None, value)]
    except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise _damaged(directory, error) from None
    if not (complete and in_order):
        raise _damaged(directory, "tokens, mask and offsets disagree")
    if changed:
        raise _damaged(directory, f"{', '.join(changed)}: not what was written, by the checksum")
    return _cut(Shard(tokens, mask, offsets[:-1], np.diff(offsets), ends, counts), whole, max_seqlen)


def _checksum(file: Path) -> int | None:
    """CRC-32 of a file that is not too large for it."""
    if file.stat().st_size > CHECKED_BYTES:
        return None
    value = 0
    with file.open("rb") as content:
        while block := content.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _cut(texts: Shard, whole: np.ndarray | None, max_seqlen: int) -> Shard:
    """Long texts in pieces that share one token: the last of a piece opens the next.

    So every token but the first is predicted exactly once; the first token of a sequence is never predicted.
    """
    pieces = np.maximum(1, -(-(texts.lengths - 1) // (max_seqlen - 1)))
    left_out = np.zeros(len(pieces), bool) if whole is None else (whole == 1) & (texts.lengths > max_seqlen)
    pieces[left_out] = 0
    begins = np.concatenate([[0], np.cumsum(pieces)])
    text = np.repeat(np.arange(len(pieces)), pieces)
    into = (np.arange(begins[-1]) - begins[text]) * (max_seqlen - 1)
    lengths = np.minimum(texts.lengths[text] - into, max_seqlen)
    mask = np.zeros(0, "uint8") if texts.mask is None else texts.mask
    spans = zip(texts.starts[left_out], texts.lengths[left_out], strict=True)
    lost = sum(int(mask[start : start + length].sum()) for start, length in spans)
    counts = replace(
        texts.counts,
        sequences=len(lengths),
        tokens=int(lengths.sum()),
        loss_tokens=texts.counts.loss_tokens - lost,
        too_long=texts.counts.too_long + int(left_out.sum()),
    )
    ends = tuple(int(begins[end]) for end in texts.source_ends)
    return replace(texts, starts=texts.starts[text] + into, lengths=lengths, source_ends=ends, counts=counts)


def _counts(values: Any) -> ShardCounts:
    if not isinstance(values, dict) or not all(type(value) is int for value in values.values()):
        raise TypeError(f"counts = {values!r:.80}")
    return ShardCounts(**values)


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(directory, error) from None
    if not isinstance(meta, dict):
        raise _damaged(directory, f"{META} holds no object")
    return meta


def _damaged(directory: Path, reason: object) -> ValueError:
    return ValueError(f"{directory}: damaged or truncated ({reason}); delete the folder to rebuild it")


def shard_fingerprint(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Hash of everything the tokens depend on: sources (files by size and time), lengths, split and tokenizer."""
    settings = {
        "format": FORMAT,
        "sources": [source_state(source) for source in data.sources],
        "max_seqlen": data.longest,
        "val_share": data.val_share,
    }
    return digest(json.dumps(settings, sort_keys=True) + tokenizer_digest(tokenizer))


def source_state(source: SourceConfig) -> dict[str, Any]:
    """All that decides what a source gives, its weight apart: its settings and its files by size and time."""
    entry = {key: value for key, value in to_dict(source).items() if key != "weight"}
    files = [Path(file).expanduser() for file in source_files(source)] if is_of_files(source.spec) else []
    entry["files"] = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return entry


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hash of all of a tokenizer that decides which tokens a document has."""
    ends = [tokenizer.bos, tokenizer.adds_bos, *tokenizer.eos_ids]
    return digest(json.dumps([ends, tokenizer.template_source, tokenizer.backend.to_str()]))


def digest(text: str) -> str:
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


class SplitWriter:
    """Appends texts to the files of one split, in a directory that it makes where there is none."""

    def __init__(self, directory: Path, dtype: str, stack: ExitStack) -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.dtype = directory, dtype
        self._files: dict[str, BinaryIO] = {
            name: stack.enter_context((directory / name).open("wb"))
            for name in ("tokens.bin", "offsets.bin", "mask.bin", "whole.bin")
        }
        self._sums = dict.fromkeys(self._files, 0)
        self._has_chats = False
        self.documents = self.sequences = self.tokens = self.loss_tokens = self.too_long = self.replies = 0
        self.source_ends: list[int] = []
        self._write("offsets.bin", np.zeros(1, "int64"))

    def add(self, document: Document, examples: Sequence[Example], max_seqlen: int | None) -> None:
        """A document with its examples as `tokenise` gives them. Replies above `max_seqlen` are left out."""
        texts, replies, too_long = sequences_of(document, examples, max_seqlen)
        self.documents += 1
        self.replies += replies
        self.too_long += too_long
        for ids, mask in texts:
            self.write(np.asarray(ids, self.dtype), np.asarray(mask, "uint8"), is_whole=bool(document.prompt))

    def write(self, ids: np.ndarray, mask: np.ndarray, *, is_whole: bool) -> None:
        """One text. `is_whole`: it is not to be cut."""
        self.sequences += 1
        self.tokens += len(ids)
        self.loss_tokens += int(mask.sum())
        self._write("tokens.bin", ids)
        self._write("mask.bin", mask)
        self._write("whole.bin", np.array([is_whole], "uint8"))
        self._write("offsets.bin", np.array([self.tokens], "int64"))
        self._has_chats |= is_whole

    def _write(self, name: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._files[name].write(data)
        self._sums[name] = zlib.crc32(data, self._sums[name])

    def end_source(self) -> None:
        self.source_ends.append(self.sequences)

    def finish(self) -> None:
        """Write meta.json; what says nothing is not kept."""
        for name in () if self._has_chats else ("mask.bin", "whole.bin"):
            self._files[name].close()
            (self.directory / name).unlink()
            del self._sums[name]
        counts = ShardCounts(*(getattr(self, each.name) for each in fields(ShardCounts)))
        meta = {"dtype": self.dtype, "source_ends": self.source_ends, "counts": asdict(counts), "crc32": self._sums}
        (self.directory / META).write_text(json.dumps(meta))


def sequences_of(
    document: Document, examples: Sequence[Example], max_seqlen: int | None
) -> tuple[Sequence[Example], int, int]:
    """(what is written of a document, replies among it, replies left out because they exceed `max_seqlen`)."""
    if not document.prompt:
        return examples, 0, 0
    kept = [example for example in examples if max_seqlen is None or len(example[0]) <= max_seqlen]
    return join(kept), len(kept), len(examples) - len(kept)


def token_dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _write_directory(data: DataConfig, tokenizer: Tokenizer, directory: Path, fingerprint: str) -> None:
    with replacing_directory(directory) as draft:  # what stands there has no meta.json: a deletion was interrupted
        with ExitStack() as stack:
            train, val = (SplitWriter(draft / split, token_dtype(tokenizer), stack) for split in ("train", "val"))
            empty = 0
            for source in data.sources:
                for document, examples in tokenise(read_source(source), tokenizer):
                    if not (document.prompt or document.text.strip()):  # of a text all would be learned: that it ends
                        empty += 1
                        continue
                    writer = val if is_held_out(document, data.val_share) else train
                    writer.add(document, examples, data.longest)
                for writer in (train, val):
                    writer.end_source()
            _check_not_empty(data, train, val)
            if empty:
                log.warn(f"data: {empty:,} documents of blanks alone were left out")
            if replies := train.replies + val.replies:
                log.info(f"data: {replies:,} replies of the assistant count in the loss, and none of what they answer")
            train.finish()
            val.finish()
        meta = {"fingerprint": fingerprint, "splits": splits_digest(draft)}
        (draft / META).write_text(json.dumps(meta))


def _check_not_empty(data: DataConfig, train: SplitWriter, val: SplitWriter) -> None:
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
