"""What `kogia prepare` removes from real data, and how fast it hashes, tokenises and deduplicates.

    python benchmarks/prepare.py --data DATA --dir SCRATCH [--repeats 3] [--out RESULT.json] [--docs docs/prepare.md]

DATA holds text/books_part*.jsonl.gz and math/{gsm8k,math}_{train,test}.jsonl.gz with the columns question and solution.
Three parts:

* Removed: the command on books and both training sets against both test sets; what other lengths of words in a row
  would have removed; and of the problems with a hundredth of them added again, verbatim, and another hundredth with one
  word in fifty changed, how many of these go, and how many others.
* Speed of one process: some books and problems through each step, in CPU seconds. Beside it datasketch's MinHash, where
  that is installed.
* Batches in order and by best fit: how full they are, and what making the order of an epoch takes.
"""

import argparse
import gzip
import json
import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from result import row, write_result

from kogia.data.config import DataConfig
from kogia.data.loader import Loader
from kogia.data.rows import Document
from kogia.data.shards import open_shard
from kogia.data.sources import read_source
from kogia.prepare import run
from kogia.prepare.config import EvaluationConfig, PrepareConfig, PreparedSource
from kogia.prepare.evaluations import read_evaluations
from kogia.prepare.part import Recipe, make_part
from kogia.prepare.words import SHINGLE, hash_words, signature, split_words
from kogia.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TEMPLATE = "{question}\n{solution}"
VOCAB_SIZE = 16384
TOKENIZER_DOCUMENTS = 40
NGRAMS = (8, 10, 13)
BEGIN, END = "<!-- figures: benchmarks/results/prepare.json -->", "<!-- end of figures -->"
AGAIN = 100
"""Of so many documents one is added again, verbatim, and another with changes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--dir", type=Path, required=True, help="scratch directory; what a run before has prepared stays"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/prepare.json")
    parser.add_argument("--docs", type=Path, default=None, help="page to write the figures into, as docs/prepare.md")
    args = parser.parse_args()
    scratch = args.dir / "prepare-benchmark"
    config = settings(args.data, scratch)
    rows = command_rows(config)
    rows += removed_rows(config)
    rows += again_rows(config, scratch)
    rows += speed_rows(config, args.repeats)
    rows += packing_rows(Path(config.out))
    write_result(args.out, "prepare", rows)
    print(json.dumps(rows, indent=1))
    if args.docs:
        write_docs(args.docs, json.loads(args.out.read_text(encoding="utf-8")))


def settings(data: Path, scratch: Path) -> PrepareConfig:
    sources = (
        PreparedSource(str(data / "text" / "books_part*.jsonl.gz")),
        PreparedSource(str(data / "math" / "gsm8k_train.jsonl.gz"), template=TEMPLATE),
        PreparedSource(str(data / "math" / "math_train.jsonl.gz"), template=TEMPLATE),
    )
    tests = tuple(EvaluationConfig(str(data / "math" / f"{name}_test.jsonl.gz")) for name in ("gsm8k", "math"))
    return PrepareConfig(
        out=str(scratch / "prepared"),
        tokenizer_documents=TOKENIZER_DOCUMENTS,
        sources=sources,
        vocab_size=VOCAB_SIZE,
        evaluations=tests,
        val_share=0.01,
        quiet=True,
    )


def command_rows(config: PrepareConfig) -> list[dict[str, Any]]:
    """What the whole command leaves of the sources."""
    run.main(config)
    report = json.loads((Path(config.out) / "report.json").read_text())
    nbytes, tokens = 0, 0
    rows = []
    for source in report["sources"]:
        removed = source["removed"]
        nbytes += source["nbytes"] - sum(source["removed_nbytes"].values())
        tokens += source["tokens"] + source["held_out_tokens"]
        rows.append(
            row(
                f"removed-{short(source['spec'])}",
                sum(removed.values()),
                "documents",
                of=source["documents"],
                **removed,
            )
        )
    return [
        row("tokens", tokens, "tokens", vocab_size=VOCAB_SIZE),
        row("bytes-per-token", nbytes / tokens, "bytes"),
        *rows,
    ]


def removed_rows(config: PrepareConfig) -> list[dict[str, Any]]:
    """Documents that each length of words in a row would remove, and the items of which they have words."""
    rows = []
    words = {
        source.spec: [hash_words(split_words(document.text)) for document in read_source(source)]
        for source in config.sources
    }
    for ngram in NGRAMS:
        tests = read_evaluations(config.evaluations, ngram, config.phrase_items)
        for spec, documents in words.items():
            hits = [found for found in tests.index.find_each(documents) if found is not None]
            items = len({item for item, _, _ in hits})
            rows.append(
                row(f"contaminated-{ngram}-{short(spec)}", len(hits), "documents", of=len(documents), items=items)
            )
        rows += [
            row(f"phrases-{ngram}-{short(each['spec'])}", each["phrases"], "runs", of=each["runs"] + each["phrases"])
            for each in tests.sets
        ]
    return rows


def short(spec: str) -> str:
    """books, gsm8k-train, ..."""
    return Path(spec).name.partition(".")[0].replace("_part*", "").replace("_", "-")


def again_rows(config: PrepareConfig, scratch: Path) -> list[dict[str, Any]]:
    """Of documents added again, how many are found, and how many others go as well."""
    texts = problems(config)
    draw, added = random.Random(0), scratch / "again.jsonl"
    chosen = draw.sample(texts, 2 * len(texts) // AGAIN)
    half = len(chosen) // 2
    with added.open("w") as file:
        for text in [*chosen[:half], *(changed(text, draw) for text in chosen[half:])]:
            file.write(json.dumps({"text": text}) + "\n")
    sources = (*config.sources[1:], PreparedSource(str(added)))
    out, tokenizer = f"{config.out}-added", str(Path(config.out) / "tokenizer")
    run.main(replace(config, out=out, sources=sources, evaluations=(), tokenizer=tokenizer, vocab_size=None))
    report = json.loads((Path(out) / "report.json").read_text())["sources"]
    shutil.rmtree(out)
    removed = report[-1]["removed"]
    others = sum(source["removed"]["equal"] + source["removed"]["alike"] for source in report[:-1])
    return [
        row("again-equal-found", removed["equal"], "documents", of=half),
        row("again-alike-found", removed["alike"], "documents", of=len(chosen) - half),
        row("again-others-removed", others, "documents", of=len(texts)),
    ]


def changed(text: str, draw: random.Random) -> str:
    """One word in fifty replaced, at least one."""
    words = text.split(" ")
    for at in draw.sample(range(len(words)), max(1, len(words) // 50)):
        words[at] = "whale"
    return " ".join(words)


def problems(config: PrepareConfig) -> list[str]:
    found = []
    for source in config.sources[1:]:
        with gzip.open(source.spec, "rt", encoding="utf-8") as lines:
            found += ["{question}\n{solution}".format(**json.loads(line)) for line in lines]
    return found


def books(config: PrepareConfig, count: int) -> list[str]:
    first = Path(config.sources[0].spec).with_name("books_part1.jsonl.gz")
    with gzip.open(first, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(count), lines, strict=False)]


def speed_rows(config: PrepareConfig, repeats: int) -> list[dict[str, Any]]:
    """MB of text per CPU second of one process, median of `repeats` and their range."""
    tokenizer = Tokenizer.load(Path(config.out) / "tokenizer")
    index = read_evaluations(config.evaluations, config.ngram, config.phrase_items).index
    recipe = Recipe(tokenizer, index, None, 0.01)
    rows = []
    for kind, texts in (("books", books(config, 6)), ("problems", problems(config)[::4])):
        words = [hash_words(split_words(text)) for text in texts]
        documents = [Document(text) for text in texts]
        steps: dict[str, Callable[[], object]] = {
            "words": lambda texts=texts: [hash_words(split_words(text)) for text in texts],
            "minhash": lambda words=words: [signature(each) for each in words],
            "decontaminate": lambda words=words: index.find_each(words),
            "tokenise": lambda texts=texts: [
                tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts
            ],
            "whole": lambda documents=documents: make_part(documents, recipe, near=True).to_bytes(),
        }
        if theirs := datasketch_minhash(texts):
            steps["datasketch-minhash"] = theirs
        size = sum(len(text.encode()) for text in texts) / 1e6
        for name, step in steps.items():
            speeds = [size / cpu_seconds(step) for _ in range(repeats)]
            rows.append(row(f"speed-{kind}-{name}", median(speeds), "MB/s", low=min(speeds), high=max(speeds)))
    return rows


def datasketch_minhash(texts: Iterable[str]) -> Callable[[], object] | None:
    """Their signatures of the same shingles, of a tenth of the time; None where it is not installed."""
    try:
        from datasketch import MinHash
    except ImportError:
        return None

    def step() -> None:
        for text in texts:
            words = split_words(text)
            spans = range(max(1, len(words) - SHINGLE + 1))
            MinHash(num_perm=128).update_batch([" ".join(words[i : i + SHINGLE]).encode() for i in spans])

    return step


def cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def packing_rows(prepared: Path) -> list[dict[str, Any]]:
    """How full batches of 16,384 tokens are, of texts cut to 2,048 and to 16,384, and the time to order an epoch."""
    rows = []
    for longest in (2048, 16384):
        shard = open_shard(prepared / "train", longest)
        for packing in ("in_order", "best_fit"):
            loader = Loader(
                shard, weights=(1.0, 3.0, 3.0), batch_tokens=DataConfig().batch_tokens, seed=0, packing=packing
            )
            start = time.process_time()
            loader._load_epoch(0)
            seconds = time.process_time() - start
            used = [int(shard.lengths[batch].sum()) for batch in batches(loader)]
            fill = float(np.mean(used)) / loader.batch_tokens
            rows.append(
                row(
                    f"fill-{longest}-{packing}",
                    100 * fill,
                    "%",
                    order_seconds=round(seconds, 3),
                    sequences=len(loader._order),
                )
            )
    return rows


def batches(loader: Loader) -> Iterable[np.ndarray]:
    while loader.state.epoch == 0:
        yield loader._next_sequences()


def write_docs(page: Path, result: dict[str, Any]) -> None:
    """Put the tables between the marks of a page."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    text = "\n".join([BEGIN, *figures(result), END])
    page.write_text(head + text + rest.partition(END)[2], encoding="utf-8")


