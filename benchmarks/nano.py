"""kogia-nano beside its dense twin: bits per byte of books that neither has seen, and scores on held-out problems.

    python benchmarks/nano.py runs/nano [--questions 300] [--pieces N] [--out benchmarks/results/nano.json]
    python benchmarks/nano.py runs/nano --model checkpoints/kogia-nano      # as it was exported, without the twin

WORK is the directory of reproductions/kogia-nano/run.py. Bits per byte are of whole pieces of books, about 2,000 tokens
each, read in windows as long as in training, by the base models; `nano-bpb-ratio` is ours over the twin's, its 95%
interval that of 10,000 resamplings of pieces, both models' together. `nano-fp8-bpb-ratio` is what rounding to FP8 for
export does to ours after the cold start. Scores are greedy answers after the cold start,
`-gain` the paired difference to the twin's. Peer of every row is the twin.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result import row, write_result

from kogia.checkpoint.directory import load_config
from kogia.checkpoint.open import open_model
from kogia.data.config import SourceConfig
from kogia.data.sources import read_source
from kogia.engine.config import EngineConfig
from kogia.eval.config import EvalConfig
from kogia.eval.partial import find_partial
from kogia.eval.run import evaluate_tasks
from kogia.model.costs import num_active_params, num_params
from kogia.model.packed import pack
from kogia.model.transformer import Transformer
from kogia.text.tokenizer import Tokenizer

TASKS = ("countdown", "arithmetic", "knights", "strings", "mazes", "gsm8k")
OPTIONS: dict[str, dict[str, Any]] = {"arithmetic": {"length": 3}, "mazes": {"level": 4}, "strings": {"level": 2}}
BATCH_TOKENS = 65536
RESAMPLINGS = 10_000
OURS, TWIN, TUNED, ROUNDED = "base", "dense", "sft", "fp8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, help="measure this one alone; of WORK only raw/ is read")
    parser.add_argument("--twin", type=Path, help="beside --model: the dense one")
    parser.add_argument("--questions", type=int, default=300, help="of each task")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--pieces", type=int, help="of the held-out books; all if left out")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/nano.json")
    args = parser.parse_args()
    if args.model is None:
        tasks = task_rows(args, args.work / TUNED, args.work / TUNED / "evals", args.work / "dense_sft")
        rows, title = [*sizes(args.work), *book_rows(args), *tasks], "kogia-nano beside its dense twin"
    else:
        rows, title = list(alone(args)), "kogia-nano as it is exported"
    write_result(args.out, title, rows)
    print_table(rows)
    print(f"written: {args.out}")


def alone(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """An exported model: its size, bits per byte and scores, and those of a twin if there is one, both after the cold
    start."""
    models = [args.model] if args.twin is None else [args.model, args.twin]
    for id, count in (("nano-parameters", num_params), ("nano-active-parameters", num_active_params)):
        yield row(id, count(load_config(args.model)), "parameters")
    pieces = held_out(args.work, args.pieces)
    sizes = np.array([len(text.encode()) for _, text in pieces])
    found = [nats_of(model, pieces, args) for model in models]
    yield bpb_row("nano-bpb", found[0], sizes)
    if args.twin is not None:
        yield bpb_row("nano-bpb-dense", found[1], sizes)
        books = by_book([book for book, _ in pieces], *found)
        yield ratio(*found, "nano-bpb-ratio", limit=1.0, books=books)
    yield from task_rows(args, args.model, args.work / "evals", args.twin)


def sizes(work: Path) -> Iterator[dict[str, Any]]:
    """What the two models have and have seen."""
    models = [load_config(work / name) for name in (OURS, TWIN)]
    for id, count in (("nano-parameters", num_params), ("nano-active-parameters", num_active_params)):
        ours, twin = map(count, models)
        yield row(id, ours, "parameters", peer=twin)
    tokens = [last_tokens(work / name) for name in (OURS, TWIN)]
    yield row("nano-tokens", tokens[0], "tokens", peer=tokens[1])


def last_tokens(run: Path) -> int:
    """Tokens that a run was trained on, those that count."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return int(sum(json.loads(line).get("tokens", 0) for line in lines))


# Books ----------------------------------------------------------------------------------------------------------------


def book_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    pieces = held_out(args.work, args.pieces)
    sizes = np.array([len(text.encode()) for _, text in pieces])
    nats = {name: nats_of(args.work / name, pieces, args) for name in (OURS, TWIN, TUNED, ROUNDED)}
    ours, twin = nats[OURS], nats[TWIN]
    for id, name in (("nano-bpb", OURS), ("nano-bpb-dense", TWIN)):
        yield bpb_row(id, nats[name], sizes)
    books = by_book([book for book, _ in pieces], ours, twin)
    yield ratio(ours, twin, "nano-bpb-ratio", limit=1.0, books=books)
    yield ratio(nats[ROUNDED], nats[TUNED], "nano-fp8-bpb-ratio")


