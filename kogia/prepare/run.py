"""`kogia prepare`: read, hash and tokenise in parallel, decide over all documents, write what stays.

While at work OUT holds prepare.toml (the settings), inputs.json (the state of what is read), tokenizer/ and parts/; at
the end train/, val/, report.json, and last meta.json, by which it is known to be complete, in the place of parts/.
"""

import base64
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import tomli_w

from kogia import log
from kogia.checkpoint.directory import resolve_tokenizer_dir
from kogia.checkpoint.gguf_tokenizer import load_tokenizer
from kogia.config import load_toml, save_toml, to_dict
from kogia.cores import usable_cores
from kogia.data.config import PREPARED, UNCUT, is_of_files, is_prepared
from kogia.data.shards import META, SPLITS, open_shard, source_state, splits_digest, token_dtype, tokenizer_digest
from kogia.data.sources import has_document, read_source, source_files
from kogia.files import (
    check_directory,
    empty_directory,
    is_draft,
    replacing_directory,
    replacing_file,
    write_json,
    writing,
)
from kogia.plan.dry_run import mib
from kogia.prepare.assemble import SourceReport, add_examples, assemble, count_items, mix, table
from kogia.prepare.chunks import Chunk, chunks, source_bytes, text_bytes
from kogia.prepare.config import Dedup, PrepareConfig
from kogia.prepare.decide import decide
from kogia.prepare.evaluations import Evaluations, read_evaluations
from kogia.process import LineWorker, WorkerLost
from kogia.terminal import LiveLine
from kogia.text.chat import render_text
from kogia.text.tokenizer import Tokenizer, check_vocab_size, train_bpe
from kogia.train.lock import sole_writer
from kogia.train.run_dir import changes

PARTS, INPUTS, REPORT, TOKENIZER = "parts", "inputs.json", "report.json", "tokenizer"
HARMLESS = ("out", "workers", "overwrite", "dry_run", "quiet", "mixture")
"""Settings that change nothing of the tokens. Nor do weights of sources."""
CHUNK_SECONDS = 3600.0
"""For one chunk; a generator may be slow."""
BYTES_PER_TOKEN = 3.0
"""Of text, where the tokens are not known yet."""


@dataclass(frozen=True)
class Plan:
    """What can begin."""

    config: PrepareConfig
    sizes: tuple[int, ...]
    """Bytes of each source, as progress is reckoned."""
    needed: int
    """Bytes of disk, about."""
    evaluations: Evaluations


def main(config: PrepareConfig) -> None:
    """Prepare the data and say what became of them. ValueError for what cannot be read, OSError for a full disk."""
    plan = plan_preparation(config)
    if config.dry_run:
        return print_plan(plan)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        report = _prepare(plan, out)
    for line in report:
        log.info(line)
    meta = _read_json(out / META)
    told = f"{meta['tokens']:,} tokens, {meta['held_out_tokens']:,} more held out"
    size = Tokenizer.load(out / TOKENIZER).vocab_size
    model = "--model.preset", "kogia-demo", "--model.vocab-size", str(size)
    log.conclude(told, out, "kogia", "pretrain", "--data", out, *model, "--out", "runs/base", "--steps", "1000")


# Before the work ------------------------------------------------------------------------------------------------------


def plan_preparation(config: PrepareConfig) -> Plan:
    """Raises ValueError for whatever of the settings would end the work later; writes nothing."""
    config.check_complete()
    _check_out(config)
    for source in config.sources:
        if is_prepared(source.spec):
            raise ValueError(f"source {source.spec!r}: is prepared already; name what it was made of")
    if config.tokenizer is not None:
        load_tokenizer(resolve_tokenizer_dir(config.tokenizer))
    elif config.vocab_size is not None:
        check_vocab_size(config.vocab_size)
    filled = [source for source in config.sources if has_document(source)]
    if not filled:
        specs = ", ".join(source.spec for source in config.sources)
        raise ValueError(f"{specs}: no document in it; name a source that has some, or fill it first")
    evaluations = read_evaluations(config.evaluations, config.ngram, config.phrase_items)
    plan = Plan(config, tuple(map(source_bytes, config.sources)), _needed_bytes(config), evaluations)
    _check_space(plan)
    return plan


