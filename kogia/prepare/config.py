"""What `kogia prepare` makes of which documents, as frozen values. Torch-free."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from kogia.config import check_finite, check_least
from kogia.data.config import SourceConfig

Dedup = Literal["near", "exact", "none"]
COLUMNS = ("question", "problem", "prompt", "text")


@dataclass(frozen=True)
class PreparedSource(SourceConfig):
    """One place documents come from."""

    dedup: Dedup | None = None
    """`dedup` for this source alone: what a generator makes by rule is alike and no duplicate, say "exact" there."""


@dataclass(frozen=True)
class EvaluationConfig:
    """A set that models will be evaluated on, whose problems no document may hold."""

    spec: str
    """A file, a pattern of files or hf:org/name as in sources, or a task (gsm8k, module:Class), of which the test split
    is taken."""
    columns: tuple[str, ...] = COLUMNS
    """Columns of a row that make up an item, each that is there; "solution" and "answer" may be added."""
    options: dict[str, str | int | float | bool] = field(default_factory=dict)
    """Of a task."""


@dataclass(frozen=True)
class PrepareConfig:
    """Documents deduplicated, decontaminated and tokenised, for `kogia pretrain`."""

    out: str
    """Directory to create. The same command again goes on where a killed one was."""
    sources: tuple[PreparedSource, ...] = ()
    """Where documents come from; of equal ones the first stays."""
    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    """Files, patterns, data sets or generators in the place of `sources`, where their specs are all there is to say."""
    mixture: Literal["epochs", "tokens", "documents"] = "epochs"
    """What weights of sources mean: how often an epoch visits each document, or the source's part of an epoch's tokens,
    or of its documents; then an epoch is as long as all sources together."""
    tokenizer: str | None = None
    """Directory with tokenizer.json, GGUF file, or `org/name` of the Hub; exactly one of this and `vocab_size`."""
    vocab_size: int | None = None
    """Size of a byte-level BPE tokenizer to train on the first documents of each source."""
    tokenizer_documents: int = 20000
    """A tokenizer is trained on at most this many documents of each source."""
    dedup: Dedup = "near"
    """`exact` removes texts that are equal, `near` also those that are alike (MinHash over 5 words)."""
    near_threshold: float = 0.8
    """Jaccard similarity of the sets of 5 words, as MinHash estimates it, from which on texts are alike."""
    evaluations: tuple[EvaluationConfig, ...] = ()
    against: tuple[str, ...] = ()
    """Evaluation sets to keep out, in the place of `evaluations`, where their specs are all there is to say."""
    ngram: int = 10
    """A document that shares so many words in a row with an item of an evaluation set is removed; of a shorter item, of
    at least 3 words, all of them."""
    phrase_items: int = 10
    """Words in a row that more items of one set than this have in common are a phrase, and give nothing away."""
    max_seqlen: int | None = None
    """Chats with more tokens are left out. Plain documents are kept whole, and cut by whoever trains."""
    val_share: float = 0.0
    """Share of documents held out for the validation loss, chosen by a hash of the document (of a chat's prompt)."""
    workers: int | None = None
    """Processes that hash and tokenise; None takes one for each core."""
    overwrite: bool = False
    """Delete what `out` holds first."""
    dry_run: bool = False
    """Say what would be read and written, and stop."""
    quiet: bool = False
    """No progress line."""

    def __post_init__(self) -> None:
        if self.files:
            object.__setattr__(self, "sources", tuple(map(PreparedSource, self.files)))
            object.__setattr__(self, "files", ())
        if self.against:
            object.__setattr__(self, "evaluations", tuple(map(EvaluationConfig, self.against)))
            object.__setattr__(self, "against", ())
        check_finite(self)
        check_least(self, 1, "tokenizer_documents", "workers", "phrase_items")
        check_least(self, 2, "max_seqlen")
        check_least(self, 3, "ngram")
        if not 0.0 <= self.val_share < 1.0:
            raise ValueError(f"val_share = {self.val_share}: must lie in [0, 1)")
        if not 0.0 < self.near_threshold <= 1.0:
            raise ValueError(f"near_threshold = {self.near_threshold}: must lie in (0, 1]")

    def check_complete(self) -> None:
        """Raise ValueError if a choice that has no default is missing or given twice."""
        if not self.sources:
            raise ValueError(
                "sources is empty: give --data FILE, or add [[sources]] with spec = a file, a pattern, hf:org/name or "
                "module:function"
            )
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError(
                "exactly one of tokenizer (a directory or name) and vocab_size (to train one) must be given; got "
                f"tokenizer = {self.tokenizer!r} and vocab_size = {self.vocab_size}"
            )

    def level(self, source: PreparedSource) -> Dedup:
        """How a source is deduplicated."""
        return source.dedup or self.dedup
