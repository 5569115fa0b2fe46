"""Multi-token prediction on a CPU at batch 1: the demonstration's final model with and without drafts.

    python benchmarks/engine_cpu_mtp.py RUN [--drafts 1 2 3] [--threads 1 2] [--rounds 5]
                                        [--out benchmarks/results/engine_cpu_mtp.json]

RUN is the directory of a finished `kogia demo`. Held-out questions are answered one after the other, by the clock, with
every number of drafts in turn; a ratio is of one round, and figures are medians of the rounds with the least and the
greatest. Tokens must be those without drafts, greedy and drawn at temperature 1. `cpu-mtp-speedup-b1` is of the number
of drafts that is fastest, in one thread.
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
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_cpu_mtp.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for temperature in (0.0, 1.0):
            found = measured(args.run, args.drafts, temperature, args.rounds)
            rows += [each for drafts in args.drafts for each in draft_rows(found, drafts, threads, temperature)]
    best = max((each for each in rows if each["id"].endswith("-t1-greedy") and "speedup" in each["id"]), key=_value)
    rows.insert(0, best | {"id": "cpu-mtp-speedup-b1", "limit": 1.15})
    write_result(args.out, "engine_cpu_mtp", rows)
    print(json.dumps(rows, indent=1))


def _value(each: dict[str, Any]) -> float:
    return each["value"]


@torch.no_grad()
def measured(run: Path, drafts: Sequence[int], temperature: float, rounds: int) -> dict[int, dict[str, list[Any]]]:
    """Number of drafts, 0 included -> "rates" in tokens per second of each round, and of the last round the "tokens" of
    every answer, the share of drafts "accepted" and "steps" per answer. One round before the first is not counted."""
    directory = resolve_model_dir(run / "rejection_sft")
    tokenizer, model = Tokenizer.load(directory), load_model(directory)
    rl = recipe(DemoConfig(out=str(run)), "grpo", RLConfig)
    problems = load_task(rl.tasks[0], rl.task_options.get(rl.tasks[0])).problems("test")[:QUESTIONS]
    prompts = [render_prompt(problem.messages, tokenizer).token_ids for problem in problems]
    params = SamplingParams(temperature=temperature, max_tokens=rl.max_tokens, seed=1)
    found: dict[int, dict[str, list[Any]]] = {number: {"rates": []} for number in (0, *drafts)}
    for index in range(rounds + 1):
        for number, here in found.items():
            options = EngineConfig(num_draft_tokens=number, num_blocks=256, prefix_cache=False)
            engine = Engine(model, tokenizer, options)
            engine.generate(prompts[:1], params)  # what a step is recorded in
            start = time.perf_counter()
            answers = [engine.generate([prompt], params)[0][0] for prompt in prompts]
            seconds = time.perf_counter() - start
            here["tokens"] = [answer.token_ids for answer in answers]
            here["accepted"] = [engine.stats.acceptance]
            if index:
                here["rates"].append(sum(map(len, here["tokens"])) / seconds)
    return found


def draft_rows(
    found: dict[int, dict[str, list[Any]]], drafts: int, threads: int, temperature: float
) -> list[dict[str, Any]]:
    name = f"k{drafts}-t{threads}-{'sampled' if temperature else 'greedy'}"
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
