"""What a command would do, as `--dry-run` prints it: the recipe as TOML, its costs as comments. Torch-free."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import tomli_w

from kogia.config import to_dict
from kogia.model.config import ModelConfig
from kogia.model.costs import num_active_params, num_mtp_params, num_params, param_parts, train_memory
from kogia.model.facts import component_name

Line = tuple[str, str]
"""(label, text); without a label it goes on with the line before it."""


def print_dry_run(config: Any, model: ModelConfig, lines: Iterable[Line]) -> None:
    """The resolved configuration, the parameters of its model, and `lines`. The whole of it reads back as a recipe."""
    print(tomli_w.dumps(to_dict(config)))
    for label, text in (*_parameters(model), *lines):
        print(f"# {label:<12}{text}")


def training_memory(model: ModelConfig, batch_tokens: int, **settings: Any) -> Line:
    """`settings` are those of `train_memory`."""
    memory = train_memory(model, batch_tokens, **settings)
    parts = ", ".join(f"{name} {mib(nbytes)}" for name, nbytes in asdict(memory).items())
    return "memory", f"about {mib(memory.total)} beside the libraries: {parts}"


def sampling_memory(model: ModelConfig, cache_bytes: int | None) -> Line:
    weights = 4 * (num_params(model) + num_mtp_params(model))
    return "memory", f"weights {mib(weights)} in float32, and {cache_memory(cache_bytes)} of cache"


def cache_memory(nbytes: int | None) -> str:
    """What `engine.cache_memory_bytes` says, in words."""
    return "a share of the free memory" if nbytes is None else f"at most {mib(nbytes)}"


def _parameters(model: ModelConfig) -> Iterator[Line]:
    yield "parameters", f"{num_params(model):,} ({num_active_params(model):,} active per token)"
    if model.num_mtp_layers:
        yield "", f"{num_mtp_params(model):,} more in {model.num_mtp_layers} multi-token prediction module(s)"
    for part in param_parts(model):
        yield "", f"{part.params:>14,}  {component_name(part.component, model.moe)}"


def mib(nbytes: int) -> str:
    """In whole MiB."""
    return f"{nbytes / 2**20:,.0f} MiB"
