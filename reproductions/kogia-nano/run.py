"""kogia-nano, our own small base model, by one command: data, the model, its dense twin, cold start, figures, files.

    python reproductions/kogia-nano/run.py pack --raw DATA      # where DATA is; 28 MB to take along in runs/nano/raw
    python reproductions/kogia-nano/run.py all --seconds 560    # on the GPU, again and again until it says "done"
    python reproductions/kogia-nano/run.py twin --seconds 560   # likewise, the twin alone, beside the model in OUT

What is done is not done again. With --seconds every stage is told to stop in time: training saves a checkpoint and goes
on from it, in the same bits, with the next call; preparing loses a part of 4 MiB. Exit status 3: there is more to do.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from kogia.config import load_toml, save_toml
from kogia.files import replacing_directory, write_json
from kogia.prepare.config import PrepareConfig
from kogia.train.config import SupervisedConfig

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = "runs/nano"
HELD_OUT = 20
"""One book in so many, by a hash of its id, is never trained on."""
CHUNK = 8000
"""Characters of a piece of a book, to the end of its paragraph."""
MORE_TO_DO = 3
GRACE = 25.0
"""Seconds in which a stage that was told to stop has to end."""
SHARD_BYTES = 15 << 20
GENERATION = "generation_config.json"
_MARKS = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"\n?####.*\Z", re.DOTALL)


@dataclass(frozen=True)
class Job:
    """One run of all stages, in a directory of its own."""

    work: Path
    out: Path
    scale: float = 1.0
    """Share of the generated problems, and of the books and problems that are packed; below 1 the model is tiny."""
    until: float | None = None
    """When to stop, by the monotonic clock."""
    device: str = "auto"
    documents: int | None = None
    """Generated documents to pretrain on; None takes the recipe's."""

    @property
    def is_rehearsal(self) -> bool:
        return self.scale < 1


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pack", *GROUPS, *STAGES))
    parser.add_argument(
        "--raw", type=Path, help="for pack: directory with text/books_part*.jsonl.gz and math/*.jsonl.gz"
    )
    parser.add_argument("--work", type=Path, default=Path(WORK))
    parser.add_argument(
        "--out", type=Path, default=Path("checkpoints/kogia-nano"), help="for export: where the model goes"
    )
    parser.add_argument("--seconds", type=float, help="stop in time to be done after so many; the same command goes on")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: a rehearsal with a tiny model and less data")
    parser.add_argument("--documents", type=int, help="generated ones, of 580 tokens; the recipe's 700,000 if left out")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(words)
    until = None if args.seconds is None else time.monotonic() + args.seconds
    job = Job(args.work, args.out, args.scale, until, args.device, args.documents)
    if args.stage == "pack":
        if args.raw is None:
            parser.error("pack needs --raw DIRECTORY")
        pack(args.raw, job)
        return 0
    for name in GROUPS.get(args.stage, (args.stage,)):
        if not run_stage(name, job):
            print(f"nano: {name} is not done; the same command goes on")
            return MORE_TO_DO
    print("nano: done")
    return 0


# Data -----------------------------------------------------------------------------------------------------------------


def pack(raw: Path, job: Job) -> None:
    """WORK/raw: books in pieces, training and held-out ones apart, and problems with what their worked form needs."""
    place = job.work / "raw"
    books = [row for part in sorted((raw / "text").glob("books_part*.jsonl.gz")) for row in read_rows(part)]
    for name, wanted in (("books_train", False), ("books_heldout", True)):
        chosen = [book for book in books if is_held_out(book["id"]) == wanted]
        pieces = [piece for book in chosen for piece in pieces_of(book)]
        write_rows(place / f"{name}.jsonl.gz", cut(pieces, job.scale))
    for name in ("gsm8k", "math"):
        for split in ("train", "test"):
            rows = read_rows(raw / "math" / f"{name}_{split}.jsonl.gz")
            problems = [problem(row) for row in rows if row["answer"]]
            write_rows(place / f"{name}_{split}.jsonl.gz", cut(problems, job.scale))
            if split == "train":
                write_rows(place / f"{name}_traces.jsonl.gz", cut(list(map(trace, problems)), job.scale))
    size = sum(file.stat().st_size for file in place.iterdir())
    print(f"packed: {place}, {size / 2**20:.1f} MiB")


