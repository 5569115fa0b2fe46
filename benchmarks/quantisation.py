"""What rounding the weights costs a trained model: perplexity of held-out books, and a task.

    python benchmarks/quantisation.py --text books1.jsonl.gz --heldout books2.jsonl.gz [--checkpoint NAME=DIR]

A small mixture of experts is trained on books, arithmetic and countdown traces, all with `kogia pretrain`; more models
come as checkpoints, and for the task one that has learned it, such as the demonstration's cold start. Each is converted
to every format with `kogia convert`, and read back dense, in float32: figures are those of the rounded weights, not of
a kernel. "fp8-products" rounds the rows that FP8 weights are multiplied with as well, as a GPU does with many of them
(ops/w8a8). A ratio is exp(mean difference of the nats per token) over sequences of one book each, with the 95% interval
of that mean. The task is countdown, one greedy answer per problem.

Interrupted, it goes on where it stopped; what is in --runs is taken as it is.
"""

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from result import row, write_result

from kogia.checkpoint.config import ConvertConfig
from kogia.checkpoint.hf import load_model
from kogia.checkpoint.open import find_model
from kogia.data.config import DataConfig, SourceConfig
from kogia.data.sources import read_source
from kogia.eval.config import EvalConfig
from kogia.eval.run import evaluate_tasks
from kogia.files import write_json
from kogia.inference import convert
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.linear import Linear
from kogia.model.moe import Experts
from kogia.model.packed import pack
from kogia.model.transformer import Transformer
from kogia.ops.w8a8 import products
from kogia.train import supervised
from kogia.train.config import OptimConfig, SupervisedConfig

MODEL = ModelConfig(
    vocab_size=1024, dim=128, num_layers=4, ffn_dim=384, max_position=512,
    attention=MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
    moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=128, num_dense_layers=1),
)  # fmt: skip
SMALL = "small"
"""The model trained here."""
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"quantize": "fp8"},
    "fp8-products": {"quantize": "fp8"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int4-calibrated": {"quantize": "int4", "calibration": True},
    "int4-asymmetric": {"quantize": "int4", "asymmetric": True},
    "int4-asymmetric-calibrated": {"quantize": "int4", "asymmetric": True, "calibration": True},
}
STEPS, SAVED = 1600, 400
LENGTH = 256
BEHIND = 20_000
"""Characters that are passed over in each held-out or calibration book."""
CALIBRATION = 16, 1200
"""Books, and characters of each."""
BEGIN, END = "<!-- figures: benchmarks/results/quantisation.json -->", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="books to train and calibrate on")
    parser.add_argument("--heldout", required=True, help="other books")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR", help="measured as well")
    parser.add_argument("--solver", metavar="NAME=DIR", help="a model that has learned countdown")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="bf16 and others")
    parser.add_argument("--only", help="measure this model alone and write no result")
    parser.add_argument("--runs", type=Path, default=Path("runs/quantisation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantisation.json"))
    parser.add_argument("--sequences", type=int, default=64, help="held-out books, of one sequence each")
    parser.add_argument("--step", type=int, default=STEPS, help=f"take the model at this one, a multiple of {SAVED}")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--docs", type=Path, help="page to write the figures into")
    args = parser.parse_args()
    solvers = [args.solver] if args.solver else []
    sources = dict(each.split("=", 1) for each in (*args.checkpoint, *solvers))
    names = [SMALL, *sources] if args.only is None else [args.only]
    measured = {name: measure(name, sources.get(name), args) for name in names}
    if args.only is None:
        write_result(
            args.out, "quantisation", [each for name in names for each in rows(name, measured[name], args.step)]
        )
        if args.docs:
            write_docs(args.docs, json.loads(args.out.read_text()))


