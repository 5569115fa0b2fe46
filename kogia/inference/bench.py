"""`kogia bench PATH`: decoding, reading prompts, and a load of arriving requests, on the engine itself.

Decoding is timed as the difference between completions of `max_tokens` and of one token, so that reading the prompts
counts in neither; greedy and without a tokenizer, so that no sequence ends early.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kogia import log
from kogia.checkpoint.directory import load_config, resolve_model_dir
from kogia.checkpoint.open import open_model, pick_device, pick_dtype
from kogia.engine.engine import Engine, EngineStats
from kogia.engine.request import SamplingParams
from kogia.engine.threads import generation_threads
from kogia.engine.traffic import cache_bytes, weight_bytes
from kogia.files import check_target, write_json
from kogia.inference.config import BenchConfig
from kogia.inference.load.outcome import Outcome, figures, lines_of
from kogia.inference.parallel import DrawnModel, Source, StoredModel, open_parallel
from kogia.inference.readiness import Readiness
from kogia.model.config import ModelConfig
from kogia.model.costs import num_params
from kogia.model.presets import PRESETS, preset
from kogia.model.quantised import build_packed
from kogia.model.transformer import Transformer, build_model
from kogia.ops.machine import copy_rate, describe


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second over the rounds."""

    name: str
    values: tuple[float, ...]
    gigabytes: float | None = None
    """What a step reads of the memory at least, in 10^9 bytes: weights and cache."""
    step_seconds: float | None = None
    acceptance: float | None = None
    """Share of the drafts that were right; None where nothing was drafted."""

    @property
    def middle(self) -> float:
        return median(self.values)

    def share(self, copy_bytes: float) -> float | None:
        """Of the time of a step, what its bytes alone take at the device's copy rate."""
        if self.gigabytes is None or self.step_seconds is None:
            return None
        return self.gigabytes * 1e9 / copy_bytes / self.step_seconds

    def to_json(self, copy_bytes: float) -> dict[str, Any]:
        least, most = min(self.values), max(self.values)
        found = {"name": self.name, "tokens_per_second": self.middle, "low": least, "high": most}
        found |= {"gigabytes_per_step": self.gigabytes, "share_of_copy_rate": self.share(copy_bytes)}
        return found | ({} if self.acceptance is None else {"acceptance": self.acceptance})


