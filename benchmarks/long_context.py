"""A longer context for a small model, in two phases, and how far it looks before, between and after them.

    python benchmarks/long_context.py --work runs/nano [--device cuda] [--out benchmarks/results/long_context.json]
    python benchmarks/long_context.py --small DATA --dir SCRATCH     # on a CPU, in minutes

kogia-nano's base model (WORK/base), trained on rows of 1,024 tokens, is brought to 8k and 32k on whole books (those of
WORK/raw, put together again). With --small a model of 0.5 million parameters is trained on rows of 256 tokens of the
books in DATA/text first, and brought to 1k and 4k. Measured by `kogia context` on held-out books, the same windows each
time: positions as they were, only further; stretched by YaRN, nothing trained; after the first phase; after the second.
`long-context-WHO-FROM-TO` is the loss of tokens that have so many before them, in nats; pass keys are beside it.
What is trained is kept in --dir, and not trained again. The picture goes where --picture says.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from result import row, write_result

from kogia.checkpoint.hf import load_model, read_stored, save_model
from kogia.checkpoint.open import pick_device
from kogia.data.config import DataConfig, SourceConfig
from kogia.engine.config import EngineConfig
from kogia.eval.config import ContextConfig
from kogia.eval.context import measure, plan_measurement
from kogia.files import write_json
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.text.tokenizer import Tokenizer
from kogia.train import supervised
from kogia.train.config import OptimConfig, SupervisedConfig
from kogia.train.context import extended_config

ROOT = Path(__file__).parent.parent
SMALL = ModelConfig(
    vocab_size=1024,
    dim=96,
    num_layers=3,
    ffn_dim=256,
    attention=MLAConfig(num_heads=4, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=24),
    moe=MoEConfig(num_experts=8, topk=2, expert_dim=64),
    max_position=256,
    tie_embeddings=True,
)


@dataclass(frozen=True)
class Job:
    place: Path
    base: Path
    books: Path
    """Whole ones to train on."""
    held_out: Path
    trained: int
    """Tokens of the rows that the base model was trained on."""
    phases: tuple[tuple[int, int], ...]
    """(tokens of a row, steps) of each."""
    batch_tokens: int
    lr: float
    lengths: tuple[int, ...]
    windows: int
    keys: int
    dtype: Any
    device: str

    @property
    def yarn(self) -> YarnConfig:
        return YarnConfig(factor=self.phases[-1][0] / self.trained, original_max_position=self.trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--work", type=Path, help="kogia-nano's directory, as runs/nano")
    kind.add_argument("--small", type=Path, help="directory with text/books_part1.jsonl.gz")
    parser.add_argument("--base", type=Path, help="model to begin with in the place of WORK/base")
    parser.add_argument("--dir", type=Path, default=Path("runs/long"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, nargs=2, help="of the phases")
    parser.add_argument("--megabytes", type=float, default=24.0, help="of books to train on")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/long_context.json, or _small.json")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    job = nano(args) if args.work else small(args)
    results = {}
    for who, directory in models(job):
        config = ContextConfig(
            str(directory), text=(str(job.held_out),), lengths=job.lengths, windows=job.windows, keys=job.keys,
            depths=(0.0, 0.5, 1.0), device=job.device, quiet=True, threads=1 if args.small else None,
            engine=EngineConfig(cache_memory_bytes=1 << 30),
        )  # fmt: skip
        results[who] = measure(config, plan_measurement(config))
        write_json(job.place / f"{who}.json", results[who])
        print(f"{time.monotonic() - began:5.0f} s  {who}: {words(results[who])}", file=sys.stderr, flush=True)
    name = "long_context.json" if args.work else "long_context_small.json"
    settings = {"phases": [list(phase) for phase in job.phases], "batch_tokens": job.batch_tokens, "lr": job.lr}
    write_result(
        args.out or ROOT / "benchmarks/results" / name, "long context",
        [row("long-context-seconds", time.monotonic() - began, "s", **settings), *rows(results)],
    )  # fmt: skip
    if args.picture:
        draw(results, job.trained, args.picture)


def nano(args: argparse.Namespace) -> Job:
    steps = args.steps or (60, 40)
    place = args.dir
    raw = args.work / "raw"
    return Job(
        place, args.base or args.work / "base",
        whole_books(raw / "books_train.jsonl.gz", place / "books.jsonl.gz", args.megabytes),
        whole_books(raw / "books_heldout.jsonl.gz", place / "held_out.jsonl.gz", 1e9),
        1024, ((8192, steps[0]), (32768, steps[1])), 262144, 3e-4,
        (512, 1024, 2048, 4096, 8192, 16384, 32768), 8, 3, torch.bfloat16, args.device,
    )  # fmt: skip


def small(args: argparse.Namespace) -> Job:
    steps, place = args.steps or (24, 24), args.dir
    lines = iter(read_rows(args.small / "text" / "books_part1.jsonl.gz"))
    held_out = write_rows(place / "held_out.jsonl.gz", [next(lines) for _ in range(3)])
    books = write_rows(place / "books.jsonl.gz", up_to(lines, min(args.megabytes, 4.0)))
    data = DataConfig((SourceConfig(str(books)),), batch_tokens=4096, max_seqlen=256, packing="joined")
    optim = OptimConfig(kind="muon", lr=4e-3, schedule="wsd", warmup_steps=20)
    base = SupervisedConfig(
        str(place / "base"), model=SMALL, data=data, optim=optim, steps=240, device=args.device, threads=1, quiet=True,
        tokenizer_documents=4,
    )  # fmt: skip
    trained(base)
    return Job(
        place, place / "base", books, held_out, 256, ((1024, steps[0]), (4096, steps[1])), 8192, 4e-4,
        (256, 1024, 4096), 12, 1, torch.float32, args.device,
    )  # fmt: skip


def models(job: Job) -> Iterator[tuple[str, Path]]:
    """(who, where) of each that is measured, made when it is its turn."""
    stored = read_stored(job.base)
    longest = job.phases[-1][0]
    yield "unchanged", changed(job, replace(stored.config, max_position=longest), "unchanged")
    yield "stretched", changed(job, extended_config(stored.config, job.yarn), "stretched")
    init = job.base
    for number, (length, steps) in enumerate(job.phases, start=1):
        out = job.place / f"phase{number}"
        data = DataConfig(
            (SourceConfig(str(job.books)),), batch_tokens=job.batch_tokens, packing="joined", max_seqlen=length
        )
        optim = OptimConfig(kind="muon", lr=job.lr, schedule="constant", warmup_steps=min(5, steps))
        trained(SupervisedConfig(
            str(out), init=str(init), data=data, optim=optim,
            steps=steps, dtype="bfloat16" if job.dtype == torch.bfloat16 else "float32", device=job.device, quiet=True,
            extend_context=job.yarn if number == 1 else None, threads=1 if job.device == "cpu" else None,
        ))  # fmt: skip
        yield f"phase{number}", out
        init = out


def changed(job: Job, config: ModelConfig, name: str) -> Path:
    """The base model with other positions."""
    out, stored = job.place / name, read_stored(job.base)
    if not out.exists():
        model = load_model(replace(stored, config=config), device=pick_device(job.device), dtype=job.dtype)
        save_model(model, out, Tokenizer.load(stored.directory))
    return out


def trained(config: SupervisedConfig) -> None:
    """Run it, or what is left of it."""
    supervised.run_stage(replace(config, resume=Path(config.out).exists()))


# Books ----------------------------------------------------------------------------------------------------------------


def whole_books(pieces: Path, target: Path, megabytes: float) -> Path:
    """kogia-nano's pieces of books put together again: their ids are that of the book and a number."""
    books: dict[str, str] = {}
    for piece in read_rows(pieces):
        book = piece["id"].partition("#")[0]
        books[book] = books.get(book, "") + piece["text"]
    return write_rows(target, up_to(iter({"text": text} for text in books.values()), megabytes))