def is_held_out(book: str) -> bool:
    return int.from_bytes(hashlib.blake2b(book.encode(), digest_size=8).digest(), "big") % HELD_OUT == 0


def pieces_of(book: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A book in pieces of whole paragraphs: what shares words with a test goes alone, and they are what is measured."""
    piece, number = "", 0
    for paragraph in book["text"].split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= CHUNK:
            yield {"id": f"{book['id']}#{number}", "title": book["title"], "text": piece}
            piece, number = "", number + 1
    if piece.strip():
        yield {"id": f"{book['id']}#{number}", "title": book["title"], "text": piece}


def problem(row: dict[str, Any]) -> dict[str, Any]:
    """The solution without GSM8K's calculator marks and last line."""
    solution = _FINAL.sub("", _MARKS.sub("", row["solution"])).strip()
    return {"id": row["id"], "question": row["question"].strip(), "solution": solution, "answer": row["answer"]}


def trace(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["question"], "reasoning": row["solution"], "completion": row["answer"]}


def cut(rows: list[dict[str, Any]], scale: float) -> list[dict[str, Any]]:
    """The first rows of a rehearsal."""
    return rows if scale >= 1 else rows[: max(20, round(len(rows) * scale))]


def read_rows(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """The same bytes for the same rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def prepare(job: Job, name: str) -> bool:
    """Documents as `kogia pretrain` reads them, in WORK/data or WORK/sft_data."""
    config = load_toml(HERE / f"{name}.toml", PrepareConfig)
    sources = tuple(
        replace(source, spec=placed(source.spec, job), num=scaled(source.num, name, job)) for source in config.sources
    )
    evaluations = tuple(replace(each, spec=placed(each.spec, job)) for each in config.evaluations)
    tokenizer = config.tokenizer and placed(config.tokenizer, job)
    vocab_size = config.vocab_size and (512 if job.is_rehearsal else config.vocab_size)
    config = replace(
        config,
        out=placed(config.out, job),
        sources=sources,
        evaluations=evaluations,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
    )
    return command(job, "prepare", config)


def scaled(num: int | None, name: str, job: Job) -> int | None:
    """How many documents a generator makes; None of a file."""
    if num is None:
        return None
    if job.documents is not None and name == "prepare":
        return job.documents
    return max(300, round(num * job.scale))


# Training -------------------------------------------------------------------------------------------------------------


def train(job: Job, name: str) -> bool:
    """`base`, `sft`, and `dense`, `dense_sft`: the twin with the same tokens, order, schedule and active parameters."""
    kind = name.removeprefix("dense_") if name != "dense" else "base"
    config = load_toml(HERE / f"{kind}.toml", SupervisedConfig)
    is_twin, out = name.startswith("dense"), job.work / name
    if config.model is not None:
        model = replace(config.model, moe=None) if is_twin else config.model
        config = replace(config, model=tiny(model) if job.is_rehearsal else model)
    init = config.init and str(job.work / ("dense" if is_twin else "base"))
    data = replace(config.data, sources=tuple(replace(s, spec=placed(s.spec, job)) for s in config.data.sources))
    config = replace(config, out=str(out), init=init, data=data, device=job.device, resume=out.exists())
    return command(job, "sft" if init else "pretrain", rehearsed(config) if job.is_rehearsal else config)


def tiny(model: Any) -> Any:
    """The same parts, small."""
    attention = replace(
        model.attention, num_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
    )
    moe = model.moe and replace(model.moe, num_experts=4, topk=2, expert_dim=32)
    return replace(model, vocab_size=512, dim=64, num_layers=2, ffn_dim=96, attention=attention, moe=moe)


def rehearsed(config: SupervisedConfig) -> SupervisedConfig:
    data = replace(config.data, batch_tokens=2048, max_seqlen=256)
    optim = replace(config.optim, warmup_steps=2)
    return replace(
        config, data=data, optim=optim, epochs=None, steps=20, save_every=8, eval_every=0,
        threads=1,
    )  # fmt: skip


# Figures and files ----------------------------------------------------------------------------------------------------


def measure(job: Job, *models: str, out: str = "nano.json") -> bool:
    """Bits per byte and scores, in WORK/OUT, by benchmarks/nano.py."""
    size = ("--questions", "4", "--max-tokens", "32", "--pieces", "4") if job.is_rehearsal else ()
    words = [str(ROOT / "benchmarks/nano.py"), str(job.work), "--device", job.device, *size, *models]
    return call(job, [*words, "--out", str(job.work / out)])


def measure_twin(job: Job) -> bool:
    """The same of the model in OUT beside the twin, both after the cold start, in WORK/nano_twin.json."""
    return measure(job, "--model", str(job.out), "--twin", str(job.work / "dense_sft"), out="nano_twin.json")


def export(job: Job) -> bool:
    """OUT: the FP8 model in files of no more than 16 MiB."""
    half = job.work / "fp8"
    words = ["-m", "kogia.cli", "convert", str(job.work / "sft"), str(half), "--quantize", "fp8", "--overwrite"]
    if not call(job, words):
        return False
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(job.out) as draft:
        without_copies(half, draft)
    size = sum(file.stat().st_size for file in job.out.iterdir())
    print(f"exported: {job.out}, {size / 2**20:.1f} MiB in {len(list(job.out.iterdir()))} files")
    return True


def without_copies(source: Path, target: Path) -> None:
    """A model directory less the prediction module's copies of embedding and head, which are 16 MiB here and which
    nobody who has the originals reads."""
    tensors, config = {}, json.loads((source / "config.json").read_text(encoding="utf-8"))
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no dictionary
    layers = range(config["num_hidden_layers"], config["num_hidden_layers"] + config["num_nextn_predict_layers"])
    copies = {f"model.layers.{i}.{part}.weight" for i in layers for part in ("embed_tokens", "shared_head.head")}
    shards: list[dict[str, Any]] = [{}]
    for name in sorted(tensors.keys() - copies):
        if sum(t.nbytes for t in shards[-1].values()) + tensors[name].nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensors[name]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, target / name, metadata={"format": "pt"})
        (target / name).chmod(0o644)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(t.nbytes for shard in shards for t in shard.values())
    write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.startswith("model.safetensors"):
            shutil.copy(file, target / file.name)
    generation = json.loads((target / GENERATION).read_text(encoding="utf-8"))
    write_json(target / GENERATION, generation | {"do_sample": False})  # there is one answer to a puzzle


def write_card(job: Job) -> bool:
    (job.out / "README.md").write_text(card(job), encoding="utf-8")
    return True


def card(job: Job) -> str:
    """The model card: card.md with what was measured and recorded put in."""
    figures = json.loads((job.work / "nano.json").read_text(encoding="utf-8"))
    stages = json.loads((job.work / "stages.json").read_text(encoding="utf-8"))
    report = json.loads((job.work / "data/report.json").read_text(encoding="utf-8"))
    rows = {row["id"]: row for row in figures["rows"]}
    energy = sum(stage.get("watt_hours") or 0 for stage in stages.values())
    values = {
        "PARAMETERS": f"{rows['nano-parameters']['value'] / 1e6:.1f}",
        "ACTIVE": f"{rows['nano-active-parameters']['value'] / 1e6:.1f}",
        "TOKENS": f"{rows['nano-tokens']['value'] / 1e9:.2f}",
        "SOURCES": "\n".join(source_lines(report)),
        "FIGURES": "\n".join(figure_lines(figures["rows"])),
        "HARDWARE": ", ".join(figures["hardware"]["gpus"]) or figures["hardware"]["cpu"],
        "MINUTES": f"{sum(stage['seconds'] for stage in stages.values()) / 60:.0f}",
        "ENERGY": f"{energy:.0f} Wh of the GPU, by its own meter" if energy else "not measured",
        "COMMIT": figures["commit"],
        "DATE": figures["date"],
    }
    text = (HERE / "card.md").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: values[match[1]], text)


def source_lines(report: dict[str, Any]) -> Iterator[str]:
    for source in report["sources"]:
        removed = ", ".join(f"{count:,} {reason}" for reason, count in source["removed"].items() if count) or "none"
        name = source["spec"].rpartition("/")[2]
        yield f"| {name} | {source['documents']:,} | {removed} | {source['tokens']:,} | {source['epochs']:g} |"


def figure_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        bounds = f"{row['low']:.4g} to {row['high']:.4g}" if row.get("low") is not None else ""
        yield f"| {row['id']} | {row['value']:.4g} | {bounds} | {row['unit']} |"


# Stages ---------------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Job], bool]] = {
    "prepare": lambda job: prepare(job, "prepare"),
    "sft_data": lambda job: prepare(job, "sft_data"),
    "base": lambda job: train(job, "base"),
    "sft": lambda job: train(job, "sft"),
    "export": export,
    "dense": lambda job: train(job, "dense"),
    "dense_sft": lambda job: train(job, "dense_sft"),
    "measure": measure,
    "card": write_card,
    "measure_twin": measure_twin,
}
GROUPS = {
    "all": ("prepare", "sft_data", "base", "sft", "export", "dense", "dense_sft", "measure", "card"),
    "twin": ("prepare", "sft_data", "dense", "dense_sft", "measure_twin"),
}


def run_stage(name: str, job: Job) -> bool:
    """Do what is left of a stage, and keep its seconds and energy in WORK/stages.json. False if it was told to stop."""
    file = job.work / "stages.json"
    stages = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    entry = stages.setdefault(name, {"seconds": 0.0, "watt_hours": 0.0, "done": False})
    if entry["done"]:
        return True
    print(f"nano: {name}", flush=True)
    start = time.monotonic()
    with PowerMeter() as meter:
        try:
            entry["done"] = STAGES[name](job)
        finally:
            entry["seconds"] += time.monotonic() - start
            entry["watt_hours"] += meter.watt_hours
            write_json(file, stages)
    print(f"nano: {name} took {entry['seconds']:.0f} s, {entry['watt_hours']:.1f} Wh", flush=True)
    return entry["done"]


def placed(spec: str, job: Job) -> str:
    return str(job.work) + spec.removeprefix(WORK) if spec.startswith(WORK) else spec


def command(job: Job, name: str, config: Any) -> bool:
    """`kogia NAME` with a recipe, which is kept in WORK/recipes."""
    recipe = job.work / "recipes" / f"{Path(config.out).name}.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    save_toml(config, recipe)
    return call(job, ["-m", "kogia.cli", name, str(recipe)])


def call(job: Job, words: list[str]) -> bool:
    """A program of this interpreter, told to stop in time. False if it was; CalledProcessError if it failed."""
    left = None if job.until is None else job.until - GRACE - time.monotonic()
    if left is not None and left <= 0:
        return False
    process = subprocess.Popen([sys.executable, *words])
    try:
        status = process.wait(left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait() == 0  # it may have been done
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        raise subprocess.CalledProcessError(status, words)
    return True


class PowerMeter:
    """Energy that the first GPU takes while the block lasts, by nvidia-smi; nothing where there is none."""

    def __init__(self) -> None:
        self.watt_hours = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PowerMeter":
        if shutil.which("nvidia-smi"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-i", "0"]
        last = time.monotonic()
        while not self._stop.wait(2.0):
            told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
            now = time.monotonic()
            self.watt_hours += float(told or 0) * (now - last) / 3600
            last = now


if __name__ == "__main__":
    sys.exit(main())
