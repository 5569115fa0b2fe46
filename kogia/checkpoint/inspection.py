"""What `kogia inspect PATH|PRESET` finds: the facts of a model, and of its files where there are any.

Only headers are read. torch is imported where there are tensors to compare, not for a preset or a lone config.json.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kogia.checkpoint.directory import CONFIG, read_config, resolve_model_dir, stored_tensors
from kogia.checkpoint.disagreements import disagreements
from kogia.checkpoint.gguf_file import is_gguf
from kogia.checkpoint.quantisation import weights_of
from kogia.checkpoint.stored import num_mtp_modules
from kogia.checkpoint.tensorfile import StoredTensor
from kogia.config import to_dict
from kogia.model.config import ModelConfig
from kogia.model.costs import Costs, model_costs
from kogia.model.facts import architecture, cache_name, component_name
from kogia.model.hf_config import config_from_hf
from kogia.model.presets import PRESETS, preset

_WEIGHT_FILES = ("model.safetensors", "pytorch_model")


@dataclass(frozen=True)
class StoredFacts:
    """The weights of a directory."""

    num_files: int
    num_tensors: int
    bytes: int
    dtypes: dict[str, tuple[int, int]]
    """Dtype -> (tensors, bytes), the largest first."""
    format_shares: dict[str, float]
    """Format, such as "fp8" -> its share of the weights (scales not counted)."""
    num_mtp_modules: int


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer beside the weights."""

    vocab_size: int
    """Highest id plus one."""
    bos_id: int | None
    eos_id: int
    has_template: bool


@dataclass(frozen=True)
class Report:
    """All that `kogia inspect` says."""

    name: str
    config: ModelConfig
    costs: Costs
    stored: StoredFacts | None = None
    tokenizer: TokenizerFacts | None = None
    disagreements: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; what does not apply is left out."""
        data = {"name": self.name, "config": to_dict(self.config), "architecture": architecture(self.config)}
        data |= asdict(self.costs) | self._named_costs()
        if self.stored is not None:
            data |= {"stored": asdict(self.stored), "disagreements": list(self.disagreements)}
        if self.tokenizer is not None:
            data["tokenizer"] = asdict(self.tokenizer)
        return data

    def _named_costs(self) -> dict[str, Any]:
        return {
            "parts": [
                {"name": component_name(part.component, self.config.moe), "params": part.params, "active": part.active}
                for part in self.costs.parts
            ],
            "cache_bytes": {cache_name(cached): cached.per_token for cached in self.costs.cache_bytes},
        }


def inspect_model(model: str, context: int | None = None) -> Report:
    """The report of a preset, a model or run directory, a GGUF file or a model of the Hugging Face Hub.

    Raises ValueError for what is none of them. Of a model of the Hub what is in the cache is looked at; weights are not
    fetched for it.
    """
    if not Path(model).exists() and ("/" not in model or model.lower() in PRESETS):
        config = preset(model)
        return Report(model.lower(), config, model_costs(config, context))
    directory = resolve_model_dir(model, weights=False)
    data = read_config(directory)
    config = config_from_hf(data)
    costs = model_costs(config, context)
    tokenizer, problems = _tokenizer(directory, config, data)
    if not is_gguf(directory) and not _has_weights(directory):
        return Report(str(directory), config, costs, None, tokenizer, tuple(problems))
    try:
        stored = stored_tensors(directory, config)
    except ValueError as error:  # damaged or incomplete files: what else there is to say is said
        return Report(str(directory), config, costs, None, tokenizer, (str(error), *problems))
    found = (*disagreements(config, data, stored), *problems)
    return Report(str(directory), config, costs, _stored(stored), tokenizer, found)


def _has_weights(directory: Path) -> bool:
    return any(path.name.startswith(_WEIGHT_FILES) or path.suffix == ".safetensors" for path in directory.iterdir())


def _stored(tensors: Mapping[str, StoredTensor]) -> StoredFacts:
    dtypes: dict[str, tuple[int, int]] = {}
    for tensor in tensors.values():
        count, size = dtypes.get(tensor.stored_type, (0, 0))
        dtypes[tensor.stored_type] = (count + 1, size + tensor.stored_bytes)
    numbers: dict[str, int] = {}
    for weight in weights_of(tensors)[0].values():
        numbers[weight.format] = numbers.get(weight.format, 0) + math.prod(weight.shape)
    total = max(1, sum(numbers.values()))
    return StoredFacts(
        num_files=len({tensor.file for tensor in tensors.values()}),
        num_tensors=len(tensors),
        bytes=sum(size for _, size in dtypes.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda entry: -entry[1][1])),
        format_shares={format: count / total for format, count in sorted(numbers.items()) if format},
        num_mtp_modules=num_mtp_modules(tensors),
    )


def _tokenizer(
    directory: Path, config: ModelConfig, data: Mapping[str, Any]
) -> tuple[TokenizerFacts | None, list[str]]:
    """The facts, and what contradicts the model; (None, ...) where there is no tokenizer or it cannot be read."""
    if not is_gguf(directory) and not (directory / "tokenizer.json").exists():
        return None, []
    from kogia.checkpoint.gguf_tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(directory)
        has_template = bool(tokenizer.config.get("chat_template") or tokenizer.template_source)
    except ValueError as error:
        return None, [str(error)]
    facts = TokenizerFacts(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, has_template)
    problems = []
    if facts.vocab_size > config.vocab_size:
        problems.append(f"the tokenizer has ids up to {facts.vocab_size - 1:,}, vocab_size = {config.vocab_size:,}")
    for role, ours in (("bos", facts.bos_id), ("eos", facts.eos_id)):
        announced = data.get(f"{role}_token_id")
        if announced is not None and ours is not None and ours not in _ids(announced):
            problems.append(f"{role}_token_id = {announced!r} in {CONFIG}, the tokenizer's is {ours}")
    return facts, problems


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