def up_to(rows: Iterator[dict[str, Any]], megabytes: float) -> list[dict[str, Any]]:
    """The first rows whose texts have about so many megabytes together."""
    chosen, size = [], 0
    for each in rows:
        chosen.append(each)
        size += len(each["text"])
        if size >= 1e6 * megabytes:
            break
    return chosen


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": each["text"]}, ensure_ascii=False) + "\n" for each in rows)
    file.write_bytes(gzip.compress(text.encode(), compresslevel=1, mtime=0))
    return file


# Figures --------------------------------------------------------------------------------------------------------------


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for who, result in results.items():
        for each in result["loss_by_position"]:
            mean, low, high = each["nats"]
            found.append(row(f"long-context-{who}-{each['from']}-{each['to']}", mean, "nats", low=low, high=high))
        for length in result["lengths"]:
            share = fmean(cell["found"][0] for cell in result["pass_keys"] if cell["length"] == length)
            found.append(row(f"long-context-{who}-keys-{length}", share, "share of pass keys found"))
    return found


def words(result: dict[str, Any]) -> str:
    return ", ".join(f"{each['from']}: {each['nats'][0]:.3f}" for each in result["loss_by_position"])


def draw(results: dict[str, Any], trained: int, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    positions, gains = figure.subplots(1, 2)
    for who, result in results.items():
        buckets, contexts = result["loss_by_position"], result["loss_by_context"]
        places = [(each["from"] * each["to"]) ** 0.5 for each in buckets]
        for axes, at, estimates in (
            (positions, places, [each["nats"] for each in buckets]),
            (gains, [each["length"] for each in contexts], [each["nats"] for each in contexts]),
        ):
            means, lows, highs = zip(*estimates, strict=True)
            axes.plot(at, means, marker="o", markersize=3, label=who)
            axes.fill_between(at, lows, highs, alpha=0.15)
    for axes, label in ((positions, "tokens before"), (gains, "tokens of context")):
        axes.axvline(trained, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set(xlabel=label, ylabel="nats per token")
        axes.grid(alpha=0.3)
    positions.set_title("Loss by position")
    gains.set_title("Loss of the same 64 tokens")
    positions.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