def measure(name: str, source: str | None, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Variant -> what came out, kept in a file each."""
    directory = trained(args) if source is None else Path(source)
    found = {}
    for variant in args.variants:
        if variant == "fp8-products" and args.solver == f"{name}={source}":
            continue  # an engine runs few rows at a time, which are not rounded
        options, file = VARIANTS[variant], args.runs / f"{name}-{variant}.json"
        if not file.exists():
            target = converted(directory, args.runs / f"{name}-{variant}", options, calibration_text(args))
            if args.solver == f"{name}={source}":
                result = {"accuracy": accuracy(target, args.questions, args.runs / "evals")}
            else:
                model = load_model(target, dtype=torch.float32)
                if variant == "fp8-products":
                    model = in_fp8(load_model(target, dtype=torch.float32, quantize="stored"))
                result = {"nats": nats_per_token(model, target, args.heldout, args.sequences)}
            write_json(file, result)
        found[variant] = json.loads(file.read_text())
    return found


def trained(args: argparse.Namespace) -> Path:
    """The checkpoint of the small model, trained where it is not there."""
    out = args.runs / "model"
    directory = out / "checkpoints" / f"step-{args.step:06d}"
    countdown = {"max_target": 50, "max_intermediate": 60}
    sources = (
        SourceConfig(args.text, num=24),
        SourceConfig("kogia.tasks.synthetic:base_corpus", num=20000, options=countdown),
        SourceConfig("kogia.tasks.synthetic:cold_start_traces", num=12000, weight=2.0, options=countdown),
    )
    config = SupervisedConfig(
        str(out), model=MODEL, steps=STEPS, mtp_weight=0.0, mtp_weight_late=0.0, threads=1, quiet=True,
        save_every=SAVED, keep_checkpoints=STEPS // SAVED, optim=OptimConfig(lr=3e-3, warmup_steps=50),
        data=DataConfig(sources, batch_tokens=4096, max_seqlen=256),
    )  # fmt: skip
    if not directory.is_dir():
        supervised.main(replace(config, resume=out.exists()))
    return directory


def calibration_text(args: argparse.Namespace) -> Path:
    """A file with pieces of the books that are trained on."""
    file, (books, length) = args.runs / "calibration.jsonl", CALIBRATION
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        documents = read_source(SourceConfig(args.text, num=books))
        pieces = [{"text": document.text[BEHIND : BEHIND + length]} for document in documents]
        file.write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    return file


def converted(source: Path, target: Path, options: dict[str, Any], text: Path) -> Path:
    options = {**options, "calibration": str(text)} if "calibration" in options else options
    convert.main(ConvertConfig(str(source), str(target), overwrite=True, **options))
    return target


def in_fp8(model: Transformer) -> Transformer:
    """Let all its FP8 weights be multiplied in FP8, whatever the number of rows."""
    for module in model.modules():
        if isinstance(module, Experts):
            routed = {"gate_up": module.gate_up_proj.operand(), "down": module.down_proj.operand()}
            module.forward = partial(products.mix_experts, **routed)
        elif isinstance(module, Linear) and module.format == "fp8" and len(module.shape) == 2:
            module.forward = partial(products.linear, weight=module.operand(), bias=module.bias)
    return model


@torch.no_grad()
def nats_per_token(model: Transformer, directory: Path, heldout: str, num_sequences: int) -> list[float]:
    """Of the first sequence of each book behind its beginning."""
    tokenizer = find_model(directory).tokenizer
    documents = read_source(SourceConfig(heldout, num=num_sequences))
    ids = [tokenizer.encode_raw(each.text[BEHIND : BEHIND + 16 * LENGTH])[:LENGTH] for each in documents]
    found = []
    for start in range(0, len(ids), 8):
        part = ids[start : start + 8]
        each = model.logprobs(pack(part)).split([len(sequence) for sequence in part])
        found += [-float(values.sum()) / (len(values) - 1) for values in each]
    return found


def accuracy(directory: Path, questions: int, out: Path) -> list[float]:
    """[share, low, high] of right greedy answers."""
    config = EvalConfig(
        str(directory), tasks=("countdown",), task_options={"countdown": {"max_target": 50}}, num_questions=questions,
        num_samples=0, greedy=True, max_tokens=192, name=directory.name, out=str(out), quantize="none", quiet=True,
    )  # fmt: skip
    return evaluate_tasks(config)[0]["greedy"]


def rows(name: str, measured: dict[str, dict[str, Any]], step: int) -> list[dict[str, Any]]:
    found = []
    for variant, result in measured.items():
        id = "int4-quality" if (name, variant) == (SMALL, "int4") else f"quantisation-{name}-{variant}"
        more = {"model": name, "variant": variant} | ({"step": step, "of_steps": STEPS} if name == SMALL else {})
        if "accuracy" in result:
            share, low, high = result["accuracy"]
            found.append(row(f"{id}-accuracy", share, "share of countdown", low=low, high=high, **more))
            continue
        differences = [a - b for a, b in zip(result["nats"], measured["bf16"]["nats"], strict=True)]
        half = 1.96 * stdev(differences) / math.sqrt(len(differences))
        ratio, low, high = (math.exp(fmean(differences) + end) for end in (0.0, -half, half))
        more |= {"perplexity": round(math.exp(fmean(result["nats"])), 3), "books": len(result["nats"])}
        more |= {"limit": 1.03} if id == "int4-quality" else {}
        found.append(row(id, ratio, "perplexity over bf16's", low=low, high=high, **more))
    return found


def write_docs(page: Path, result: dict[str, Any]) -> None:
    """Put the figures between the marks of docs/quantisation.md."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(head + BEGIN + "\n" + figures(result) + "\n" + END + tail, encoding="utf-8")


def figures(result: dict[str, Any]) -> str:
    """A line for each variant, a column for each model."""
    models = list(dict.fromkeys(each["model"] for each in result["rows"]))
    cells: dict[str, dict[str, str]] = {each["variant"]: {} for each in result["rows"]}
    for each in result["rows"]:
        share = each["unit"] == "share of countdown"
        value, low, high = (f"{each[k]:.0%}" if share else f"{each[k]:.3f}" for k in ("value", "low", "high"))
        first = each["variant"] == "bf16" and not share
        cells[each["variant"]][each["model"]] = "1" if first else f"{value} ({low} to {high})"
    heads = [
        f"{name}, {'countdown solved' if _solves(result, name) else 'perplexity relative to bf16'}" for name in models
    ]
    lines = [f"| weights | {' | '.join(heads)} |", "|---|" + "---|" * len(models)]
    lines += [f"| {variant} | {' | '.join(row.get(name, '') for name in models)} |" for variant, row in cells.items()]
    hardware, versions = result["hardware"], result["versions"]
    return "\n".join(
        [f"Measured on {hardware['cpu']}, torch {versions['torch']}, commit {result['commit'][:12]}.", "", *lines]
    )


def _solves(result: dict[str, Any], name: str) -> bool:
    return any(each["model"] == name and each["unit"] == "share of countdown" for each in result["rows"])


if __name__ == "__main__":
    main()