def _check_out(config: PrepareConfig) -> None:
    out = Path(config.out)
    check_directory(out)
    if not out.exists():
        return
    recipe = out / PREPARED
    if not recipe.exists():
        if any(not is_draft(path, PREPARED) for path in out.iterdir()):
            raise ValueError(f"out = {config.out!r}: holds other files and no {PREPARED}; name a new directory")
        return
    if config.overwrite:
        return
    weights = {f"sources[{i}].weight" for i in range(len(config.sources))}
    if changed := changes(load_toml(recipe, PrepareConfig), config, {*HARMLESS, *weights}):
        raise ValueError(
            f"out = {config.out!r}: was begun with other settings: {', '.join(changed)}; undo the change to go on, add "
            "--overwrite to begin anew, or name another --out"
        )


def _needed_bytes(config: PrepareConfig) -> int:
    """Parts and what is made of them stand side by side at the end: tokens and mask, signatures."""
    texts = sum(text_bytes(source) for source in config.sources)
    per_token = 2 if (config.vocab_size or 0) <= 2**16 else 4
    return int(texts / BYTES_PER_TOKEN * 2 * (per_token + 1))


def _check_space(plan: Plan) -> None:
    out = Path(plan.config.out).absolute()
    there = next(place for place in (out, *out.parents) if place.exists())
    free = shutil.disk_usage(there).free
    begun = sum(path.stat().st_size for path in (out / PARTS).glob("*.npz"))
    if not (out / META).exists() and free + begun < plan.needed:
        raise ValueError(
            f"out = {plan.config.out!r}: takes about {mib(plan.needed)} of disk, and {mib(free)} are free; make room, "
            "or name another place"
        )


def print_plan(plan: Plan) -> None:
    """The resolved configuration, what would be read and what written, on stdout; nothing is written."""
    config = plan.config
    print(tomli_w.dumps(to_dict(config)))
    for source, size in zip(config.sources, plan.sizes, strict=True):
        count = f"{len(source_files(source))} files, {mib(size)}" if is_of_files(source.spec) else "a generator"
        print(f"# {'reads':<12}{source.spec}: {count}, about {mib(text_bytes(source))} of text; {config.level(source)}")
    for each in config.evaluations:
        print(f"# {'keeps out':<12}{each.spec}: {config.ngram} words in a row")
    tokens = sum(map(text_bytes, config.sources)) / BYTES_PER_TOKEN
    print(f"# {'writes':<12}{config.out}: about {tokens:,.0f} tokens; {mib(plan.needed)} of disk while at work")
    print(f"# {'workers':<12}{_num_workers(config)}")


# The work -------------------------------------------------------------------------------------------------------------


def _prepare(plan: Plan, out: Path) -> list[str]:
    """All that is still to be done; returns the table of what became of the sources."""
    config = plan.config
    _check_out(config)
    if config.overwrite:
        empty_directory(out, last=PREPARED)
    save_toml(replace(config, overwrite=False), out / PREPARED)
    inputs = _check_inputs(config, out)
    if (out / META).exists():
        if (reports := _reports(out)) is not None:
            _remove_parts(out)
            log.info(f"{out} is complete")
            return _finish(config, out, reports)
        (out / META).unlink()
    (out / PARTS).mkdir(exist_ok=True)
    tokenizer = _tokenizer(config, out)
    write_json(out / INPUTS, inputs)
    evaluations = plan.evaluations
    index = out / PARTS / "evaluations.npz"
    with replacing_file(index) as draft, writing(index):
        evaluations.index.save(draft)
    with ExitStack() as stack:
        parts = Workers(config, out, stack).run(plan)
    return _conclude(config, out, parts, evaluations, tokenizer)


def _reports(out: Path) -> list[SourceReport] | None:
    """What a finished preparation has told of its sources; None, with a word, where it is damaged: it is made anew."""
    try:
        for split in SPLITS:
            open_shard(out / split, UNCUT)
        meta = _read_json(out / META)
        if splits_digest(out, str(meta.get("tokenizer"))) != meta.get("fingerprint"):
            raise ValueError(f"{out}: train/ and val/ are not those that it was finished with")
        return [SourceReport(**each) for each in _read_json(out / REPORT)["sources"]]
    except (ValueError, TypeError, KeyError) as error:
        log.warn(f"{error}: the data are made anew")
        return None


