"""What `engine.deterministic` costs: decoding and prompts with it and without, in one run.

    python benchmarks/deterministic.py [--out benchmarks/results/deterministic.json] [--device cpu] [--docs PAGE]

Random weights of two presets. Both engines take turns, so that what else the machine does meets both; the median of the
rounds counts. On a CPU time is that of this process alone, on a GPU the clock's.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from result import row, write_result

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.engine.threads import generation_threads
from kogia.model.costs import num_params
from kogia.model.presets import preset
from kogia.model.transformer import build_model

CASES = {"decode-b1": (1, 16, 33), "decode-b8": (8, 16, 33), "decode-b64": (64, 16, 17), "prompts-4x256": (4, 256, 1)}
"""Sequences, prompt tokens, completion tokens."""
BEGIN, END = "<!-- figures: benchmarks/deterministic.py writes them -->", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deterministic.json"))
    parser.add_argument("--presets", nargs="+", default=["kogia-demo", "kogia-10m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--docs", type=Path, default=None, help="page to write the figures into")
    args = parser.parse_args()
    rows = []
    for name in args.presets:
        for dtype in args.dtypes:
            rows += cost_rows(name, dtype, args)
    write_result(args.out, "deterministic", rows)
    if args.docs:
        write_docs(args.docs, json.loads(args.out.read_text()))


def cost_rows(name: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """How many times as long each case takes."""
    model = build_model(preset(name), device=args.device, dtype=getattr(torch, dtype))
    engines = [
        Engine(model, None, EngineConfig(prefix_cache=False, num_blocks=4096, deterministic=deterministic))
        for deterministic in (False, True)
    ]
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    rows = []
    with generation_threads(None, num_params(model.config)):
        for case, (batch, prompt, tokens) in CASES.items():
            prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt)).tolist()
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            seconds: list[list[float]] = [[], []]
            for turn in range(args.rounds + 1):
                for which, engine in enumerate(engines):
                    started = clock()
                    engine.generate(prompts, params)
                    if turn:  # the first warms up
                        seconds[which].append(clock() - started)
            plain, fixed = map(median, seconds)
            count = batch * (tokens if tokens > 1 else prompt)
            ratios = [b / a for a, b in zip(*seconds, strict=True)]
            id = f"{case}-{name}-{dtype}"
            rows.append(row(f"cost-{id}", fixed / plain, "times", low=min(ratios), high=max(ratios)))
            rows.append(row(f"speed-{id}", count / fixed, "tokens/s", peer=round(count / plain, 1)))
    return rows


def write_docs(page: Path, result: dict[str, Any]) -> None:
    """Put the table of `result` between the marks of the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{figures(result)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def figures(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    rows = {each["id"]: each for each in result["rows"]}
    models = list(dict.fromkeys(id.split("-", 3)[3] for id in rows if id.startswith("cost-")))
    lines = [f"| times as long | {' | '.join(CASES)} |", f"|---|{'---|' * len(CASES)}"]
    for model in models:
        name, _, dtype = model.rpartition("-")
        costs = [f"{rows[f'cost-{case}-{model}']['value']:.2f}" for case in CASES]
        lines.append(f"| {name}, {dtype} | {' | '.join(costs)} |")
    hardware = result["hardware"]
    where = hardware["gpus"][0] if hardware["gpus"] else hardware["cpu"]
    return "\n".join([*lines, "", f"{where}, commit {result['commit'][:7]}."])


if __name__ == "__main__":
    main()
