"""What the tensors of a `Transformer` are called on disk, and whether a checkpoint has them: the project's name rules.

Parameters already carry their published names. Four structural rules remain:
  experts   the stack `experts.gate_up_proj` is `experts.{i}.gate_proj` and `experts.{i}.up_proj` on disk
  packed    a weight has its scales beside it, as in the model: FP8's `X.weight` and `X.weight_scale_inv`
  MTP       module k is layer `num_layers + k`, with copies of the embedding and the head beside it
  tied      a tied head is not stored
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kogia import log
from kogia.checkpoint.directory import read_config
from kogia.checkpoint.fit import LAYER, misfit
from kogia.checkpoint.stored import same_samples, unused_mtp
from kogia.checkpoint.tensorfile import FP8, SCALE, StoredTensor, read, row_ranges
from kogia.model.config import ModelConfig
from kogia.model.hf_config import left_out
from kogia.model.linear import Linear
from kogia.model.moe import Experts
from kogia.model.sharding import Share, empty_share
from kogia.model.transformer import Transformer, empty_model
from kogia.ops.fp8 import BLOCK
from kogia.ops.packed import FORMATS, format_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    FP8: torch.float8_e4m3fn,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_SCALE_DTYPES = ("F32", "BF16")
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stack of experts -> what its matrices are called on disk."""
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def disk_views(model: Transformer, *, copies: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, view of the model's own storage). With `copies`, the MTP modules' copies as well."""
    tied = model.config.tie_embeddings
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        owner, _, stack = module.rpartition(".")
        if owner.endswith(".experts") and stack in _STACKS:
            projections, held = _STACKS[stack], model.get_submodule(owner)
            for i, expert in enumerate(tensor, start=held.first if isinstance(held, Experts) else 0):
                for projection, view in zip(projections, expert.view(len(projections), *tensor.shape[-2:])):
                    yield f"{owner}.{i}.{projection}.{last}", view
        elif not (tied and name == "lm_head.weight"):
            yield name, tensor
    for k in range(model.config.num_mtp_layers if copies else 0):
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


def model_for(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype,
    keep_packed: bool = False,
    share: Share | None = None,
) -> Transformer:
    """The model, or one rank's share of it, without storage, on the meta device. With `keep_packed`, weights are packed
    as they are stored."""
    model = empty_model(config, dtype) if share is None else empty_share(config, share, dtype)
    formats = {_module_of(name): stored_format(tensor) for name, tensor in stored.items() if stored_format(tensor)}
    for name, module in model.named_modules():
        if keep_packed and name in formats and isinstance(module, Linear):
            module.make_packed(formats[name])
    return model


def stored_format(tensor: StoredTensor) -> str:
    """The key in `FORMATS` of a stored weight; empty for numbers that stand for themselves."""
    dtype = DTYPES.get(tensor.dtype)
    return (dtype and format_of(dtype)) or ""


def _module_of(name: str) -> str:
    """The module that holds a stored weight: X for X.weight, the stack for one of the experts."""
    module = name.rpartition(".")[0]
    owner, _, projection = module.rpartition(".")
    experts, _, number = owner.rpartition(".")
    if number.isdigit() and experts.endswith(".experts"):
        return next((f"{experts}.{stack}" for stack, names in _STACKS.items() if projection in names), module)
    return module


def check_agreement(model: Transformer, stored: Mapping[str, StoredTensor], directory: Path) -> None:
    """Raise one ValueError that lists all missing, extra, mis-shaped and mistyped tensors, if there are any."""
    if found := problems(model, stored):
        shown = found[:20] + ([f"... and {len(found) - 20} more"] if found[20:] else [])
        if defaults := left_out(read_config(directory)):
            shown.append(f"config.json leaves out {', '.join(defaults)}; what its format has for that was taken")
        raise ValueError(f"{directory}: config.json and the weights do not agree:\n  " + "\n  ".join(shown))


def problems(model: Transformer, stored: Mapping[str, StoredTensor]) -> list[str]:
    """One line for each tensor that is missing, extra, mis-shaped or of a type that cannot be read as it should."""
    targets, unused = dict(disk_views(model)), set(unused_mtp(model.config, stored))
    found = [
        line
        for name, tensor in stored.items()
        if (line := _problem(tensor, targets.get(name), stored, name in unused or _is_known_copy(name, model.config)))
    ]
    absent = (name for name in targets if name not in stored and not name.endswith(SCALE))
    return found + [f"missing: {name} {list(targets[name].shape)}" for name in absent]


def _problem(
    tensor: StoredTensor, target: Tensor | None, stored: Mapping[str, StoredTensor], may_be_unused: bool
) -> str | None:
    name, shape = tensor.name, list(tensor.shape)
    if name.endswith(SCALE):
        return _scale_problem(tensor, stored.get(name.removesuffix(SCALE)))
    if target is None and not may_be_unused:
        return f"extra: {name} {shape}"
    if tensor.dtype not in DTYPES:
        return f"wrong dtype: {name} is {tensor.dtype}; weights are one of {', '.join(DTYPES)}"
    if tensor.dtype == FP8 and f"{name}{SCALE}" not in stored:
        return f"missing: {name}{SCALE}, the scales of an FP8 weight {shape}"
    if target is None:
        return None
    if target.shape != tensor.shape:
        return f"mis-shaped: {name} is {shape}, config.json says {list(target.shape)}"
    if target.dtype == torch.float8_e4m3fn and tensor.dtype != FP8:
        return f"wrong dtype: {name} is {tensor.dtype} beside experts in FP8; load them with keep_fp8=False"
    return None


def _scale_problem(scale: StoredTensor, weight: StoredTensor | None) -> str | None:
    if weight is None or weight.dtype != FP8 or len(weight.shape) != 2:
        what = "has no weight" if weight is None else f"stands beside a weight {list(weight.shape)} of {weight.dtype}"
        return f"extra: {scale.name} {what}; scales belong to FP8 matrices"
    if scale.dtype not in _SCALE_DTYPES:
        return f"wrong dtype: {scale.name} is {scale.dtype}; scales are {' or '.join(_SCALE_DTYPES)}"
    expected = FORMATS[stored_format(weight)].scale_shape(weight.shape)
    if scale.shape != expected:
        want = list(expected)
        return f"mis-shaped: {scale.name} is {list(scale.shape)}, its weight {list(weight.shape)} needs {want}"
    return None


def config_as_stored(config: ModelConfig, stored: Mapping[str, StoredTensor], directory: Path) -> ModelConfig:
    """The model that the files hold, where they settle what `config.json` says otherwise; each such thing is said.

    Raises ValueError where the two are out of all proportion, before anything of that size is built.
    """
    if reason := misfit(config, stored):
        raise ValueError(f"{directory}: config.json describes another model than the weights: {reason}")
    config = _with_stored_mtp(config, stored, directory)
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if config.tie_embeddings and head is not None and embedding is not None and not _same_values(head, embedding):
        log.warn(
            f"{directory}: tie_word_embeddings = true, but the stored lm_head.weight differs from the embedding; the "
            "stored head is taken. Set it to false"
        )
        config = replace(config, tie_embeddings=False)
    if copies := sorted(_differing_copies(config, stored)):
        log.warn(f"{directory}: {', '.join(copies)} differ from the tensors they should be copies of, and are ignored")
    return config


def _with_stored_mtp(config: ModelConfig, stored: Mapping[str, StoredTensor], directory: Path) -> ModelConfig:
    """Only modules that are announced and stored count: transformers announces them but never writes one."""
    layers = {int(found[1]) for name in stored if (found := LAYER.match(name))}
    announced = range(config.num_layers, config.num_cache_layers)
    found = sum(1 for _ in takewhile(layers.__contains__, announced))
    if found < len(announced):
        log.warn(
            f"{directory}: config.json announces {len(announced)} module(s) of multi-token prediction, {found} are "
            "stored; the others are left out"
        )
        config = replace(config, num_mtp_layers=found)
    elif unused := unused_mtp(config, stored):
        log.warn(
            f"{directory}: {len(unused)} tensors of multi-token prediction are stored beyond num_nextn_predict_layers "
            f"= {config.num_mtp_layers} and left out"
        )
    return config


def _same_values(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or not {a.dtype, b.dtype} <= DTYPES.keys():
        return False
    return all(torch.equal(_rows(a, *rows), _rows(b, *rows)) for rows in row_ranges(a))


def _rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    data = bytearray((stop - start) * tensor.row_bytes)
    read(tensor, start, memoryview(data))
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).double()


def _differing_copies(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Copies of embedding and head in MTP modules that are none, judged by samples."""
    embedding = stored.get("model.embed_tokens.weight")
    head = embedding if config.tie_embeddings else stored.get("lm_head.weight")
    for layer in range(config.num_layers, config.num_cache_layers):
        for name, original in (("embed_tokens", embedding), ("shared_head.head", head)):
            copy = stored.get(f"model.layers.{layer}.{name}.weight")
            if copy is None or original is None or copy.dtype != original.dtype:
                continue
            if not same_samples(copy, original):
                yield copy.name


def stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype that most of the matrices have; bfloat16 beside FP8. Norms and router biases may be wider."""
    count: Counter[str] = Counter()
    for tensor in stored.values():
        if len(tensor.shape) > 1 and tensor.dtype in DTYPES and not tensor.name.endswith(SCALE):
            count[tensor.dtype] += tensor.nbytes
    if not count:
        return torch.float32
    return torch.bfloat16 if FP8 in count else DTYPES[count.most_common(1)[0][0]]


def check_quantization(data: Mapping[str, Any], directory: Path) -> None:
    """Refuse a `config.json` that announces another quantisation than FP8 in 128 x 128 blocks."""
    settings = data.get("quantization_config")
    if settings is None:
        return
    for key in ("quant_method", "fmt", "weight_block_size"):
        value = settings.get(key, QUANTIZATION[key]) if isinstance(settings, dict) else settings
        if value != QUANTIZATION[key]:
            raise ValueError(
                f"{directory}: quantization_config.{key} = {value!r} in config.json; only {QUANTIZATION[key]!r} is "
                "supported. Use a checkpoint in bfloat16 or in block-scaled FP8"
            )