def bpb_row(id: str, nats: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Bits per byte of pieces, with the interval of their resampling."""
    low, high = resampled(lambda i: bpb(nats[i], sizes[i]), len(sizes))
    return row(id, bpb(nats, sizes), "bits/byte", low=low, high=high, pieces=len(sizes), bytes=int(sizes.sum()))


def ratio(ours: np.ndarray, other: np.ndarray, id: str, **extra: Any) -> dict[str, Any]:
    """Of the bits of the same pieces, with the interval of pairs."""
    low, high = resampled(lambda i: ours[i].sum() / other[i].sum(), len(ours))
    return row(id, float(ours.sum() / other.sum()), "ratio", low=low, high=high, **extra)


def held_out(work: Path, most: int | None) -> list[tuple[str, str]]:
    """(book, piece) of the books that were never trained on; `most` spread over all of them."""
    documents = list(read_source(SourceConfig(str(work / "raw/books_heldout.jsonl.gz"), text_key="text")))
    titles = list(read_source(SourceConfig(str(work / "raw/books_heldout.jsonl.gz"), text_key="title")))
    pieces = [(title.text, document.text) for title, document in zip(titles, documents, strict=True)]
    return pieces if most is None else pieces[:: max(1, len(pieces) // most)][:most]


def nats_of(model: Path, pieces: Sequence[tuple[str, str]], args: argparse.Namespace) -> np.ndarray:
    """The negative log-probability of each piece by a model."""
    opened = open_model(model, device=args.device)
    return np.array(piece_nats(opened.model, opened.tokenizer, [text for _, text in pieces], args.window))


@torch.no_grad()
def piece_nats(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], window: int) -> list[float]:
    """The negative log-probability of each text and its end, in windows that share a token: each is predicted once."""
    windows, owners = [], []
    for owner, ids in enumerate(tokenizer.encode_documents(texts)):
        for begin in range(0, max(1, len(ids) - 1), window - 1):
            windows.append(ids[begin : begin + window])
            owners.append(owner)
    totals = [0.0] * len(texts)
    step = max(1, BATCH_TOKENS // window)
    for begin in range(0, len(windows), step):
        chosen = windows[begin : begin + step]
        batch = pack(chosen).to(model.device)
        values = model.logprobs(batch).double().cpu()
        for owner, part in zip(owners[begin : begin + step], values.split([len(w) for w in chosen]), strict=True):
            totals[owner] -= float(part.sum())
    return totals


def bpb(nats: np.ndarray, sizes: np.ndarray) -> float:
    return float(nats.sum() / sizes.sum() / log(2))


def resampled(statistic: Any, count: int) -> tuple[float, float]:
    """The 95% interval of a statistic of pieces, by drawing pieces again."""
    rng = np.random.default_rng(0)
    values = [float(statistic(rng.integers(0, count, count))) for _ in range(RESAMPLINGS)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def by_book(books: Sequence[str], ours: np.ndarray, twin: np.ndarray) -> dict[str, float]:
    """The ratio of each book."""
    of = np.array(books)
    return {book: round(float(ours[of == book].sum() / twin[of == book].sum()), 4) for book in dict.fromkeys(books)}


# Tasks ----------------------------------------------------------------------------------------------------------------


def task_rows(args: argparse.Namespace, model: Path, out: Path, twin: Path | None) -> Iterator[dict[str, Any]]:
    """Scores of a model; if there is a twin with that as peer, and the paired difference."""
    twin_out = None if twin is None else args.work / "dense_sft/evals"
    others = [None] * len(TASKS) if twin is None else evaluated(args, twin, twin_out, None)
    for task, other, summary in zip(TASKS, others, evaluated(args, model, out, twin_out), strict=True):
        mean, low, high = summary["greedy"]
        peer = {} if other is None else {"peer": [round(value, 4) for value in other["greedy"]]}
        yield row(f"nano-{task}", mean, "share right", low=low, high=high, questions=args.questions, **peer)
        if other is not None:
            mean, low, high = summary["compare"]["greedy"]["difference"]
            yield row(f"nano-{task}-gain", mean, "share right", low=low, high=high)


def evaluated(args: argparse.Namespace, model: Path, out: Path, compare: Path | None) -> list[dict[str, Any]]:
    """Summaries by task, kept in `out`; goes on where it was interrupted."""
    gsm8k = {"path": str(args.work / "raw/gsm8k_test.jsonl.gz"), "instruction": ""}
    return evaluate_tasks(
        EvalConfig(
            str(model),
            tasks=TASKS,
            task_options=OPTIONS | {"gsm8k": gsm8k},
            num_questions=args.questions,
            num_samples=0,
            greedy=True,
            max_tokens=args.max_tokens,
            out=str(out),
            resume=any(find_partial(out, f"heldout-{task}") for task in TASKS),
            name="heldout",
            compare=None if compare is None else str(compare),
            engine=EngineConfig(max_sequences=128),
            verify_workers=4,
            long_prompts="skip",
            device=args.device,
            quiet=True,
        )
    )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    for each in rows:
        low, high = each.get("low"), each.get("high")
        bounds = "" if low is None else f"{low:.4g} to {high:.4g}"
        print(f"{each['id']:<24}{each['value']:>14.6g}  {bounds:<20} {each['unit']:<12} {each.get('peer', '')}")


if __name__ == "__main__":
    sys.exit(main())
