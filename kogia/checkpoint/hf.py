"""Safetensors <-> Transformer, in the published Hugging Face layout: the only name rules of the project.

Parameters already carry their published names. Three structural rules remain:
  experts   the stacked [experts, gate | up, dim] tensor is `experts.{i}.gate_proj.weight` and `.up_proj.weight` on disk
  MTP       module k is layer `num_layers + k`, with copies of the embedding and the head beside it
  tied      a tied head is not stored
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kogia import log
from kogia.log import write_json
from kogia.model.config import ModelConfig
from kogia.model.hf_config import config_from_hf, config_to_hf
from kogia.model.transformer import Transformer
from kogia.text.tokenizer import Tokenizer

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_STEP = re.compile(r"^step-(\d+)$")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def resolve_model_dir(path: str | Path) -> Path:
    """The model directory that `path` means: itself, or the newest complete checkpoint of a run directory."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    steps = [p for p in (path / "checkpoints").glob("step-*") if _STEP.match(p.name) and (p / "config.json").is_file()]
    if steps:
        return max(steps, key=lambda p: int(p.name.removeprefix("step-")))
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; give a model directory or a run directory")
    raise ValueError(
        f"{path}: not a model. Expected config.json beside {WEIGHTS}, or a run directory with checkpoints/step-*"
    )


def load_config(path: str | Path) -> ModelConfig:
    """Read `config.json` of a model or run directory."""
    file = resolve_model_dir(path) / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); the file is damaged, restore it") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: holds a JSON {type(data).__name__}, not an object; restore the file")
    return config_from_hf(data)


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Build the model of a directory and stream its tensors into place. `dtype` None keeps the stored one.

    Raises ValueError naming the file for a damaged one, and listing all missing, extra and mis-shaped tensors at once.
    """
    directory = resolve_model_dir(path)
    config = load_config(directory)
    files = _weight_files(directory)
    stored = _stored_dtype(files)
    config = _without_absent_mtp(config, files)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype or stored).to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias = router.e_score_correction_bias.float()
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    targets = dict(_disk_views(model))
    problems: list[str] = []
    for file in files:
        for name, tensor in _read(file):
            target = targets.pop(name, None)
            if target is None:
                if not _is_known_copy(name, config):
                    problems.append(f"extra: {name} {list(tensor.shape)}")
            elif target.shape != tensor.shape:
                problems.append(f"mis-shaped: {name} is {list(tensor.shape)}, config.json says {list(target.shape)}")
            else:
                target.copy_(tensor)
    problems += [f"missing: {name} {list(target.shape)}" for name, target in targets.items()]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{directory}: config.json and the weights do not agree:\n  {shown}")
    return model.eval()


def save_model(model: Transformer, directory: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write a complete model directory that other tools can serve. Appears under its name only when complete."""
    directory = Path(directory)
    partial, replaced = (directory.with_name(directory.name + suffix) for suffix in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_model_files(model, partial, tokenizer)
        if directory.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # left by a process that died below; rename wants it gone
            os.replace(directory, replaced)
        try:
            os.replace(partial, directory)
        except OSError:
            if replaced.exists():
                os.replace(replaced, directory)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def write_model_files(model: Transformer, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Write config, weights, generation settings and tokenizer into an existing directory, synced to disk."""
    dtype = str(model.dtype).removeprefix("torch.")
    write_json(directory / "config.json", config_to_hf(model.config, dtype))
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in _disk_views(model, copies=True)}
    _save_tensors(tensors, directory / WEIGHTS)
    eos, bos = model.config.eos_id, model.config.bos_id
    write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "do_sample": True})
    if tokenizer is not None:
        tokenizer.save(directory)


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    # safetensors refuses tensors that share storage; the experts and the MTP copies do
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(separate, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors reports a full disk as its own error type
        raise OSError(f"{file}: could not be written ({error}); free some disk space") from None
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _disk_views(model: Transformer, *, copies: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, view of the model's own storage). With `copies`, the MTP modules' copies as well."""
    tied = model.config.tie_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                yield f"{prefix}.{i}.gate_proj.weight", gate
                yield f"{prefix}.{i}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            for i, expert in enumerate(tensor):
                yield f"{prefix}.{i}.down_proj.weight", expert
        else:
            yield name, tensor
    if copies:
        for k in range(model.config.num_mtp_layers):
            prefix = f"model.layers.{model.config.num_layers + k}"
            yield f"{prefix}.embed_tokens.weight", model.model.embed_tokens.weight
            yield f"{prefix}.shared_head.head.weight", model.lm_head.weight


def _is_known_copy(name: str, config: ModelConfig) -> bool:
    """MTP copies of shared tensors, a stored tied head, and rotary tables of old exports carry nothing new."""
    if (name == "lm_head.weight" and config.tie_embeddings) or name.endswith("rotary_emb.inv_freq"):
        return True
    layers = range(config.num_layers, config.num_layers + config.num_mtp_layers)
    return any(
        name in (f"model.layers.{i}.embed_tokens.weight", f"model.layers.{i}.shared_head.head.weight") for i in layers
    )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a weight index ({error!r}); restore the file") from None
        if not names:
            raise ValueError(f"{index}: not a weight index (it names no file); restore the file")
    else:
        names = [WEIGHTS]
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{index}: shard name {name!r} leaves the model directory; refusing to follow it")
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name}: missing; the checkpoint is incomplete, copy the file again")
    return [directory / name for name in names]


@contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); copy or download it again") from None


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    with _open(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            yield name, handle.get_tensor(name)


def _without_absent_mtp(config: ModelConfig, files: list[Path]) -> ModelConfig:
    """transformers writes `num_nextn_predict_layers` but never the module: such a checkpoint has no MTP to load."""
    first = f"model.layers.{config.num_layers}."
    if config.num_mtp_layers and not any(name.startswith(first) for file in files for name in _names(file)):
        log.warn(f"{files[0].parent}: config.json announces multi-token prediction but no weights are stored; left out")
        return replace(config, num_mtp_layers=0)
    return config


def _names(file: Path) -> list[str]:
    with _open(file) as handle:
        return list(handle.keys())


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """Dtype of the matrices, from the file headers alone; norms and router biases may be wider."""
    found = None
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if not name.endswith("_proj.weight"):
                    continue
                stored = handle.get_slice(name).get_dtype()
                if stored not in _DTYPES:
                    what = "FP8 weights are" if stored.startswith("F8") else f"weights of type {stored} are"
                    raise ValueError(
                        f"{file}: {what} not supported yet ({name}); convert the checkpoint to bfloat16 first"
                    )
                found = found or _DTYPES[stored]
    return found or torch.float32
