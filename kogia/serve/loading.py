"""Which models a server has, what each will take, and how one is loaded. All of it blocks."""

import gc
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from kogia.checkpoint.directory import resolve_model_dir
from kogia.checkpoint.hf import loaded_bytes
from kogia.checkpoint.hub import is_hub_name
from kogia.checkpoint.open import Found, find_model
from kogia.config import from_dict, to_dict
from kogia.engine.config import EngineConfig
from kogia.engine.engine import affordable_blocks
from kogia.engine.limits import block_bytes
from kogia.inference.config import FILTERS, engine_options, filtered_sampling
from kogia.inference.llm import LLM, engine_config
from kogia.inference.parallel import ParallelEngine
from kogia.serve.config import MODEL_OPTIONS, ServeConfig, num_bytes, operators_text
from kogia.serve.memory import give_back
from kogia.serve.served import Entry, Need, ServedModel
from kogia.text.files import read_generation

AT_START = "at_start"
"""Of a table: load the model before the server is ready."""


def load_model(config: ServeConfig) -> ServedModel:
    """Load the model of a configuration. Raises ValueError as `LLM` does."""
    directory = resolve_model_dir(config.path)
    llm = LLM.of(directory, config, **engine_options(config.engine, config.draft_tokens))
    llm.warm_up()
    settings = _defaults(config, directory), config.max_tokens, config.marks_in_messages
    return ServedModel(names_of(config)[0], llm, *settings)


def unload_model(served: ServedModel) -> None:
    """Give back what a model takes."""
    served.llm.close()
    gc.collect()  # an engine and its loop know each other
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reload_weights(served: ServedModel, config: ServeConfig) -> None:
    """Put the weights of a configuration in the place of a model's own, beside which they are read on the CPU first.

    Raises ValueError or OSError where that cannot be; the model is as it was.
    """
    found = find_model(config.path, device="cpu", dtype=config.dtype, quantize=config.quantize)
    _check_same(served, found)
    new = found._replace(dtype=served.llm.model.dtype).open().model
    served.engine.update_weights(new.state_dict())


def _check_same(served: ServedModel, found: Found) -> None:
    """Raise ValueError unless a model is of the same architecture, with the same tokenizer."""
    engine, new = served.engine, found.config
    own = engine.whole if isinstance(engine, ParallelEngine) else engine.model.config
    wrong = [each.name for each in fields(own) if getattr(own, each.name) != getattr(new, each.name)]
    if wrong:
        raise ValueError(f"{found.directory} is of another architecture: {', '.join(wrong)} differ")
    if found.tokenizer.backend.to_str() != served.tokenizer.backend.to_str():
        raise ValueError(f"{found.directory} has another tokenizer; load it as a model of its own")


def names_of(config: ServeConfig) -> tuple[str, ...]:
    """As the command says, or by the path: its last part, and all of it where it names a model of the Hub."""
    is_from_hub = is_hub_name(config.path) and not Path(config.path).exists()
    named = config.name or (Path(config.path).resolve().name, *([config.path] if is_from_hub else []))
    return tuple(dict.fromkeys(named))