def _read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError with the file's name where it is none, or holds no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({error}); add --overwrite to begin anew") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: damaged (it holds no object); add --overwrite to begin anew")
    return found


def _check_inputs(config: PrepareConfig, out: Path) -> dict[str, Any]:
    """The state of all that is read. ValueError where it is another than that with which the work was begun."""
    sources = [source_state(source) for source in config.sources]
    inputs = json.loads(json.dumps({"files": {file: s for each in sources for file, s in each["files"].items()}}))
    if (out / INPUTS).exists():
        before = _read_json(out / INPUTS).get("files", {})
        now = inputs["files"]
        if changed := [file for file in sorted(before.keys() | now.keys()) if before.get(file) != now.get(file)]:
            raise ValueError(
                f"out = {config.out!r}: {', '.join(changed[:3])} changed since it was begun (other size, time or "
                "files); add --overwrite to begin anew, or name another --out"
            )
    return inputs


def _tokenizer(config: PrepareConfig, out: Path) -> Tokenizer:
    """The one that is there already, else that of the settings or a new one, which is kept in OUT/tokenizer."""
    if not (out / TOKENIZER).exists():
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(resolve_tokenizer_dir(config.tokenizer))
        else:
            assert config.vocab_size is not None, "check_complete has seen to it"
            tokenizer = train_bpe(_texts(config), config.vocab_size)
            log.info(f"trained a tokenizer of {tokenizer.vocab_size} tokens")
        with replacing_directory(out / TOKENIZER) as draft, writing(out / TOKENIZER):
            tokenizer.save(draft)
    return Tokenizer.load(out / TOKENIZER)


def _texts(config: PrepareConfig) -> Iterator[str]:
    for source in config.sources:
        for document in islice(read_source(source), config.tokenizer_documents):
            if document.prompt:
                yield render_text(document.prompt)
            yield document.text


def _num_workers(config: PrepareConfig) -> int:
    return config.workers or len(usable_cores())


class Workers:
    """Processes that make parts of chunks, and the chunks on their way to them."""

    def __init__(self, config: PrepareConfig, out: Path, stack: ExitStack) -> None:
        self.config, self.place = config, out / PARTS
        self.tokens = 0
        setup = {
            "tokenizer": str((out / TOKENIZER).absolute()),
            "index": str((self.place / "evaluations.npz").absolute()),
            "max_seqlen": config.max_seqlen,
            "val_share": config.val_share,
        }
        self._idle: SimpleQueue[LineWorker] = SimpleQueue()
        self._threads = stack.enter_context(ThreadPoolExecutor(_num_workers(config)))  # each waits for a worker
        for _ in range(_num_workers(config)):
            worker = LineWorker("kogia.prepare.worker", setup, cpu_seconds=CHUNK_SECONDS, wall_seconds=CHUNK_SECONDS)
            stack.callback(worker.close)
            self._idle.put(worker)
        stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)  # before the workers end

    def run(self, plan: Plan) -> list[list[Path]]:
        """The parts of each source, in order, made as far as they are not there."""
        found, total = [], sum(plan.sizes)
        with LiveLine(Path(self.config.out).name, quiet=self.config.quiet) as line:
            line.begin(0, total >> 20)
            done = 0
            for number, size in enumerate(plan.sizes):
                found.append(self._source(number, done, size, total, line))
                done += size
            line.update(total >> 20, total >> 20, fields=[f"{self.tokens:,} tokens"])
        return found

    def _source(self, number: int, before: int, size: int, total: int, line: LiveLine) -> list[Path]:
        source = self.config.sources[number]
        mark = self.place / f"{number:03d}.json"
        if mark.exists():
            count = int(_read_json(mark)["chunks"])
        else:
            count = self._make(number, before, size, total, line)
            write_json(mark, {"spec": source.spec, "chunks": count})
        return [self._path(number, chunk) for chunk in range(count)]

    def _make(self, number: int, before: int, size: int, total: int, line: LiveLine) -> int:
        """Have the parts of a source made; returns their number."""
        source = self.config.sources[number]
        near = self.config.level(source) == "near"
        waiting: deque[Future[dict[str, Any] | None]] = deque()
        texts, expected, count = 0, max(1, text_bytes(source)), 0
        start = time.monotonic()
        for chunk in chunks(source):
            count += 1
            path = self._path(number, chunk.number)
            if not path.exists():
                waiting.append(self._threads.submit(self._ask, chunk, path, near))
            while len(waiting) > 2 * _num_workers(self.config) or (waiting and waiting[0].done()):
                texts += self._settle(waiting)
                rate = f"{texts / 1e6 / (time.monotonic() - start):.1f} MB/s"
                seen = before + int(size * min(1.0, texts / expected))
                line.update(seen >> 20, total >> 20, rate=rate, fields=[f"{self.tokens:,} tokens"])
        while waiting:
            self._settle(waiting)
        return count

    def _settle(self, waiting: "deque[Future[dict[str, Any] | None]]") -> int:
        """Bytes of the text of the chunk that was sent first, once it is done."""
        answer = waiting.popleft().result()
        if answer is None:
            return 0
        self.tokens += answer["tokens"]
        return answer["nbytes"]

    def _ask(self, chunk: Chunk, path: Path, near: bool) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            answer = worker.ask(chunk.load | {"near": near})
        except WorkerLost as error:
            raise ValueError(
                f"{path}: the process that was to make it {error}; where memory is short, give fewer --workers; the "
                "same command goes on"
            ) from None
        finally:
            self._idle.put(worker)  # of one that is lost the next one to ask learns it too
        if "error" in answer:
            raise ValueError(answer["error"])
        with replacing_file(path) as draft, writing(path):
            draft.write_bytes(base64.b64decode(answer.pop("part")))
        return answer

    def _path(self, source: int, chunk: int) -> Path:
        return self.place / f"{source:03d}-{chunk:06d}.npz"


