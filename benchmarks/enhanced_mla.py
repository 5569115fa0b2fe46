"""The options beyond the published latent attention, each measured on small models trained here.

    python benchmarks/enhanced_mla.py --text books.jsonl.gz [--runs runs/enhanced-mla] [--steps 1200] [--jobs 1]

query ranks   the same number of parameters with one query rank for all layers, with ranks that rise and that fall
nested ranks  held-out loss when only a prefix of the latent is kept, trained plainly and with nested dropout
FP8 rows      held-out loss through the cache with 16-bit and with FP8 latents, and the bytes of a row
pruning       held-out loss of the last quarter of each sequence when deeper layers keep a budget of latents

Losses are nats per token on held-out documents. --text is any file that `kogia pretrain` reads; without it the
arithmetic generator of the demonstration is used. Interrupted, it goes on where it stopped.
"""

import argparse
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from result import row, write_result
from torch import Tensor

from kogia.checkpoint.hf import load_model
from kogia.config import save_toml
from kogia.data.config import DataConfig, SourceConfig
from kogia.data.loader import Batch
from kogia.engine.config import EngineConfig, PruneConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.engine.runner import Flight
from kogia.engine.step import StepPlan
from kogia.engine.views import token_runs
from kogia.model.cache import StepCache, build_cache, cache_row
from kogia.model.costs import num_params
from kogia.model.presets import preset
from kogia.model.transformer import Transformer
from kogia.ops.cache import LatentRow
from kogia.train.config import OptimConfig, SupervisedConfig
from kogia.train.supervised import build_run

