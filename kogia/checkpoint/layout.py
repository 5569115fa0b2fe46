"""What the tensors of a `Transformer` are called on disk, and whether a checkpoint has them: the project's name rules.

Parameters already carry their published names. Four structural rules remain:
  experts   the stack `experts.gate_up_proj` is `experts.{i}.gate_proj` and `experts.{i}.up_proj` on disk
  packed    a weight has its scales and zeros beside it, and int4 other names (checkpoint/quantisation.py)
  MTP       module k is layer `num_layers + k`, with copies of the embedding and the head beside it
  tied      a tied head is not stored
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from kogia import log
from kogia.checkpoint.directory import read_config
from kogia.checkpoint.fit import LAYER, misfit
from kogia.checkpoint.quantisation import SCALE_DTYPES, SCALES, SHAPE, ZERO, Weight, unlike_schemes, weights_of
from kogia.checkpoint.stored import same_samples, unused_mtp
from kogia.checkpoint.tensorfile import StoredTensor, row_ranges
from kogia.checkpoint.weights import DTYPES, dense_shape, parts_on_disk, zeros_shape
from kogia.model.config import ModelConfig
from kogia.model.hf_config import left_out
from kogia.model.linear import Linear
from kogia.model.moe import Experts
from kogia.model.transformer import Transformer
from kogia.ops.packed import FORMATS, Packed

_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stack of experts -> what its matrices are called on disk."""


def disk_weights(model: Transformer) -> Iterator[tuple[str, Tensor | Packed]]:
    """(name on disk of the dense weight, view of the model's own storage)."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, last = name.rpartition(".")
        module, value = modules[owner], tensor
        if isinstance(module, Linear) and module.format is not None:
            if last.startswith("weight_"):
                continue
            value = module.operand() if last == "weight" else tensor
        experts, _, stack = owner.rpartition(".")
        if experts.endswith(".experts") and stack in _STACKS:
            projections = _STACKS[stack]
            held = model.get_submodule(experts)
            first = held.first if isinstance(held, Experts) else 0
            for i in range(len(value)):
                for k, projection in enumerate(projections):
                    yield (
                        f"{experts}.{first + i}.{projection}.{last}",
                        value[i][k] if len(projections) > 1 else value[i],
                    )
        elif not (model.config.tie_embeddings and name == "lm_head.weight"):
            yield name, value


def disk_views(model: Transformer, *, copies: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor as it is stored). With `copies`, the MTP modules' copies as well."""
    for name, value in disk_weights(model):
        yield from parts_on_disk(name, value)
    for k in range(model.config.num_mtp_layers if copies else 0):
        prefix = f"model.layers.{model.config.num_layers + k}"
        yield f"{prefix}.embed_tokens.weight", model.model.embed_tokens.weight
        head = model.model.embed_tokens.weight if model.config.tie_embeddings else model.lm_head.operand()
        yield from parts_on_disk(f"{prefix}.shared_head.head.weight", head)


def _is_known_copy(name: str, config: ModelConfig) -> bool:
    """MTP copies of shared tensors, a stored tied head, and rotary tables of old exports carry nothing new."""
    if (name == "lm_head.weight" and config.tie_embeddings) or name.endswith("rotary_emb.inv_freq"):
        return True
    layers = range(config.num_layers, config.num_layers + config.num_mtp_layers)
    return any(
        name in (f"model.layers.{i}.embed_tokens.weight", f"model.layers.{i}.shared_head.head.weight") for i in layers
    )


def module_of(name: str) -> str:
    """The module that holds a weight of this name on disk: X for X.weight, the stack for one of the experts."""
    module = name.rpartition(".")[0]
    owner, _, projection = module.rpartition(".")
    experts, _, number = owner.rpartition(".")
    if number.isdigit() and experts.endswith(".experts"):
        return next((f"{experts}.{stack}" for stack, names in _STACKS.items() if projection in names), module)
    return module


def check_agreement(model: Transformer, stored: Mapping[str, StoredTensor], directory: Path) -> None:
    """Raise one ValueError that lists all missing, extra, mis-shaped and mistyped tensors, if there are any."""
    data = read_config(directory)
    if found := [*problems(model, stored), *unlike_schemes(data, weights_of(stored)[0])]:
        shown = found[:20] + ([f"... and {len(found) - 20} more"] if found[20:] else [])
        if defaults := left_out(data):
            shown.append(f"config.json leaves out {', '.join(defaults)}; what its format has for that was taken")
        raise ValueError(f"{directory}: config.json and the weights do not agree:\n  " + "\n  ".join(shown))