def main(config: BenchConfig) -> None:
    """Raises ValueError for a model that is not there or a context that is too short."""
    if config.out is not None:
        check_target(config.out)
    readiness = Readiness()
    engine = engine_for_bench(config, readiness)
    model = engine.model
    room = model.config.max_position - config.prompt_tokens
    if room < config.max_tokens:
        raise ValueError(
            f"prompt_tokens = {config.prompt_tokens} and max_tokens = {config.max_tokens}: the model's context is "
            f"{model.config.max_position}; lower them"
        )
    with generation_threads(config.threads, num_params(model.config)):
        with readiness.stage("graphs"):
            engine.warm_up()
        with readiness.stage("first token"):
            engine.generate([[0]], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        log.info(str(readiness))
        copy_bytes = copy_rate(model.device)
        speeds = [speed for batch in config.batches for speed in batch_speeds(engine, config, batch)]
        load = under_load(engine, config) if config.rate else None
    measured = {
        "model": config.path,
        "random_weights": config.random_weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": config.quantize,
        "tensor_parallel": config.tensor_parallel,
        "expert_parallel": config.expert_parallel,
        "machine": describe(model.device),
        "copy_gb_per_second": copy_bytes / 1e9,
        "ready_seconds": readiness.seconds,
        "speeds": [speed.to_json(copy_bytes) for speed in speeds],
        "load": load,
    }
    print_figures(measured, config.rate)
    if config.out is not None:
        write_json(config.out, measured)


def engine_for_bench(config: BenchConfig, readiness: Readiness) -> Engine:
    """In this process, or over several. Raises ValueError as `open_model` and `Engine` do."""
    if config.tensor_parallel == 1 and not config.expert_parallel:
        with readiness.stage("weights"):
            model = open_for_bench(config)
        with readiness.stage("engine"):
            return Engine(model, None, config.engine)
    device = pick_device(config.device)
    source: Source = StoredModel(config.path, config.dtype, config.quantize)
    if config.random_weights:
        if config.quantize not in ("auto", "none"):
            raise ValueError(
                f"quantize = {config.quantize!r}: drawn weights are packed in one process only; leave it out, or "
                "tensor_parallel"
            )
        source = DrawnModel(_config_of(config.path), drawn_dtype(config, device), config.seed)
    else:
        _check_has_weights(config.path)
    with readiness.stage("weights and engines"):
        return open_parallel(
            source, config.engine, config.tensor_parallel, device=device, whole_experts=config.expert_parallel
        )


def open_for_bench(config: BenchConfig) -> Transformer:
    device = pick_device(config.device)
    if not config.random_weights:
        _check_has_weights(config.path)
        return open_model(config.path, device=device, dtype=config.dtype, quantize=config.quantize).model
    named, chosen = _config_of(config.path), drawn_dtype(config, device)
    if config.quantize in ("auto", "none"):
        return build_model(named, device=device, dtype=chosen, seed=config.seed)
    return build_packed(named, config.quantize, device=device, dtype=chosen, seed=config.seed)


def _check_has_weights(model: str) -> None:
    if model.lower() in PRESETS:
        raise ValueError(f"{model!r} is a preset, which has no weights: add --random-weights")


def drawn_dtype(config: BenchConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "fp8":
        raise ValueError("dtype = 'fp8': keeps the weights of an FP8 checkpoint; drawn ones take --quantize fp8")
    return pick_dtype(config.dtype, device) or torch.bfloat16


def _config_of(name: str) -> ModelConfig:
    if name.lower() in PRESETS:
        return preset(name)
    return load_config(resolve_model_dir(name, weights=False))


def batch_speeds(engine: Engine, config: BenchConfig, batch: int) -> list[Speed]:
    """Decoding and prefill of `batch` sequences at once."""
    generator = np.random.default_rng(config.seed)
    vocab = engine.model.config.vocab_size

    def timed(num_tokens: int) -> tuple[float, int]:
        """(seconds, steps)"""
        prompts = generator.integers(0, vocab, (batch, config.prompt_tokens)).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        started, steps = time.perf_counter(), engine.stats.num_steps
        engine.generate(prompts, params)
        return time.perf_counter() - started, engine.stats.num_steps - steps

    for _ in range(2):  # a step is recorded when it comes up again
        timed(2)
    engine.stats = EngineStats()
    ones, rates, steps = [], [], []
    for _ in range(config.rounds):
        (one, first), (whole, all_steps) = timed(1), timed(config.max_tokens)
        seconds = whole - one
        if seconds <= 0:
            raise ValueError(
                f"max_tokens = {config.max_tokens}: {batch} completions took no longer than their first tokens, so "
                "that decoding cannot be timed; raise it"
            )
        ones.append(batch * config.prompt_tokens / one)
        steps.append(seconds / max(1, all_steps - first))
        rates.append(batch * (config.max_tokens - 1) / seconds)
    context = config.prompt_tokens + config.max_tokens / 2
    gigabytes = step_bytes(engine, batch, context) / 1e9
    acceptance = engine.stats.acceptance if engine.stats.num_drafted else None
    decode = Speed(f"decode, batch {batch}", tuple(rates), gigabytes, median(steps), acceptance)
    return [decode, Speed(f"prefill, {batch} x {config.prompt_tokens}", tuple(ones))]


def step_bytes(engine: Engine, batch: int, context: float) -> float:
    """What a decode step reads at least: weights, of the experts those that are used, and the cache."""
    weights = weight_bytes(engine.model, batch, engine.experts.number, engine.num_draft_tokens)
    return weights + cache_bytes(engine.runner.cache, batch, context)


def under_load(engine: Engine, config: BenchConfig) -> dict[str, Any]:
    """Requests that arrive at random times, as a server's are measured (`load/outcome.py`)."""
    generator = np.random.default_rng(config.seed + 1)
    dues = np.cumsum(generator.exponential(1 / config.rate, config.requests)).tolist()
    prompts = generator.integers(0, engine.model.config.vocab_size, (config.requests, config.prompt_tokens)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=config.max_tokens, ignore_eos=True)
    outcomes: dict[int, Outcome] = {}
    started = time.perf_counter()
    while dues or engine.num_unfinished:
        while dues and dues[0] <= time.perf_counter() - started:
            outcomes[engine.add(prompts.pop(), params, stream=True)[0]] = Outcome(
                dues.pop(0), num_prompt=config.prompt_tokens
            )
        if not engine.num_unfinished:
            time.sleep(max(0.0, dues[0] - (time.perf_counter() - started)))
            continue
        events, now = engine.step(), time.perf_counter() - started
        for event in events:
            outcome = outcomes[event.request_id]
            outcome.ended = now
            outcome.num_output += len(event.token_ids)
            outcome.times += [now] if event.token_ids else []
    return figures(list(outcomes.values()), time.perf_counter() - started, {})


def print_figures(shown: dict[str, Any], rate: float) -> None:
    drawn = ", random weights" if shown["random_weights"] else ""
    packed = "" if shown["quantize"] in ("auto", "none") else f", weights in {shown['quantize']}"
    table = Table(title=f"{shown['model']} in {shown['dtype']}{packed}{drawn}")
    table.add_column("work")
    for name in ("tokens/s", "spread", "GB/step", "of copy rate"):
        table.add_column(name, justify="right")
    for speed in shown["speeds"]:
        size, share = speed["gigabytes_per_step"], speed["share_of_copy_rate"]
        spread = f"{speed['low']:,.0f} to {speed['high']:,.0f}"
        cells = ["" if size is None else f"{size:.3g}", "" if share is None else f"{share:.0%}"]
        table.add_row(speed["name"], f"{speed['tokens_per_second']:,.0f}", spread, *cells)
    console = Console()
    console.print(table)
    for speed in shown["speeds"]:
        if "acceptance" in speed:
            print(f"{speed['name']}: {speed['acceptance']:.0%} of drafts accepted")
    print(f"{shown['machine']['device']}: memory is copied at {shown['copy_gb_per_second']:,.1f} GB/s (read + write)")
    if (load := shown["load"]) is not None:
        print(lines_of(load, rate, None))
