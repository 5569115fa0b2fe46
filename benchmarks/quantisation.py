"""What rounding the weights costs a trained model: perplexity of held-out books, and a task.

    python benchmarks/quantisation.py --text books1.jsonl.gz --heldout books2.jsonl.gz [--checkpoint NAME=DIR]
    python benchmarks/quantisation.py --text books1.jsonl.gz --heldout runs/nano/raw/books_heldout.jsonl.gz \\
        --checkpoint kogia-nano=checkpoints/kogia-nano --solver kogia-nano=checkpoints/kogia-nano \\
        --only kogia-nano --sequences 200 --max-tokens 512 --variants bf16 fp8-products fp8-latents

A small mixture of experts is trained on books, arithmetic and countdown traces, all with `kogia pretrain`; more models
come as checkpoints, and for the task one that has learned it, such as the demonstration's cold start. Each is converted
to every format with `kogia convert`, and read back dense, in float32: figures are those of the rounded weights, not of
a kernel. "fp8-products" rounds the rows that FP8 weights are multiplied with as well, as a GPU does with many of them
(ops/w8a8). "fp8-latents" leaves the weights and rounds the cached latents, `engine.cache_dtype`: an engine reads each
sequence a few tokens at a time, once with such a cache and once without, so that nearly all that is attended to comes
out of it. A ratio is exp(mean difference of the nats per token) over sequences of one document each, with the 95%
interval of that mean. The task is countdown, one greedy answer per problem.

The "bf16" of a checkpoint that is stored in FP8, as kogia-nano is, are its weights made dense, and its "fp8" these
rounded to FP8 once more, which changes little; that it was rounded before is in both. Held-out text must be what the
model has not seen: kogia-nano's is what reproductions/kogia-nano/run.py puts aside, in pieces of books.

Interrupted, it goes on where it stopped; what is in --runs is taken as it is. Figures of models and variants that are
not measured again stay in the result, with the commit that they are of.
"""

import argparse
import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

import torch
from result import commit, hardware, row, write_result

from kogia.checkpoint.config import ConvertConfig
from kogia.checkpoint.hf import load_model
from kogia.checkpoint.open import find_model
from kogia.data.config import DataConfig, SourceConfig
from kogia.data.sources import read_source
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
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
    "fp8-latents": {"dtype": "bfloat16"},
}
TASK = "share of countdown"
"""The unit of its figures."""
STEPS, SAVED = 1600, 400
LENGTH = 256
BEHIND = 20_000
"""Characters that are passed over in each held-out or calibration book; none in mere pieces of them."""
AT_ONCE, SIDE_BY_SIDE = 16, 4
"""Tokens of a sequence that an engine reads at a time, and sequences."""
CALIBRATION = 64, 4000
"""Books, and characters of each."""
BEGIN, END = "<!-- figures: benchmarks/results/quantisation.json -->", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="books to train and calibrate on")
    parser.add_argument("--heldout", required=True, help="other books")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR", help="measured as well")
    parser.add_argument("--solver", metavar="NAME=DIR", help="a model that has learned countdown")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="bf16 and others")
    parser.add_argument("--only", nargs="+", help="measure these models alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/quantisation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantisation.json"))
    parser.add_argument("--sequences", type=int, default=64, help="held-out documents, of one sequence each")
    parser.add_argument("--step", type=int, default=STEPS, help=f"take the model at this one, a multiple of {SAVED}")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=192, help="longest answer")
    parser.add_argument("--docs", type=Path, help="page to write the figures into")
    args = parser.parse_args()
    cases = [Case(SMALL, None, False)]
    given = [(each, False) for each in args.checkpoint] + ([(args.solver, True)] if args.solver else [])
    for each, solves in given:
        name, source = each.split("=", 1)
        cases.append(Case(name, source, solves))
    chosen = [case for case in cases if args.only is None or case.name in args.only]
    found = [each for case in chosen for each in rows(case, measure(case, args), args.step)]
    write_result(args.out, "quantisation", kept(args.out, found) + found)
    if args.docs:
        write_docs(args.docs, json.loads(args.out.read_text()))


class Case(NamedTuple):
    """What is measured of a model."""

    name: str
    source: str | None
    """None is the model trained here."""
    solves: bool
    """The task, not perplexity."""