def read_models(config: ServeConfig) -> list[Entry]:
    """The models of a configuration, none of them loaded. Raises ValueError for one that cannot be, or that the limit
    has no room for."""
    looked = [_look(settings, at_start) for settings, at_start in all_settings(config)]
    if config.memory_limit is None:
        entries = [each.entry(each.engine) for each in looked]
    else:
        entries = _within(num_bytes(config.memory_limit), looked)
    names = [name for entry in entries for name in entry.names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two models are called {twice!r}; give each a name of its own (--name, --models-file)")
    return entries


def all_settings(config: ServeConfig) -> Iterator[tuple[ServeConfig, bool]]:
    """The settings of each model, the command's own first, and whether it is loaded at once."""
    yield config, True
    if config.models_file is None:
        return
    try:
        tables = tomllib.loads(operators_text(config.models_file, "--models-file"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{config.models_file}: is no TOML: {error}") from None
    for name, table in tables.items():
        yield _settings(config, name, table)


def _settings(config: ServeConfig, name: str, table: Any) -> tuple[ServeConfig, bool]:
    place = f"{config.models_file}: [{name}]"
    known = [*MODEL_OPTIONS, AT_START]
    if not isinstance(table, dict) or "path" not in table:
        raise ValueError(f'{place}: must be a table with path = "...", and what else is not as the command says')
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"{place}: has {unknown[0]}; known are {', '.join(known)}")
    own = {key: value for key, value in table.items() if key != AT_START}
    at_start, more = table.get(AT_START, False), own.pop("name", [])
    if not isinstance(at_start, bool) or not isinstance(more, list):
        raise ValueError(f"{place}: at_start must be true or false, and name a list of further names")
    try:
        return from_dict(ServeConfig, _overlaid(to_dict(config), own | {"name": [name, *more]})), at_start
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _overlaid(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `table`, those of inner tables key by key."""
    inner = {
        key: _overlaid(base[key], value)
        for key, value in table.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **table, **inner}


@dataclass(frozen=True, eq=False)
class _Looked:
    """What is known of a model from its files, without its weights."""

    settings: ServeConfig
    at_start: bool
    found: Found
    engine: EngineConfig
    weights: int
    """Bytes."""

    @property
    def names(self) -> tuple[str, ...]:
        return names_of(self.settings)

    @property
    def says_cache(self) -> bool:
        return self.engine.num_blocks is not None or self.engine.cache_memory_bytes is not None

    @property
    def block_bytes(self) -> int:
        return block_bytes(self.found.config, self.engine, self.found.dtype)

    def cache(self, engine: EngineConfig) -> int | None:
        """Bytes of the cache over all processes, nobody's block included; None where nothing bounds it."""
        if engine.num_blocks is None and engine.cache_memory_bytes is None:
            return None
        found = self.found
        blocks = engine.num_blocks or affordable_blocks(found.config, engine, found.dtype, found.device)
        return (blocks + 1) * self.block_bytes * self.settings.tensor_parallel

    def entry(self, engine: EngineConfig) -> Entry:
        settings = replace(
            self.settings, engine=replace(engine, num_draft_tokens=self.settings.engine.num_draft_tokens)
        )
        return Entry(
            names=self.names,
            settings=settings,
            config=self.found.config,
            defaults=_defaults(settings, self.found.directory),
            need=Need(self.weights, self.cache(engine)),
            at_start=self.at_start,
        )


def _look(settings: ServeConfig, at_start: bool) -> _Looked:
    found = find_model(settings.path, device=settings.device, dtype=settings.dtype, quantize=settings.quantize)
    _defaults(settings, found.directory)
    engine = engine_config(found, **engine_options(settings.engine, settings.draft_tokens))
    weights = loaded_bytes(found.stored, dtype=found.dtype, quantize=found.quantize)
    return _Looked(settings, at_start, found, engine, weights)


def _defaults(settings: ServeConfig, directory: Path) -> dict[str, Any]:
    """Sampling settings of requests that name none."""
    own = {} if directory.is_file() else read_generation(directory)
    filters = filtered_sampling(settings, own)
    return {name: getattr(filters, name) for name in FILTERS}


def _within(limit: int, looked: Sequence[_Looked]) -> list[Entry]:
    """The models with caches that the limit has room for. Raises ValueError, with the sum, where it has not."""
    entries = []
    for each in looked:
        budget = _cache_share(limit, looked, each) // each.settings.tensor_parallel
        budget = max(0, budget - each.block_bytes)  # the cache has nobody's block besides
        engine = each.engine if each.says_cache else replace(each.engine, cache_memory_bytes=budget)
        try:
            entries.append(each.entry(engine))
        except ValueError as error:
            raise ValueError(f"{each.names[0]}: {error} ({_sum(each.weights, None, limit)})") from None
        need = entries[-1].need
        if need.total > limit:
            raise ValueError(f"{each.names[0]} can never be loaded: {_sum(need.weights, need.cache, limit)}")
    first = [entry for entry in entries if entry.at_start]
    if sum(entry.need.total for entry in first) > limit:
        each_one = " + ".join(f"{entry.name} {size(entry.need.total)}" for entry in first)
        raise ValueError(
            f"what is loaded at the start takes {each_one}, more than memory_limit {size(limit)}; raise it, give "
            f"smaller caches by engine.cache_memory_bytes, or load fewer at once ({AT_START} = false)"
        )
    return entries


def _cache_share(limit: int, looked: Sequence[_Looked], one: _Looked) -> int:
    """Bytes for the cache of a model that does not say how large it is.

    Where the weights of all models take at most half of the limit, all models stay, and what is left is divided;
    otherwise they take turns, and one has half of what its weights leave.
    """
    weights = sum(each.weights for each in looked)
    if weights > limit // 2:
        return (limit - one.weights) // 2
    given = sum(each.cache(each.engine) or 0 for each in looked)
    return (limit - weights - given) // max(1, sum(not each.says_cache for each in looked))


def _sum(weights: int, cache: int | None, limit: int) -> str:
    parts = f"weights {size(weights)}" + ("" if cache is None else f" + cache {size(cache)}")
    total = f" = {size(weights + cache)}" if cache is not None else ""
    return f"{parts}{total}, memory_limit {size(limit)}"


def size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
