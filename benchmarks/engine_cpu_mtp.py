"""Multi-token prediction on a CPU at batch 1: the demonstration's final model with and without drafts.

    python benchmarks/engine_cpu_mtp.py RUN [--drafts 1 2] [--rounds 5] [--out benchmarks/results/engine_cpu_mtp.json]

RUN is the directory of a finished `kogia demo`. Held-out questions are answered one after the other, in one thread, per
second of CPU time, with every number of drafts in turn; a ratio is of one round, and figures are medians of the rounds
with the least and the greatest. Tokens must be those without drafts, greedy and drawn at temperature 1.
`cpu-mtp-speedup-b1` is of greedy answers and the number of drafts that is fastest.

In the rows "steady" drafts are on in every step; in the others the engine pauses them where they do not pay, and tries
now and then what it is without them, as it does by itself. An engine has given all answers once before it is timed.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result import row, write_result

from kogia.checkpoint.hf import load_model, resolve_model_dir
from kogia.demo.config import DemoConfig
from kogia.demo.run import recipe
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.rl.config import RLConfig
from kogia.tasks.task import load_task
from kogia.text.chat import render_prompt
from kogia.text.tokenizer import Tokenizer

QUESTIONS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_cpu_mtp.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    for name, temperature, adaptive in (("greedy", 0.0, True), ("greedy-steady", 0.0, False), ("sampled", 1.0, True)):
        found = measured(args.run, args.drafts, temperature, adaptive, args.rounds)
        rows += [each for drafts in args.drafts for each in draft_rows(found, drafts, f"k{drafts}-{name}")]
    speedups = [each for each in rows if each["id"].startswith("speedup-") and each["id"].endswith("-greedy")]
    best = max(speedups, key=lambda each: each["value"])
    rows.insert(0, best | {"id": "cpu-mtp-speedup-b1", "limit": 1.15, "of": best["id"]})
    write_result(args.out, "engine_cpu_mtp", rows)
    print(json.dumps(rows, indent=1))


@torch.no_grad()
def measured(
    run: Path, drafts: Sequence[int], temperature: float, adaptive: bool, rounds: int
) -> dict[int, dict[str, list[Any]]]:
    """Number of drafts, 0 included -> "rates" in tokens per second of each round, and of the last round the "tokens" of
    every answer and the share of drafts "accepted". One round before the first is not counted, and in each the answers
    are given once before they are timed."""
    directory = resolve_model_dir(run / "rejection_sft")
    tokenizer, model = Tokenizer.load(directory), load_model(directory)
    rl = recipe(DemoConfig(out=str(run)), "grpo", RLConfig)
    problems = load_task(rl.tasks[0], rl.task_options.get(rl.tasks[0])).problems("test")[:QUESTIONS]
    prompts = [render_prompt(problem.messages, tokenizer).token_ids for problem in problems]
    params = SamplingParams(temperature=temperature, max_tokens=rl.max_tokens, seed=1)
    found: dict[int, dict[str, list[Any]]] = {number: {"rates": []} for number in (0, *drafts)}
    for index in range(rounds + 1):
        for number, here in found.items():
            options = {"num_draft_tokens": number, "adaptive_drafts": adaptive, "num_blocks": 256}
            engine = Engine(model, tokenizer, EngineConfig(prefix_cache=False, **options))
            for prompt in prompts:  # steps are recorded, with drafts and without, and whether drafts pay is known
                engine.generate([prompt], params)
            start = time.process_time()
            answers = [engine.generate([prompt], params)[0][0] for prompt in prompts]
            seconds = time.process_time() - start
            here["tokens"] = [answer.token_ids for answer in answers]
            here["accepted"] = [engine.stats.acceptance]
            if index:
                here["rates"].append(sum(map(len, here["tokens"])) / seconds)
    return found


def draft_rows(found: dict[int, dict[str, list[Any]]], drafts: int, name: str) -> list[dict[str, Any]]:
    with_drafts, without = found[drafts], found[0]
    ratios = [a / b for a, b in zip(with_drafts["rates"], without["rates"], strict=True)]
    same = [a == b for a, b in zip(with_drafts["tokens"], without["tokens"], strict=True)]
    return [
        _row(f"speedup-{name}", ratios, "x"),
        _row(f"decode-without-{name}", without["rates"], "tokens/s"),
        _row(f"decode-{name}", with_drafts["rates"], "tokens/s"),
        row(f"acceptance-{name}", with_drafts["accepted"][0], "share"),
        row(f"identical-{name}", sum(same) / len(same), "share", limit=1),
    ]


def _row(id: str, values: list[float], unit: str) -> dict[str, Any]:
    return row(id, median(values), unit, low=min(values), high=max(values))


if __name__ == "__main__":
    main()