def kept(out: Path, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of an earlier result that are not measured again."""
    if not out.exists():
        return []
    earlier = json.loads(out.read_text())
    again = {each["id"] for each in measured}
    origin = {"cpu": earlier["hardware"]["cpu"], "torch": earlier["versions"]["torch"]}
    origin |= {"commit": earlier["commit"], "date": earlier["date"]}
    return [{**each, "of": each.get("of", origin)} for each in earlier["rows"] if each["id"] not in again]


def measure(case: Case, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Variant -> what came out, kept in a file each."""
    directory = trained(args) if case.source is None else Path(case.source)
    found = {}
    for variant in args.variants:
        if variant == "fp8-products" and case.solves:
            continue  # an engine runs few rows at a time, which are not rounded
        options, file = VARIANTS[variant], args.runs / f"{case.name}-{variant}{'-task' if case.solves else ''}.json"
        if not file.exists():
            target = args.runs / f"{case.name}-{variant}"
            if not target.exists():
                converted(directory, target, options, calibration_text(args))
            write_json(file, (solved if case.solves else nats)(target, variant, args))
        found[variant] = json.loads(file.read_text())
    return found


def nats(target: Path, variant: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Nats per token of each sequence, and those to compare with where that is not "bf16"."""
    ids = held_out(target, args)
    model = load_model(target, dtype=torch.float32, quantize="stored" if variant == "fp8-products" else None)
    if variant == "fp8-latents":
        return {"nats": nats_in_engine(model, ids, "fp8"), "beside": nats_in_engine(model, ids, "auto")}
    return {"nats": nats_per_token(in_fp8(model) if variant == "fp8-products" else model, ids)}


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
        texts = [document.text for document in documents]
        begins = [BEHIND if len(text) >= BEHIND + length else 0 for text in texts]
        pieces = [{"text": text[i : i + length]} for i, text in zip(begins, texts, strict=True)]
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


def held_out(directory: Path, args: argparse.Namespace) -> list[list[int]]:
    """A sequence of each of some documents, which are spread over all."""
    tokenizer, length = find_model(directory).tokenizer, 16 * LENGTH
    texts = [document.text for document in read_source(SourceConfig(args.heldout))]
    texts = texts[:: max(1, len(texts) // args.sequences)][: args.sequences]
    begins = [BEHIND if len(text) >= BEHIND + length else 0 for text in texts]
    return [tokenizer.encode_raw(text[i : i + length])[:LENGTH] for i, text in zip(begins, texts, strict=True)]


@torch.no_grad()
def nats_per_token(model: Transformer, ids: list[list[int]]) -> list[float]:
    found = []
    for start in range(0, len(ids), 8):
        part = ids[start : start + 8]
        each = model.logprobs(pack(part)).split([len(sequence) for sequence in part])
        found += [-float(values.sum()) / (len(values) - 1) for values in each]
    return found


def nats_in_engine(model: Transformer, ids: list[list[int]], cache_dtype: Literal["auto", "fp8"]) -> list[float]:
    """As an engine scores prompts."""
    config = EngineConfig(
        cache_dtype=cache_dtype, prefix_cache=False, max_sequences=SIDE_BY_SIDE,
        max_batch_tokens=AT_ONCE * SIDE_BY_SIDE, num_blocks=1024,
    )  # fmt: skip
    params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=True, seed=0)
    found = []
    for (completion,) in Engine(model, None, config).generate(ids, params):
        values = [value for value in completion.prompt_logprobs or [] if value is not None]
        found.append(-sum(values) / len(values))
    return found


def solved(directory: Path, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """[share, low, high] of right greedy answers, and each of them."""
    config = EvalConfig(
        str(directory), tasks=("countdown",), task_options={"countdown": {"max_target": 50}},
        num_questions=args.questions, num_samples=0, greedy=True, max_tokens=args.max_tokens, name=directory.name,
        out=str(args.runs / "evals"), engine=EngineConfig(cache_dtype="fp8" if variant == "fp8-latents" else "auto"),
        quantize="none", quiet=True,
    )  # fmt: skip
    share, file = evaluate_tasks(config)[0]["greedy"], args.runs / "evals" / f"{directory.name}.jsonl"
    answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {"accuracy": share, "answers": {each["problem_id"]: [each["correct"], each["text"]] for each in answers}}


def rows(case: Case, measured: dict[str, dict[str, Any]], step: int) -> list[dict[str, Any]]:
    name, found = case.name, []
    origin = {"cpu": hardware()["cpu"], "torch": torch.__version__, "commit": commit()}
    origin |= {"date": datetime.date.today().isoformat()}
    for variant, result in measured.items():
        id = "int4-quality" if (name, variant) == (SMALL, "int4") else f"quantisation-{name}-{variant}"
        more = {"model": name, "variant": variant} | ({"step": step, "of_steps": STEPS} if name == SMALL else {})
        more |= {"of": origin}
        if "accuracy" in result:
            share, low, high = result["accuracy"]
            if variant != "bf16":
                more |= beside_bf16(result["answers"], measured["bf16"]["answers"])
            found.append(row(f"{id}-accuracy", share, TASK, low=low, high=high, **more))
            continue
        beside = result.get("beside", measured["bf16"]["nats"])
        differences = [a - b for a, b in zip(result["nats"], beside, strict=True)]
        half = 1.96 * stdev(differences) / math.sqrt(len(differences))
        ratio, low, high = (math.exp(fmean(differences) + end) for end in (0.0, -half, half))
        more |= {"perplexity": round(math.exp(fmean(result["nats"])), 3), "sequences": len(result["nats"])}
        more |= {"limit": 1.03} if id == "int4-quality" else {}
        found.append(row(id, ratio, "perplexity over bf16's", low=low, high=high, **more))
    return found


def beside_bf16(answers: dict[str, list[Any]], other: dict[str, list[Any]]) -> dict[str, int]:
    """Of two answers to each question: how many are the same text, and solve or fail what the other does not."""
    pairs = [(answers[id], other[id]) for id in other]
    return {
        "questions": len(pairs),
        "same_text": sum(ours[1] == theirs[1] for ours, theirs in pairs),
        "won": sum(ours[0] and not theirs[0] for ours, theirs in pairs),
        "lost": sum(theirs[0] and not ours[0] for ours, theirs in pairs),
    }


def write_docs(page: Path, result: dict[str, Any]) -> None:
    """Put the figures between the marks of docs/quantisation.md."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(head + BEGIN + "\n" + figures(result) + "\n" + END + tail, encoding="utf-8")


def figures(result: dict[str, Any]) -> str:
    """A line for each variant, a column for each model and what was measured of it."""
    kinds = list(dict.fromkeys((each["model"], each["unit"] == TASK) for each in result["rows"]))
    cells: dict[str, dict[tuple[str, bool], str]] = {}
    for each in sorted(result["rows"], key=lambda each: list(VARIANTS).index(each["variant"])):
        solves = each["unit"] == TASK
        value, low, high = (f"{each[k]:.0%}" if solves else f"{each[k]:.3f}" for k in ("value", "low", "high"))
        cell = "1" if each["variant"] == "bf16" and not solves else f"{value} ({low} to {high})"
        cells.setdefault(each["variant"], {})[each["model"], solves] = cell
    heads = [f"{name}, {'countdown solved' if solves else 'perplexity relative to bf16'}" for name, solves in kinds]
    lines = [f"| rounded | {' | '.join(heads)} |", "|---|" + "---|" * len(kinds)]
    lines += [f"| {variant} | {' | '.join(row.get(kind, '') for kind in kinds)} |" for variant, row in cells.items()]
    return "\n".join([*_measured(result["rows"]), "", *lines])


def _measured(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each commit and machine, with what is of them."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for each in rows:
        variants = found.setdefault(tuple(each["of"].values()), {}).setdefault(each["model"], [])
        variants += [each["variant"]] if each["variant"] not in variants else []
    for (cpu, version, revision, date), models in found.items():
        parts = {name for name in models if sum(name in other for other in found.values()) > 1}
        names = [f"{name} ({', '.join(models[name])})" if name in parts else name for name in models]
        yield f"{', '.join(names)}: measured on {cpu}, torch {version}, commit {revision[:12]}, {date}."


if __name__ == "__main__":
    main()