# After it -------------------------------------------------------------------------------------------------------------


def _conclude(
    config: PrepareConfig, out: Path, parts: list[list[Path]], evaluations: Evaluations, tokenizer: Tokenizer
) -> list[str]:
    levels: list[tuple[Path, Dedup]] = [
        (path, config.level(s)) for s, paths in zip(config.sources, parts, strict=True) for path in paths
    ]
    decision = decide(levels, config.near_threshold, out / PARTS)
    reports = [SourceReport(source.spec) for source in config.sources]
    assemble(out, parts, decision, token_dtype(tokenizer), reports)
    if not sum(report.tokens for report in reports):
        raise ValueError(f"out = {config.out!r}: no training document is left; {'; '.join(table(reports))}")
    add_examples(parts, decision, evaluations.items, reports)
    _count_evaluations(evaluations, parts, decision)
    lines = _finish(config, out, reports, evaluations.sets)
    _remove_parts(out)
    return lines


def _count_evaluations(evaluations: Evaluations, parts: list[list[Path]], decision: Any) -> None:
    removed, found = count_items(parts, decision, len(evaluations.items))
    first = 0
    for each in evaluations.sets:
        end = first + each["items"]
        each["removed"], each["found"] = int(removed[first:end].sum()), int(found[first:end].sum())
        first = end


def _finish(
    config: PrepareConfig, out: Path, reports: Sequence[SourceReport], sets: list[dict[str, Any]] | None = None
) -> list[str]:
    """Write report and meta.json; also where only weights have changed, then without `sets`, which stay."""
    epochs = mix(config, reports)
    if sets is None:
        sets = _read_json(out / REPORT)["evaluations"]
    settings = {"dedup": config.dedup, "near_threshold": config.near_threshold, "ngram": config.ngram}
    write_json(out / REPORT, settings | {"sources": [asdict(each) for each in reports], "evaluations": sets})
    tokenizer = tokenizer_digest(Tokenizer.load(out / TOKENIZER))
    meta = {
        "fingerprint": splits_digest(out, tokenizer),
        "tokenizer": tokenizer,
        "names": [source.spec for source in config.sources],
        "weights": epochs,
        "tokens": sum(report.tokens for report in reports),
        "held_out_tokens": sum(report.held_out_tokens for report in reports),
    }
    write_json(out / META, meta)
    return list(table(reports))


def _remove_parts(out: Path) -> None:
    if (out / PARTS).exists():
        empty_directory(out / PARTS, last="")
        (out / PARTS).rmdir()