MODEL = preset("kogia-10m")
QUERY_RANKS = {"uniform": (64,) * 6, "rising": (14, 34, 54, 74, 94, 114), "falling": (114, 94, 74, 54, 34, 14)}
LATENT_RANKS = (8, 16, 24, 32, 48, 64)
BUDGETS = {  # (first layer, last layer, newest tokens kept)
    "512-to-256": (512, 256, 64),
    "384-to-128": (384, 128, 64),
    "256-to-64": (256, 64, 32),
    "uniform-256": (256, 256, 64),
    "window-256": (256, 256, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text")
    parser.add_argument("--runs", type=Path, default=Path("runs/enhanced-mla"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/enhanced_mla.json"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--eval-tokens", type=int, default=262144)
    parser.add_argument("--long-sequences", type=int, default=32, help="sequences that pruning is measured on")
    parser.add_argument("--docs", type=Path, default=None, help="page to write the figures into")
    args = parser.parse_args()
    configs = variants(args)
    batches = prepare(next(iter(configs.values())), args.runs)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, configs.values()))
    rows: list[dict[str, Any]] = []
    for measure in (query_rows, nested_rows, fp8_rows):
        rows += measure(configs, args.seeds, batches)
    rows += prune_rows(configs, args.seeds, long_sequences(batches, args.long_sequences))
    write_result(args.out, "enhanced-mla", rows)
    if args.docs:
        write_docs(args.docs, json.loads(args.out.read_text()))


def variants(args: argparse.Namespace) -> dict[str, SupervisedConfig]:
    """Every training: query ranks by seed, and nested dropout by seed (its plain twin is "uniform")."""
    source = SourceConfig(args.text) if args.text else SourceConfig("kogia.tasks.synthetic:base_corpus", num=40000)
    data = DataConfig(
        (source,), batch_tokens=16384, max_seqlen=1024, val_share=0.04, cache_dir=str(args.runs / "tokens")
    )
    found = {}
    for seed in args.seeds:
        base = SupervisedConfig(
            "", model=MODEL, data=data, optim=OptimConfig(lr=2e-3, warmup_steps=50), steps=args.steps, seed=seed,
            tokenizer=str(args.runs / "data" / "tokenizer"), quiet=True, eval_tokens=args.eval_tokens,
        )  # fmt: skip
        for name, ranks in QUERY_RANKS.items():
            attention = replace(MODEL.attention, q_lora_rank=None, q_lora_ranks=ranks)
            found[f"{name}-{seed}"] = replace(base, model=replace(MODEL, attention=attention))
        found[f"nested-{seed}"] = replace(found[f"uniform-{seed}"], nested_rank_min=min(LATENT_RANKS))
    outs = {name: args.runs / name for name in found}
    return {name: replace(found[name], out=str(out), resume=out.exists()) for name, out in outs.items()}


def prepare(config: SupervisedConfig, runs: Path) -> list[Batch]:
    """The tokenizer and the tokens that all trainings share, once; returns the held-out batches."""
    data = replace(config, out=str(runs / "data"), resume=False)
    if not (runs / "data" / "tokenizer").is_dir():
        build_run(replace(data, tokenizer=None, data=replace(data.data, cache_dir=None)))
    return build_run(replace(data, out=str(runs / "look"), overwrite=True)).validation


def train(config: SupervisedConfig) -> None:
    """One training in a process of its own, resumed if it was begun."""
    file = Path(config.out).with_name(Path(config.out).name + ".toml")
    save_toml(config, file)
    code = "import sys; from kogia.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, "pretrain", str(file)], check=True)


def query_rows(configs: dict[str, SupervisedConfig], seeds: list[int], batches: list[Batch]) -> list[dict[str, Any]]:
    """Held-out loss of each arrangement of query ranks; low and high are over the seeds."""
    rows = []
    for name, ranks in QUERY_RANKS.items():
        losses = [loss(load(configs, f"{name}-{seed}"), batches) for seed in seeds]
        extra = {"ranks": list(ranks), "parameters": num_params(configs[f"{name}-{seeds[0]}"].model)}  # pyright: ignore
        rows.append(spread(f"enhanced-query-ranks-{name}-loss", losses, **extra))
    return rows


def nested_rows(configs: dict[str, SupervisedConfig], seeds: list[int], batches: list[Batch]) -> list[dict[str, Any]]:
    """Held-out loss by the latent's rank, with and without nested dropout in training."""
    rows = []
    for name in ("uniform", "nested"):
        models = [load(configs, f"{name}-{seed}") for seed in seeds]
        label = "plain" if name == "uniform" else name
        for rank in LATENT_RANKS:
            losses = [loss(model, batches, rank=rank) for model in models]
            rows.append(spread(f"enhanced-{label}-rank-{rank}-loss", losses, row_numbers=rank + 16))
    return rows


def fp8_rows(configs: dict[str, SupervisedConfig], seeds: list[int], batches: list[Batch]) -> list[dict[str, Any]]:
    """Held-out loss through the paged cache with bfloat16 weights and activations, 16-bit against FP8 rows."""
    rows = []
    models = [load(configs, f"uniform-{seed}").to(torch.bfloat16) for seed in seeds]
    for fp8 in (False, True):
        layout = cache_row(models[0].config, fp8=fp8)
        assert layout is not None
        losses = [loss(model, batches, layout=layout) for model in models]
        size = layout.width * (1 if fp8 else 2)
        rows.append(spread(f"enhanced-cache-{'fp8' if fp8 else 'bfloat16'}-loss", losses, row_bytes=size))
    return rows


def prune_rows(
    configs: dict[str, SupervisedConfig], seeds: list[int], sequences: list[list[int]]
) -> list[dict[str, Any]]:
    """Held-out loss in the last quarter of long sequences, when the engine keeps a budget of rows in each layer."""
    rows = []
    models = [load(configs, f"uniform-{seed}") for seed in seeds]
    for name, budget in {"none": None, **BUDGETS}.items():
        prune = None if budget is None else PruneConfig(budget[0], budget[1], recent=budget[2], slack=64)
        losses, kept = zip(*(engine_loss(model, sequences, prune) for model in models), strict=True)
        rows.append(spread(f"enhanced-prune-{name}-loss", list(losses), rows_kept_share=round(kept[0], 4)))
    return rows


def long_sequences(batches: list[Batch], most: int) -> list[list[int]]:
    """Held-out sequences of the full training length."""
    found = []
    for batch in batches:
        ids, ends = batch.tokens.token_ids.tolist(), batch.tokens.segments.cu_seqlens.tolist()
        found += [ids[a:b] for a, b in itertools.pairwise(ends) if b - a == MODEL.max_position]
    if not found:
        raise ValueError(f"no held-out document is {MODEL.max_position} tokens long: give a longer --text")
    return found[:most]


@torch.no_grad()
def engine_loss(model: Transformer, sequences: list[list[int]], prune: PruneConfig | None) -> tuple[float, float]:
    """(nats per token in the last quarter, share of all cache rows still held), the text forced through the engine."""
    config = EngineConfig(prune=prune, prefix_cache=False, max_sequences=len(sequences), max_batch_tokens=4096)
    engine = Engine(model, None, config)
    launch, hidden, seen = engine.runner.launch, [], []
    hook = model.model.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))

    def recording(plan: StepPlan, num_drafts: int) -> Flight:
        runs = token_runs(plan)
        targets = torch.from_numpy(engine.scheduler.table.token_ids[runs.rows, runs.positions + 1])
        late = torch.from_numpy(runs.positions >= 3 * MODEL.max_position // 4).to(model.device)
        flight = launch(plan, num_drafts)
        logprobs = model.logits(hidden.pop()[late]).float().log_softmax(-1)
        seen.append(-logprobs.gather(1, targets.to(model.device)[late, None]).flatten().cpu())
        return flight

    engine.runner.launch = recording
    # the last token is sampled, not forced: its prediction is left out
    engine.generate([ids[:-1] for ids in sequences], SamplingParams(temperature=0.0, max_tokens=1))
    hook.remove()
    held = 1 - engine.stats.num_dropped_rows / (len(sequences) * (MODEL.max_position - 1) * MODEL.num_layers)
    values = torch.cat(seen)
    return float(values.double().mean()), held


def spread(id: str, values: list[float], **extra: Any) -> dict[str, Any]:
    return row(id, sum(values) / len(values), "nats per token", low=min(values), high=max(values), **extra)


def load(configs: dict[str, SupervisedConfig], name: str) -> Transformer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(configs[name].out, device=device, dtype=torch.float32)


@torch.no_grad()
def loss(
    model: Transformer, batches: list[Batch], *, rank: int | None = None, layout: LatentRow | None = None
) -> float:
    """Nats per held-out token; `rank` cuts the latents, `layout` sends every row through a paged cache."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in (b.to(model.device) for b in batches):
        num_seqs = batch.tokens.segments.num_seqs
        ranks = None if rank is None else torch.full((num_seqs,), rank, device=model.device)
        cache = None if layout is None else prefill_cache(model, batch, layout)
        hidden = model(batch.tokens, step=model.step(batch.tokens, cache, latent_ranks=ranks))
        total -= model.logprobs_from_hidden(hidden, batch.tokens, rows=batch.loss_rows)[0].double().sum().cpu()
        count += batch.num_loss_tokens
    return float(total / count)


def prefill_cache(model: Transformer, batch: Batch, layout: LatentRow, block_size: int = 16) -> StepCache:
    """A fresh cache into which the whole batch is about to be written."""
    tokens = batch.tokens
    segments = tokens.segments
    blocks = -(-segments.longest // block_size)
    tables = torch.arange(segments.num_seqs * blocks, device=model.device).view(segments.num_seqs, blocks)
    slots: Tensor = tables[segments.owner, tokens.positions // block_size] * block_size + tokens.positions % block_size
    pool = build_cache(model.config, tables.numel(), block_size, dtype=model.dtype, device=model.device, row=layout)
    return pool.step(slots, tables, segments.cu_seqlens.diff(), segments.lengths)


BEGIN, END = "<!-- figures: benchmarks/results/enhanced_mla.json -->", "<!-- end of figures -->"


def write_docs(page: Path, result: dict[str, Any]) -> None:
    """Put the figures between the marks of docs/enhanced-mla.md."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(head + BEGIN + "\n" + figures(result) + "\n" + END + tail, encoding="utf-8")


def figures(result: dict[str, Any]) -> str:
    """The tables, in nats per held-out token; differences are to the first line of each."""
    rows = {r["id"]: r for r in result["rows"]}

    def line(words: str, id: str, base: str, *more: str) -> str:
        r = rows[f"enhanced-{id}-loss"]
        change = r["value"] - rows[f"enhanced-{base}-loss"]["value"]
        spread = f"{r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
        return f"| {' | '.join((words, *more, spread, f'{change:+.4f}'))} |"

    def ranks(name: str) -> str:
        return ", ".join(map(str, rows[f"enhanced-query-ranks-{name}-loss"]["ranks"]))

    lines = ["| query ranks, same number of parameters | by layer | loss | change |", "|---|---|---|---|"]
    lines += [line(name, f"query-ranks-{name}", "query-ranks-uniform", ranks(name)) for name in QUERY_RANKS]
    lines += [
        "",
        "| latent kept of 64 | trained plainly | change | with nested dropout | change |",
        "|---|---|---|---|---|",
    ]
    for rank in sorted(LATENT_RANKS, reverse=True):
        parts = [line("", f"{kind}-rank-{rank}", "plain-rank-64").strip("| ") for kind in ("plain", "nested")]
        lines.append(f"| {rank} | {parts[0]} | {parts[1]} |")
    lines += ["", "| cache row | bytes | loss | change |", "|---|---|---|---|"]
    for kind in ("bfloat16", "fp8"):
        lines.append(
            line(kind, f"cache-{kind}", "cache-bfloat16", str(rows[f"enhanced-cache-{kind}-loss"]["row_bytes"]))
        )
    lines += [
        "",
        "| rows kept per layer, context 1024 | share of all rows | loss, last quarter | change |",
        "|---|---|---|---|",
    ]
    words = {"none": "all", "uniform-256": "256 in every layer", "window-256": "the newest 256 in every layer"}
    for name in ("none", *BUDGETS):
        share = f"{rows[f'enhanced-prune-{name}-loss']['rows_kept_share']:.0%}"
        lines.append(line(words.get(name, name.replace("-", " ")), f"prune-{name}", "prune-none", share))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
