"""What a step of a run will take, found out before the run: its steps are done on shallow models of the same widths.

A step takes some seconds once (the optimiser, the norm of gradients, what is read), some for each micro-batch, and some
for each token, and each of these is a sum over the layers and one for what is of no layer. All are differences of
measured steps, and so is the memory of a GPU. Nothing of kernels is known here: what makes a step faster makes its
forecast shorter. Where a step of the whole batch takes long, as on a CPU, it is told from steps of fewer sequences.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from jaxtyping import Float

from kogia.data.loader import Batch
from kogia.model.config import MLAConfig, ModelConfig
from kogia.model.packed import pack_arrays
from kogia.ops.machine import finish

Step = Callable[[Sequence[Batch]], object]
"""An optimiser step on micro-batches."""
Trial = Callable[[ModelConfig], Step]
"""Makes a model of an architecture, and what trains it as the run will."""
EXTRA = 2
"""Layers of a kind that a deeper model has more of: differences of one are smaller beside the noise."""
PATIENCE = {"cuda": 2.0, "cpu": 0.25}
"""Seconds that a step of the shallowest model may take: sequences are left out for it."""
FURTHER = 3
"""Times as many sequences has the step that then tells what a token takes."""
REPEATS, MOST_REPEATS, REPEATED = 3, 15, 0.2
"""Steps that a median is of: at least so many, and up to so many in so many seconds."""


@dataclass(frozen=True)
class Forecast:
    """Of one optimiser step."""

    seconds: float
    memory: int | None
    """Bytes at the peak on a GPU, of what PyTorch allocates; None where they were not measured."""
    tokens: int
    """Of the micro-batches that were measured: fewer than those of the run where these take long."""


def forecast(
    model: ModelConfig,
    trial: Trial,
    device: torch.device,
    *,
    row: int,
    batch_tokens: int,
    micro_batches: int,
    state_bytes: int,
) -> Forecast:
    """Of a step of `micro_batches` of `batch_tokens` each, in sequences of `row` tokens. `state_bytes` are those of
    weights, gradients and moments, which the peak is no less than. Raises what the trials raise, torch.OutOfMemoryError
    above all."""
    whole = max(1, batch_tokens // row)
    count = _affordable(trial(_shallow(model, *_fewest(model))), model, row, whole, device)
    sizes = (count,) if count == whole else (count, FURTHER * count)
    batches = [random_batch(model.vocab_size, [row] * size, device) for size in sizes]

    def measure(shallow: ModelConfig) -> Float[np.ndarray, " quantities"]:
        return _measure(trial, shallow, batches, device, are_several=micro_batches > 1)

    once, each, token, peak = _extrapolated(model, measure)
    tokens = batches[0].tokens.num_tokens
    seconds = once + micro_batches * (each + token * (batch_tokens - tokens))
    memory = max(int(peak), state_bytes) if device.type == "cuda" and count == whole else None
    return Forecast(float(seconds), memory, tokens)


def trials(model: ModelConfig) -> list[ModelConfig]:
    """All models that a forecast trains."""
    kinds = {_fewest(model), _more(model, 0), _more(model, 1)}
    return [_shallow(model, *counts) for counts in kinds]


def random_batch(vocab_size: int, lengths: Sequence[int], device: torch.device) -> Batch:
    """Sequences of random tokens, of which all but the first count."""
    sizes = np.array(lengths, np.int64)
    ids = np.random.Generator(np.random.PCG64(0)).integers(vocab_size, size=int(sizes.sum()))
    tokens = pack_arrays(ids, sizes)
    mask = tokens.positions > 0
    return Batch(tokens, mask, int(mask.sum())).to(device)


def _extrapolated(
    model: ModelConfig, measure: Callable[[ModelConfig], Float[np.ndarray, " quantities"]]
) -> Float[np.ndarray, " quantities"]:
    """What `measure` would find for the whole model, if it is linear in the layers of either kind."""
    few = _fewest(model)
    base = total = measure(_shallow(model, *few))
    for kind, count in enumerate(_kinds(model)):
        more = _more(model, kind)
        if extra := more[kind] - few[kind]:
            each = np.maximum(measure(_shallow(model, *more)) - base, 0.0) / extra
            total = total + (count - few[kind]) * each
    return total


def _kinds(model: ModelConfig) -> tuple[int, int]:
    """(dense layers, mixtures) of the decoder."""
    dense = sum(not model.is_moe_layer(layer) for layer in range(model.num_layers))
    return dense, model.num_layers - dense


def _fewest(model: ModelConfig) -> tuple[int, int]:
    dense, mixtures = _kinds(model)
    return min(1, dense), min(1, mixtures)


def _more(model: ModelConfig, kind: int) -> tuple[int, int]:
    """The fewest, and some more of a kind."""
    counts = list(_fewest(model))
    counts[kind] = min(_kinds(model)[kind], counts[kind] + EXTRA)
    return counts[0], counts[1]


def _shallow(model: ModelConfig, dense: int, mixtures: int) -> ModelConfig:
    """The model with as many layers of each kind."""
    attention, moe, layers = model.attention, model.moe, dense + mixtures
    if isinstance(attention, MLAConfig) and attention.q_lora_ranks:
        middle = sorted(attention.q_lora_ranks)[len(attention.q_lora_ranks) // 2]
        attention = replace(attention, q_lora_ranks=(middle,) * layers)
    if moe is not None and mixtures:
        moe = replace(moe, num_dense_layers=dense)
    return replace(model, num_layers=layers, attention=attention, moe=moe)


def _affordable(step: Step, model: ModelConfig, row: int, whole: int, device: torch.device) -> int:
    """Sequences of a step that does not take long, at most `whole`."""
    count = 1
    while True:
        batch = random_batch(model.vocab_size, [row] * count, device)
        step([batch])  # compiles what is compiled
        more = min(whole, 2 * count)
        if count == whole or _seconds(step, [batch], device) * more / count > PATIENCE[device.type]:
            return count if FURTHER * count < whole else whole
        count = more


def _measure(
    trial: Trial, model: ModelConfig, batches: Sequence[Batch], device: torch.device, *, are_several: bool
) -> Float[np.ndarray, " quantities"]:
    """(seconds once a step, for a micro-batch like the first, for a token more in it, bytes at the peak). Without
    `are_several` what is once is the micro-batch's; with one batch a token takes nothing."""
    gc.collect()  # of the model before
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step, first = trial(model), batches[0]
    for batch in (first, *batches):  # the first makes moments, and finds out which kernels are fast
        step([batch])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    one = _middle(step, [first], device)
    each = max(0.0, _middle(step, [first, first], device) - one) if are_several else one
    token = 0.0
    if len(batches) > 1:
        more = batches[1].tokens.num_tokens - first.tokens.num_tokens
        token = max(0.0, _middle(step, [batches[1]], device) - one) / more
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    del step
    if device.type == "cuda":
        torch.cuda.empty_cache()
    each = min(one, each)
    return np.array([one - each, each, token, peak - before])


def _middle(step: Step, batches: Sequence[Batch], device: torch.device) -> float:
    """Median of the seconds of some steps."""
    seconds: list[float] = []
    while len(seconds) < REPEATS or (len(seconds) < MOST_REPEATS and sum(seconds) < REPEATED):
        seconds.append(_seconds(step, batches, device))
    return median(seconds)


def _seconds(step: Step, batches: Sequence[Batch], device: torch.device) -> float:
    finish(device)
    started = time.perf_counter()
    step(batches)
    finish(device)
    return time.perf_counter() - started
