"""What fewer and more routed experts per token cost and give, on a small mixture trained here.

    python benchmarks/activation.py [--runs runs/activation] [--out benchmarks/results/activation.json]

The demonstration's base model and cold start with finer experts (16, of which 4 per token). For each number of active
experts: countdown accuracy, held-out loss, tokens per second, bytes of weights per token; the loss under both rules of
scale; and the same for thresholds. With --docs, the tables of that page are written anew. Interrupted, training goes on
where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from result import row, write_result
from torch import Tensor

from kogia.checkpoint.open import open_model
from kogia.config import load_toml
from kogia.data.loader import Batch, validation_batches
from kogia.data.shards import build_shards
from kogia.demo.config import RECIPES, DemoConfig
from kogia.demo.recipes import recipe
from kogia.engine.config import EngineConfig
from kogia.eval.config import EvalConfig
from kogia.eval.run import evaluate_tasks
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer
from kogia.ops.moe import Activation, Routed, route
from kogia.rl.config import RLConfig
from kogia.train.config import SupervisedConfig

NUMBERS = (1, 2, 3, 4, 5, 6, 8, 16)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
MIXTURE = ["--model.moe.num-experts", "16", "--model.moe.topk", "4", "--model.moe.expert-dim", "32"]
BEGIN, END = "<!-- figures: benchmarks/activation.py writes them -->", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/activation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/activation.json"))
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--loss-tokens", type=int, default=65536)
    parser.add_argument("--docs", type=Path, default=None, help="page to write the figures into")
    args = parser.parse_args()
    base, run = args.runs / "base", args.runs / "cold_start"
    train("pretrain", RECIPES / "pretrain.toml", base, *MIXTURE)
    train("sft", RECIPES / "cold_start.toml", run, "--init", str(base))
    rows = [*loss_rows(run, args.loss_tokens), *accuracy_rows(run, args)]
    write_result(args.out, "activation", rows)
    if args.docs:
        write_docs(args.docs, json.loads(args.out.read_text()))


def train(command: str, recipe: Path, out: Path, *flags: str) -> None:
    """Run a stage, or what is left of it."""
    resume = ["--resume"] if out.exists() else []
    words = [command, str(recipe), "--out", str(out), *flags, *resume, "--quiet"]
    script = "import sys; from kogia.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", script, *words], check=True)


def loss_rows(run: Path, num_tokens: int) -> list[dict[str, Any]]:
    """Held-out nats per token at each number of experts under both rules, and at each threshold."""
    config = load_toml(run / "run.toml", SupervisedConfig)
    model, tokenizer, _ = open_model(run, device="cpu")
    shard = build_shards(config.data, tokenizer, run / "data")["val"]
    batches = list(validation_batches(shard, batch_tokens=4096, max_tokens=num_tokens))
    rows = []
    for number in NUMBERS:
        loss, _ = held_out(model, batches, Activation(number))
        rows.append(row(f"loss-{number}-experts", loss, "nats"))
        with sum_kept():
            loss, _ = held_out(model, batches, Activation(number))
        rows.append(row(f"loss-{number}-experts-sum-kept", loss, "nats"))
    moe = model.config.moe
    assert moe is not None
    for share in THRESHOLDS:
        loss, used = held_out(model, batches, Activation(moe.topk), share)
        rows += [row(f"loss-threshold-{share}", loss, "nats"), row(f"experts-threshold-{share}", used, "experts")]
        with sum_kept():
            loss, _ = held_out(model, batches, Activation(moe.topk), share)
        rows.append(row(f"loss-threshold-{share}-sum-kept", loss, "nats"))
    return rows


@torch.no_grad()
def held_out(
    model: Transformer, batches: list[Batch], activation: Activation, share: float | None = None
) -> tuple[float, float]:
    """(nats per masked token, routed experts that a token used on average)."""
    total, count, used = 0.0, 0, []
    for batch in batches:
        tokens, routing = batch.tokens, Routing()
        each = None if share is None else torch.full((tokens.num_tokens,), share)
        step = model.step(tokens, routing=routing, activation=replace(activation, thresholds=each))
        hidden = model(tokens, step=step)
        total -= model.logprobs_from_hidden(hidden, tokens, rows=batch.loss_rows)[0].double().sum().item()
        count += batch.num_loss_tokens
        used += [(ids >= 0).double().sum(-1).mean().item() for ids in routing.chosen.values()]
    return total / count, sum(used) / len(used)


@contextmanager
def sum_kept() -> Iterator[None]:
    """Within the block the gates sum up to what they do at the trained number, as many experts as there are."""

    def rule(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Routed:
        routed = route(x, weight, bias, **options)
        assert options["normalize"], "else the sum differs from token to token"
        return replace(routed, weights=options["scale"] * routed.weights / routed.weights.sum(-1, keepdim=True))

    with patch("kogia.model.moe.route", rule):
        yield


def accuracy_rows(run: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Score, speed and bytes at each number of experts, and score at each threshold."""
    rl = recipe(DemoConfig(), "grpo", RLConfig)
    config = EvalConfig(
        str(run),
        tasks=rl.tasks,
        task_options=rl.task_options,
        num_questions=args.questions,
        num_samples=args.samples,
        max_tokens=rl.max_tokens,
        engine=EngineConfig(
            block_size=4, num_blocks=24000, max_sequences=400, max_batch_tokens=4096, deterministic=False
        ),
        out=str(args.runs / "evals"),
        threads=1,
        device="cpu",
        quiet=True,
    )
    rows = []
    for number in NUMBERS:
        summary, rate = timed(replace(config, active_experts=(number,)))
        rows.append(score_row(f"accuracy-{number}-experts", summary))
        rows.append(row(f"speed-{number}-experts", rate, "tokens per CPU second"))
        rows.append(row(f"bytes-{number}-experts", summary["bytes_per_token"], "bytes"))
    for share in THRESHOLDS:
        engine = replace(config.engine, expert_threshold=share)
        summary, rate = timed(replace(config, active_experts=(), engine=engine, name=f"threshold-{share}"))
        rows.append(score_row(f"accuracy-threshold-{share}", summary))
        rows.append(row(f"speed-threshold-{share}", rate, "tokens per CPU second"))
    return rows