def spread(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.1f} ({figure['low']:.1f} to {figure['high']:.1f})"


def figures(result: dict[str, Any]) -> list[str]:
    rows = {each["id"]: each for each in result["rows"]}
    named = {"books": "books", "gsm8k-train": "GSM8K, training", "math-train": "MATH, training"}
    place = f"{result['hardware']['cpu']}, commit {result['commit'][:7]}"
    lines = [
        "Documents with so many words in a row of a question of GSM8K's or MATH's tests, and those equal to or alike "
        f"an earlier one ({place}):",
        "",
        f"| source | documents | {' | '.join(f'{n} words' for n in NGRAMS)} | equal | alike |",
        f"|{'---|' * (4 + len(NGRAMS))}",
    ]
    for id, name in named.items():
        counts = [f"{rows[f'contaminated-{n}-{id}']['value']:,.0f}" for n in NGRAMS]
        of = rows[f"removed-{id}"]
        lines.append(f"| {name} | {of['of']:,} | {' | '.join(counts)} | {of['equal']} | {of['alike']} |")
    equal, alike, others = (rows[f"again-{kind}"] for kind in ("equal-found", "alike-found", "others-removed"))
    lines += [
        "",
        f"Of problems added again verbatim {equal['value']:.0f} of {equal['of']} go as equal, of those with one word "
        f"in fifty changed {alike['value']:.0f} of {alike['of']} as alike,",
        f"and of the {others['of']:,} others {others['value']:.0f}.",
        "",
        "| MB of text per CPU second, one process | books | problems |",
        "|---|---|---|",
    ]
    steps = {
        "tokenise": f"tokenise ({rows['tokens']['vocab_size']:,} tokens)",
        "words": "words",
        "minhash": "MinHash of them",
        "decontaminate": "look for 10 words in a row",
        "whole": "all of it",
        "datasketch-minhash": "(words and MinHash with datasketch)",
    }
    for id, name in steps.items():
        found = [rows.get(f"speed-{kind}-{id}") for kind in ("books", "problems")]
        if all(found):
            lines.append(f"| {name} | {' | '.join(spread(each) for each in found if each)} |")
    fills = [
        f"{n:,} tokens: {rows[f'fill-{n}-in_order']['value']:.1f}% full in order, "
        f"{rows[f'fill-{n}-best_fit']['value']:.1f}% by best fit"
        for n in (2048, 16384)
    ]
    return [*lines, "", f"Batches of 16,384 tokens, texts cut to {'; to '.join(fills)}."]


if __name__ == "__main__":
    main()
