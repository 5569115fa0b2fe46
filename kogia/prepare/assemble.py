"""The parts, less what was decided against, as the two splits that training reads, and the report on both."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kogia.data.shards import SplitWriter
from kogia.files import replacing_directory, writing
from kogia.prepare.config import PrepareConfig
from kogia.prepare.decide import ALIKE, CONTAMINATED, EQUAL, KEPT, REASONS, Decision
from kogia.prepare.part import StoredPart

EXAMPLES = 5
"""Of each reason and source in the report."""


@dataclass
class SourceReport:
    """What became of the documents of a source."""

    spec: str
    documents: int = 0
    nbytes: int = 0
    removed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS.values(), 0))
    removed_nbytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS.values(), 0))
    too_long_replies: int = 0
    kept: int = 0
    held_out: int = 0
    tokens: int = 0
    """Of the training documents."""
    held_out_tokens: int = 0
    epochs: float = 0.0
    """How often an epoch of the mixture visits each of its documents."""
    share: float = 0.0
    """Of the tokens of an epoch."""
    examples: list[dict[str, Any]] = field(default_factory=list)


Parts = Sequence[Sequence[Path]]
"""Of each source."""


def assemble(out: Path, parts: Parts, decision: Decision, dtype: str, reports: Sequence[SourceReport]) -> None:
    """Write out/train and out/val, and count in `reports` what each source has given."""
    with ExitStack() as stack:
        drafts = [stack.enter_context(replacing_directory(out / name)) for name in ("train", "val")]
        with writing(out), ExitStack() as files:
            train, val = (SplitWriter(draft, dtype, files) for draft in drafts)
            place = 0
            for of_source, report in zip(parts, reports, strict=True):
                for path in of_source:
                    part = StoredPart(path)
                    end = place + len(part.nbytes)
                    _add(part, decision.reasons[place:end], train, val, report)
                    place = end
                train.end_source()
                val.end_source()
            train.finish()
            val.finish()


def _add(part: StoredPart, reasons: np.ndarray, train: SplitWriter, val: SplitWriter, report: SourceReport) -> None:
    """One part's documents, each to its split."""
    count_removed(part, reasons, report)
    replies, too_long, held_out, is_chat = part.replies, part.too_long, part.is_held_out, part.is_chat
    for i, texts in enumerate(part.texts()):
        if reasons[i] != KEPT:
            continue
        writer = val if held_out[i] else train
        writer.documents += 1
        writer.replies += int(replies[i])
        writer.too_long += int(too_long[i])
        report.too_long_replies += int(too_long[i])
        for ids, mask in texts:
            writer.write(ids, mask, is_whole=bool(is_chat[i]))
        tokens = sum(len(ids) for ids, _ in texts)
        report.kept += 1
        report.held_out += int(held_out[i])
        report.tokens += 0 if held_out[i] else tokens
        report.held_out_tokens += tokens if held_out[i] else 0


def count_removed(part: StoredPart, reasons: np.ndarray, report: SourceReport) -> None:
    nbytes = part.nbytes
    report.documents += len(nbytes)
    report.nbytes += int(nbytes.sum())
    for reason, name in REASONS.items():
        report.removed[name] += int((reasons == reason).sum())
        report.removed_nbytes[name] += int(nbytes[reasons == reason].sum())


def add_examples(parts: Parts, decision: Decision, items: Sequence[str], reports: Sequence[SourceReport]) -> None:
    """The first documents of each source that each reason has removed, with what they are like."""
    found = _Notes(parts)
    source_of = np.repeat(np.arange(len(parts)), [sum(found.counts[i]) for i in range(len(parts))])
    for reason, name in REASONS.items():
        for source, report in enumerate(reports):
            chosen = np.flatnonzero((decision.reasons == reason) & (source_of == source))[:EXAMPLES]
            report.examples += [_example(int(i), reason, name, decision, items, found) for i in chosen]


def _example(
    document: int, reason: int, name: str, decision: Decision, items: Sequence[str], found: "_Notes"
) -> dict[str, Any]:
    (where, text, words), item = found[document], found.item(document)
    told: dict[str, Any] = {"reason": name, "where": where, "text": text}
    if reason == CONTAMINATED:
        told |= {"item": items[item], "words": words}
    elif reason in (EQUAL, ALIKE):
        like, similarity = int(decision.like[document]), float(decision.similarity[document])
        told |= {"like": found[like][0], "like_text": found[like][1], "similarity": round(similarity, 3)}
    return told


class _Notes:
    """Notes of single documents by their number."""

    def __init__(self, parts: Parts) -> None:
        self._paths = [path for of_source in parts for path in of_source]
        self.counts = [[len(StoredPart(path).nbytes) for path in of_source] for of_source in parts]
        self.sizes = [size for of_source in self.counts for size in of_source]
        self._begins = np.cumsum([0, *self.sizes])

    def _part(self, document: int) -> tuple[StoredPart, int]:
        number = int(np.searchsorted(self._begins, document, side="right")) - 1
        return StoredPart(self._paths[number]), document - int(self._begins[number])

    def __getitem__(self, document: int) -> list[Any]:
        part, index = self._part(document)
        return part.notes[index]

    def item(self, document: int) -> int:
        part, index = self._part(document)
        return int(part.item[index])


def count_items(parts: Parts, decision: Decision, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents that each evaluation item has removed, whether any document holds words of it)."""
    removed = np.zeros(num_items, "int64")
    place = 0
    for path in (path for of_source in parts for path in of_source):
        item = StoredPart(path).item
        reasons = decision.reasons[place : place + len(item)]
        removed += np.bincount(item[reasons == CONTAMINATED], minlength=num_items)
        place += len(item)
    return removed, removed > 0


def mix(config: PrepareConfig, reports: Sequence[SourceReport]) -> list[float]:
    """Epochs of each source in an epoch of the mixture, which are put into the reports with its shares."""
    weights = np.array([source.weight for source in config.sources])
    tokens = np.array([report.tokens for report in reports], "float64")
    amounts = {
        "tokens": tokens,
        "documents": np.array([report.kept - report.held_out for report in reports], "float64"),
    }.get(config.mixture)
    epochs = weights.copy()
    if amounts is not None:
        weights = weights * (amounts > 0)
        epochs = np.divide(
            weights / weights.sum() * amounts.sum(), amounts, out=np.zeros_like(tokens), where=amounts > 0
        )
    total = float((epochs * tokens).sum())
    for report, epoch, amount in zip(reports, epochs, tokens, strict=True):
        report.epochs, report.share = round(float(epoch), 6), round(float(epoch * amount) / total, 6)
    return [report.epochs for report in reports]


def table(reports: Sequence[SourceReport]) -> Iterator[str]:
    """What became of each source, a line each that fits into 80 columns."""
    yield f"{'source':<24}{'read':>9}{'empty':>7}{'tests':>7}{'equal':>8}{'alike':>7}{'tokens':>9}{'epochs':>8}"
    for report in reports:
        name = report.spec if len(report.spec) < 24 else f"…{report.spec[-22:]}"
        counts = [_short(report.removed[reason]) for reason in REASONS.values()]
        yield (
            f"{name:<24}{_short(report.documents):>9}{counts[0]:>7}{counts[1]:>7}{counts[2]:>8}{counts[3]:>7}"
            f"{_short(report.tokens):>9}{report.epochs:>8.3g}"
        )


def _short(number: int) -> str:
    """Four digits at most: 12.3M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (size if unit != 'k' else 1000):.3g}{unit}"
    return str(number)