def timed(config: EvalConfig) -> tuple[dict[str, Any], float]:
    """(summary, tokens per CPU second of this process, in which answers are sampled but not verified)."""
    started = time.process_time()
    (summary,) = evaluate_tasks(config)
    seconds = time.process_time() - started
    return summary, summary["completion_tokens"] * summary["num_questions"] * summary["num_samples"] / seconds


def score_row(id: str, summary: dict[str, Any]) -> dict[str, Any]:
    mean, low, high = (100 * share for share in summary["pass@1"])
    return row(id, mean, "percent", low=low, high=high)


def write_docs(page: Path, result: dict[str, Any]) -> None:
    """Put the tables of `result` between the marks of the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{figures(result)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def figures(result: dict[str, Any]) -> str:
    """The tables in Markdown."""
    rows = {each["id"]: each for each in result["rows"]}

    def value(id: str, form: str = ".3f") -> str:
        return format(rows[id]["value"], form)

    def score(id: str) -> str:
        each = rows[id]
        return f"{each['value']:.1f}% ({each['low']:.1f} to {each['high']:.1f})"

    lines = [
        "| active experts | accuracy (95%) | held-out loss | with their sum kept | tokens per CPU s | MB per token |",
        "|---|---|---|---|---|---|",
    ]
    for n in NUMBERS:
        size = rows[f"bytes-{n}-experts"]["value"] / 1e6
        name = f"**{n}** (trained)" if n == 4 else str(n)
        lines.append(
            f"| {name} | {score(f'accuracy-{n}-experts')} | {value(f'loss-{n}-experts')} | "
            f"{value(f'loss-{n}-experts-sum-kept')} | {value(f'speed-{n}-experts', ',.0f')} | {size:.2f} |"
        )
    lines += [
        "",
        "| threshold | experts used | accuracy (95%) | held-out loss | with their sum kept | tokens per CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for t in THRESHOLDS:
        lines.append(
            f"| {t} | {value(f'experts-threshold-{t}', '.2f')} | {score(f'accuracy-threshold-{t}')} | "
            f"{value(f'loss-threshold-{t}')} | {value(f'loss-threshold-{t}-sum-kept')} | "
            f"{value(f'speed-threshold-{t}', ',.0f')} |"
        )
    hardware = result["hardware"]
    lines += ["", f"{hardware['cpu']}, {hardware['torch_threads']} thread(s), commit {result['commit'][:7]}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
