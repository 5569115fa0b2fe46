"""A model directory: `config.json` beside safetensors files, one or several with an index. Torch-free.

What it holds was written by others. Files are bounded before they are parsed, links may not lead out of it, nothing in
it is executed, and pickled weights are never opened.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.fit import max_header
from kogia.checkpoint.gguf_config import config_from_gguf
from kogia.checkpoint.gguf_file import is_gguf, read_gguf
from kogia.checkpoint.gguf_tensors import gguf_tensors
from kogia.checkpoint.hub import find_on_hub, is_hub_name
from kogia.checkpoint.tensorfile import MAX_HEADER, Spec, StoredTensor, create, is_name, num_bytes, read_header
from kogia.files import check_fetched, write_json
from kogia.model.config import ModelConfig
from kogia.model.hf_config import config_from_hf
from kogia.text.files import inside

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG = 10_000_000
MAX_INDEX = 100_000_000
MOST_LOOKED_AT = 1000
"""Entries of a directory, where it is no model and models are looked for in it."""
MOST_NAMED = 12
_STEP = re.compile(r"^step-(\d+)$")
_DRAFT, _REPLACED = ".kogia-draft", ".kogia-replaced"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve_model_dir(path: str | Path, *, weights: bool = True) -> Path:
    """The model directory that `path` means: itself, or the newest complete checkpoint of a run directory.

    A GGUF file stands for itself: `read_config`, `stored_tensors` and `gguf_tokenizer.load_tokenizer` read either.
    Where nothing has that path, `org/name` is a model of the Hugging Face Hub, of which all but the weights is enough
    without `weights`.
    """
    name, path = str(path), Path(path)
    if path.is_file():
        if is_gguf(path):
            return path
        raise ValueError(
            f"{path}: a file; give the model directory that holds {CONFIG} and the weights, or a GGUF file"
        )
    if (found := _model_in(path)) is not None:
        return found
    if not os.path.lexists(path):
        if is_hub_name(name):
            return find_on_hub(name, CONFIG, weights=weights)
        near = _models_within(path.parent, f"{path.parent}") if path.parent.name and path.parent.is_dir() else ""
        raise ValueError(f"{path}: no such file or directory; give a model directory or a run directory{near}")
    raise ValueError(
        f"{path}: not a model. Expected {CONFIG} beside {WEIGHTS}, or a run directory with checkpoints/step-*"
        + _models_within(path, "it")
    )


def _model_in(path: Path) -> Path | None:
    """The model directory that `path` is, or its newest complete checkpoint."""
    if (path / CONFIG).is_file():
        return path
    steps = [p for p in (path / "checkpoints").glob("step-*") if _STEP.match(p.name) and (p / CONFIG).is_file()]
    return max(steps, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def _models_within(path: Path, name: str) -> str:
    """What to give in place of a directory that holds models, as the stages of a run: the end of an error, in which the
    directory is called `name`."""
    if files := sorted(path.glob("*.gguf")):
        return f"; {files[0].name} in {name} is a model by itself, give that"
    near = [each for pattern in ("*", "*/*") for each in sorted(islice(path.glob(pattern), MOST_LOOKED_AT))]
    inner = {each: found for each in near if (found := _model_in(each)) is not None}
    if not inner:
        return ""
    newest = max(inner, key=lambda each: (inner[each] / CONFIG).stat().st_mtime)
    names = ", ".join(str(each.relative_to(path)) for each in [*inner][:MOST_NAMED])
    more = f" and {len(inner) - MOST_NAMED} more" if len(inner) > MOST_NAMED else ""
    return f". Models in {name} are {names}{more}; give one of them, as {newest}, the newest"


def resolve_tokenizer_dir(path: str | Path) -> Path:
    """The directory with tokenizer.json that `path` means: itself, or that of a model of the Hugging Face Hub."""
    name, path = str(path), Path(path).expanduser()
    if not os.path.lexists(path) and is_hub_name(name):
        return find_on_hub(name, "tokenizer.json", weights=False)
    return path


def load_config(path: str | Path) -> ModelConfig:
    """Read `config.json` of a model, as `resolve_model_dir` finds it."""
    return config_from_hf(read_config(resolve_model_dir(path, weights=False)))


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` as it is; what it would be of a GGUF file."""
    if is_gguf(directory):
        return config_from_gguf(directory)
    file = member(directory, CONFIG)
    data = _read_json(file, MAX_CONFIG)
    if not isinstance(data, dict):
        raise ValueError(f"{file}: holds a JSON {type(data).__name__}, not an object; restore the file")
    return data


def member(directory: Path, name: str) -> Path:
    """The file `name` of a model directory. Raises ValueError if it is missing or a link out of the directory."""
    file = inside(directory, name)
    if not file.is_file():
        raise ValueError(f"{file}: missing; the checkpoint is incomplete, copy the file again")
    return file