def problems(model: Transformer, stored: Mapping[str, StoredTensor]) -> list[str]:
    """One line for each tensor that is missing, extra, mis-shaped or of a type that cannot be read as it should."""
    targets = {
        name: dense_shape(value) if isinstance(value, Packed) else tuple(value.shape)
        for name, value in disk_weights(model)
    }
    unused = set(unused_mtp(model.config, stored))
    weights, strays = weights_of(stored)
    found = [f"extra: {part.name} has no weight; scales belong to quantised matrices" for part in strays]
    for name, weight in weights.items():
        target = targets.get(name)
        may_be_unused = weight.data.name in unused or _is_known_copy(name, model.config)
        found += _problems(weight, target, may_be_unused)
    return found + [f"missing: {name} {list(targets[name])}" for name in targets if name not in weights]


def _problems(weight: Weight, target: tuple[int, ...] | None, may_be_unused: bool) -> Iterator[str]:
    data, shape = weight.data, list(weight.shape)
    if target is None and not may_be_unused:
        yield f"extra: {data.name} {shape}"
        return
    if not weight.format and data.dtype not in DTYPES:
        yield f"wrong dtype: {data.name} is {data.dtype}; weights are one of {', '.join(DTYPES)}"
        return
    if target is not None and target != weight.shape:
        yield f"mis-shaped: {data.name} is {shape}, config.json says {list(target)}"
        return
    yield from _part_problems(weight)


def _part_problems(weight: Weight) -> Iterator[str]:
    """What is wrong with scales, zeros and the like."""
    data, shape, format = weight.data, list(weight.shape), weight.format
    known = {} if not format else {SCALES[format]: None} | ({ZERO: None, SHAPE: None} if format == "int4" else {})
    for part, tensor in weight.parts.items():
        if tensor is not data and (part not in known or len(shape) != 2):
            what = f"stands beside a weight {shape} of {data.dtype}"
            yield f"extra: {tensor.name} {what}; scales belong to quantised matrices"
    if not format:
        return
    if format == "int4" and data.dtype != "I32":
        yield f"wrong dtype: {data.name} is {data.dtype}; int4 weights are packed in I32"
    elif SCALES[format] not in weight.parts:
        yield f"missing: {weight.name}{SCALES[format]}, the scales of an {format.replace('fp', 'FP')} weight {shape}"
    elif len(shape) == 2:
        yield from _scale_problems(weight)


def _scale_problems(weight: Weight) -> Iterator[str]:
    scale, shape, format = weight.scale, weight.shape, FORMATS[weight.format]
    dtypes = SCALE_DTYPES[weight.format]
    if scale.dtype not in dtypes:
        yield f"wrong dtype: {scale.name} is {scale.dtype}; scales are {' or '.join(dtypes)}"
    elif not format.takes(shape):
        yield f"mis-shaped: {weight.data.name} has rows of {shape[1]} numbers, for which there is no group size here"
    elif scale.shape != format.scale_shape(shape):
        want = list(format.scale_shape(shape))
        yield f"mis-shaped: {scale.name} is {list(scale.shape)}, its weight {list(shape)} needs {want}"
    elif weight.zero is not None and (weight.zero.dtype, weight.zero.shape) != ("I32", zeros_shape(scale.shape)):
        zero, want = weight.zero, list(zeros_shape(scale.shape))
        yield f"mis-shaped: {zero.name} is {list(zero.shape)} of {zero.dtype}, its weight needs {want} of I32"


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
    tensor.read_into(start, memoryview(data))
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
    """The dtype that most of the matrices have, quantised ones left out; bfloat16 beside FP8. Norms and router biases
    may be wider."""
    count: Counter[str] = Counter()
    for weight in weights_of(stored)[0].values():
        if weight.format == "fp8":
            return torch.bfloat16
        if len(weight.shape) > 1 and not weight.format and weight.data.dtype in DTYPES:
            count[weight.data.dtype] += weight.data.nbytes
    return DTYPES[count.most_common(1)[0][0]] if count else torch.float32
