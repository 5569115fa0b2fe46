"""What to train on, as frozen values. Torch-free."""

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kogia.config import check_finite

Packing = Literal["in_order", "best_fit", "joined"]
HUB = "hf:"
"""How the name of a data set of the Hugging Face Hub begins."""
PREPARED = "prepare.toml"
"""By this file a directory is known as one of `kogia prepare`."""
UNCUT = 2**40
"""Longer than any document."""


@dataclass(frozen=True)
class SourceConfig:
    """One place documents come from."""

    spec: str
    """A file (.txt, .jsonl, .json, each also .gz, or .parquet) or a pattern of files as books/*.jsonl; a data set of
    the Hugging Face Hub as hf:org/name or hf:org/name/data/*.parquet; a directory that `kogia prepare` has written; or
    a generator `module:function`, which is called with `options`, and with `num` and `seed` where it takes them.

    A row is {"text"} or {"prompt", "completion"} or {"messages"[, "completion"]} or another layout of
    docs/data-formats.md. A generator yields strings, such rows, or (problem, completion) pairs.
    """
    num: int | None = None
    """At most this many documents; passed on to a generator."""
    weight: float = 1.0
    """How often one epoch visits each document: 2 is twice, 0.5 is another random half in each epoch."""
    seed: int = 0
    """Passed to a generator; a file ignores it."""
    text_key: str = "text"
    """The column of a row that holds a plain document. Another than "text" comes before all other layouts."""
    template: str | None = None
    """Makes a plain document of several columns, as "{question}\n{solution}"; before all layouts."""
    replies: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a conversation are learned: all that answer a user, or the last one."""
    separator: str | None = None
    """Splits a .txt file into documents; None takes the file as one document."""
    options: dict[str, str | int | float | bool] = field(default_factory=dict)
    """Keyword arguments of a generator."""

    def __post_init__(self) -> None:
        check_finite(self, f"data source {self.spec!r}")
        if self.weight <= 0:
            raise ValueError(f"data source {self.spec!r}: weight = {self.weight}: must be above 0; delete the source")
        if self.num is not None and self.num < 1:
            raise ValueError(f"data source {self.spec!r}: num = {self.num}: must be at least 1; leave it out for all")
        if self.options and is_of_files(self.spec):
            raise ValueError(f"data source {self.spec!r}: options belong to a generator `module:function`, not a file")


@dataclass(frozen=True)
class DataConfig:
    """The training documents and how they are cut into batches."""

    sources: tuple[SourceConfig, ...] = ()
    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    """Files (or generators) to train on in the place of `sources`, where their specs are all there is to say."""
    batch_tokens: int = 16384
    """Most tokens in one micro-batch; whole documents are packed up to it."""
    packing: Packing = "in_order"
    """`best_fit` fills what a batch has left with a document of later on, and batches are nearly full; `in_order` ends
    the batch there. `joined` lays documents end to end and cuts them into rows of max_seqlen, which see across their
    ends, as DeepSeek-V3 was trained: every batch is full and has the same shape, which GPUs like."""
    max_seqlen: int | None = None
    """A longer plain document is cut into pieces of this length; a longer chat example is left out and counted. None
    takes 1024, but no more than a batch and the model's context hold."""
    val_share: float = 0.0
    """Share of documents held out for the validation loss, chosen by a hash of the document (of a chat's prompt)."""
    cache_dir: str | None = None
    """Folder for tokenised shards that several runs share; None keeps them in the run directory."""

    def __post_init__(self) -> None:
        if self.files:
            object.__setattr__(self, "sources", tuple(map(SourceConfig, self.files)))
            object.__setattr__(self, "files", ())
        if not 0.0 <= self.val_share < 1.0:
            raise ValueError(f"data.val_share = {self.val_share}: must lie in [0, 1)")
        if self.longest < 2:
            raise ValueError(f"data.max_seqlen = {self.longest}: must be at least 2, one token to predict from")
        if self.batch_tokens < self.longest:
            raise ValueError(
                f"data.batch_tokens = {self.batch_tokens}: must hold one sequence of data.max_seqlen = "
                f"{self.longest}; raise batch_tokens or lower max_seqlen"
            )
        if self.packing == "joined" and self.batch_tokens % self.longest:
            raise ValueError(
                f"data.batch_tokens = {self.batch_tokens}: must be a multiple of data.max_seqlen = {self.longest}, the "
                "rows that documents are joined into"
            )

    @property
    def longest(self) -> int:
        """`max_seqlen`, or what stands for None as long as there is no model."""
        return min(1024, self.batch_tokens) if self.max_seqlen is None else self.max_seqlen

    @property
    def piece(self) -> int:
        """Longest sequence that the training documents are cut to before they are packed."""
        return UNCUT if self.packing == "joined" else self.longest


def is_prepared(spec: str) -> bool:
    """Whether a source is a directory of `kogia prepare`."""
    return (Path(spec).expanduser() / PREPARED).is_file()


def is_of_files(spec: str) -> bool:
    """Whether a source is a file, a pattern of files or a data set of the Hub; else a generator makes its documents."""
    return bool(file_kind(spec)) or spec.startswith(HUB) or glob.has_magic(spec)


def file_kind(spec: str) -> str:
    """The suffix of a file that can be read, without .gz; "" for any other."""
    kinds = (".parquet", *(kind + end for kind in (".txt", ".jsonl", ".json") for end in ("", ".gz")))
    return next((kind.removesuffix(".gz") for kind in kinds if spec.endswith(kind)), "")