def _read_json(file: Path, limit: int) -> Any:
    size = file.stat().st_size
    if size > limit:
        raise ValueError(f"{file}: {size / 1e6:.0f} MB, over the limit of {limit / 1e6:.0f} MB; not what its name says")
    check_fetched(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); the file is damaged, restore it") from None


def stored_tensors(directory: Path, config: ModelConfig | None = None) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by name, from the headers of its files alone.

    With `config`, headers and index may not be larger than that model can need. Where a single file stands beside an
    index of others, the file is taken, as transformers does, and that is said.
    """
    if is_gguf(directory):
        return gguf_tensors(read_gguf(directory))
    limit = MAX_HEADER if config is None else max_header(config)
    weight_map = _weight_map(directory, limit)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())) or [WEIGHTS]:
        for tensor in read_header(member(directory, name), limit):
            if weight_map.get(tensor.name, name) != name:
                continue
            if tensor.name in found:
                raise ValueError(f"{directory}: {tensor.name} is in {found[tensor.name].file.name} and in {name}")
            found[tensor.name] = tensor
    absent = sorted(weight_map.keys() - found.keys())
    if absent:
        more = f" (and {len(absent) - 1} more)" if absent[1:] else ""
        raise ValueError(
            f"{directory / INDEX}: {absent[0]}{more} is not in {weight_map[absent[0]]}, where the index has it; "
            "copy both files again"
        )
    return found


def _weight_map(directory: Path, limit: int) -> dict[str, str]:
    """Tensor name -> file name by the index; empty where the one file counts."""
    if not os.path.lexists(directory / INDEX):
        _require_weights(directory)
        return {}
    weight_map = _read_index(member(directory, INDEX), limit)
    others = set(weight_map.values()) - {WEIGHTS}
    if others and os.path.lexists(directory / WEIGHTS):
        log.warn(
            f"{directory}: holds {WEIGHTS} and {INDEX}, which lists {len(others)} other file(s); {WEIGHTS} is taken. "
            "Delete whichever is out of date"
        )
        return {}
    return weight_map


def _read_index(index: Path, limit: int) -> dict[str, str]:
    """The index as it is, its names checked: they are shown and opened."""
    data = _read_json(index, min(limit, MAX_INDEX))
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or {*map(type, weight_map.values())} != {str}:
        raise ValueError(f"{index}: not a weight index (it has no weight_map from tensors to files); restore the file")
    for name in set(weight_map.values()):
        if Path(name).name != name or not is_name(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: shard name {name!r} is no safetensors file of the model directory; refusing to follow it"
            )
    if strange := next((name for name in weight_map if not is_name(name)), None):
        raise ValueError(f"{index}: {strange[:100]!r} is no name of a tensor; the file is damaged, restore it")
    return weight_map


def _require_weights(directory: Path) -> None:
    """Say what is wrong where the one weight file is not there."""
    if os.path.lexists(directory / WEIGHTS):
        return
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
    if shards:
        raise ValueError(f"{directory}: holds {shards[0]} ({len(shards)} files) but no {INDEX}; copy the index as well")
    pickled = sorted(p.name for pattern in _PICKLED for p in directory.glob(pattern))
    if pickled:
        raise ValueError(
            f"{directory}: its weights are pickled ({pickled[0]}), and unpickling runs code of whoever wrote them; "
            "they are never loaded here. Convert them to safetensors where you trust them"
        )
    raise ValueError(f"{directory / WEIGHTS}: missing; the checkpoint is incomplete, copy the file again")


def split_shards(tensors: Iterable[Spec], max_shard_bytes: int) -> list[list[Spec]]:
    """The tensors in order, in as few lists as the bound allows; 0 means one. A larger tensor has a list of its own."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for name, dtype, shape in tensors:
        nbytes = num_bytes(dtype, shape)
        if max_shard_bytes and shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape))
        size += nbytes
    return shards


def create_weight_files(directory: Path, tensors: Iterable[Spec], max_shard_bytes: int) -> dict[str, StoredTensor]:
    """Lay tensors out over files of at most `max_shard_bytes` (0: one file), with an index where they are several.

    Headers and index are written; the data of the returned tensors is the caller's to write.
    """
    shards = split_shards(tensors, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    planned = {t.name: t for name, shard in zip(names, shards) for t in create(directory / name, shard)}
    if len(shards) > 1:
        weight_map = {name: tensor.file.name for name, tensor in planned.items()}
        total = {"total_size": sum(tensor.nbytes for tensor in planned.values())}
        write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})
    return planned


def copy_members(source: Path, target: Path, names: Sequence[str]) -> list[str]:
    """Copy those of the named files that are there; returns their names."""
    copied = [name for name in names if os.path.lexists(source / name)]
    for name in copied:
        shutil.copyfile(member(source, name), target / name)
    return copied
