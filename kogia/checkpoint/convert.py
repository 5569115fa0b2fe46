"""`kogia convert SRC DST`: another dtype, quantised or back, merged or split, to GGUF, without building the model.

Each weight goes piece by piece from its old file to its new one, rounded once; what is quantised is made dense in
float32.
"""

import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kogia import log
from kogia.checkpoint.config import ConvertConfig, dtype_name
from kogia.checkpoint.directory import (
    CONFIG,
    copy_members,
    create_weight_files,
    load_config,
    read_config,
    resolve_model_dir,
    split_shards,
    stored_tensors,
)
from kogia.checkpoint.folds import HEAD_COPY, Fold
from kogia.checkpoint.gguf_file import is_gguf
from kogia.checkpoint.gguf_tokenizer import load_tokenizer
from kogia.checkpoint.gguf_write import Output, plan_gguf, write_gguf
from kogia.checkpoint.hf import Stored, check_packable, read_stored, warn_of_nonfinite
from kogia.checkpoint.layout import check_agreement, config_as_stored, module_of, stored_dtype
from kogia.checkpoint.quantisation import SCALES, SHAPE, Weight, check_quantization, describe, weights_of
from kogia.checkpoint.tensorfile import Spec, StoredTensor, has_nonfinite, in_parallel, num_bytes, row_ranges, write
from kogia.checkpoint.weights import CODES, DTYPES, as_bytes, check_scales, parts_on_disk, read_dense, read_rows
from kogia.files import replacing_directory, write_json
from kogia.model.quantised import make_packed, packable
from kogia.model.transformer import empty_model
from kogia.ops.packed import FORMATS

_KEPT = ("e_score_correction_bias", "rotary_emb.inv_freq")  # float32 in every checkpoint, and needed so
_TARGETS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "merges.txt chat_template.jinja generation_config.json"
).split()
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Step:
    """One weight to read and write in another form."""

    source: Weight
    dtype: torch.dtype
    """Of what is dense."""
    format: str
    """The key in `FORMATS` of what is written; empty for a dense tensor."""
    asymmetric: bool = False
    fold: Fold | None = None
    """What the weight is multiplied by first."""

    @property
    def keeps(self) -> bool:
        """Whether every part stays as it is stored."""
        if self.fold is not None:
            return False
        if self.format:
            return self.source.format == self.format
        return not self.source.format and CODES[self.dtype] == self.source.data.dtype

    def outputs(self) -> Iterator[Spec]:
        name, shape = self.source.name, self.source.shape
        if self.keeps:
            yield from ((part.name, part.dtype, part.shape) for part in self.source.parts.values())
        elif not self.format:
            yield name, CODES[self.dtype], shape
        else:
            empty = FORMATS[self.format].empty(shape, "meta", zeros=self.asymmetric)
            yield from ((part, CODES[t.dtype], tuple(t.shape)) for part, t in parts_on_disk(name, empty))


def main(config: ConvertConfig, folds: Mapping[str, Fold] | None = None) -> None:
    if config.to_gguf:
        _main_gguf(config)
        return
    max_shard_bytes = int(min(config.shard_gib, 2.0**30) * 2**30)
    if config.dry_run:
        source = resolve_model_dir(config.src)
        steps = plan(source, _named(config.dtype), config.quantize, asymmetric=config.asymmetric)
        print(log.printable(_summary(source, Path(config.dst), steps, max_shard_bytes)))
        return
    convert(
        config.src,
        config.dst,
        dtype=config.dtype,
        quantize=config.quantize,
        asymmetric=config.asymmetric,
        folds=folds,
        max_shard_bytes=max_shard_bytes,
        overwrite=config.overwrite,
    )


def _main_gguf(config: ConvertConfig) -> None:
    if config.dry_run:
        stored = read_stored(config.src)
        outputs = plan_gguf(stored, config.quantize or "bf16")
        print(log.printable(_gguf_summary(stored, Path(config.dst), outputs)))
        return
    convert_to_gguf(config.src, config.dst, kind=config.quantize or "bf16", overwrite=config.overwrite)


def convert_to_gguf(source: str | Path, target: str | Path, *, kind: str = "bf16", overwrite: bool = False) -> Path:
    """Write a model as one GGUF file whose matrices are of the type `kind`: f32, f16, bf16 or q8_0.

    Raises ValueError for a source that does not load or that llama.cpp has no form for, and for an existing target
    unless it is a GGUF file to `overwrite`.
    """
    stored, target = read_stored(source), Path(target)
    check_agreement(empty_model(stored.config), stored.tensors, stored.directory)
    if os.path.lexists(target) and not (overwrite and is_gguf(target)):
        fix = "choose another place" if overwrite else "choose another place, or replace it with --overwrite"
        raise ValueError(f"{target}: exists already{', and is no GGUF file' if overwrite else ''}; {fix}")
    outputs = plan_gguf(stored, kind)
    log.info(_gguf_summary(stored, target, outputs))
    _check_space(target, sum(output.nbytes for output in outputs))
    name = stored.directory.resolve().name.removesuffix(".gguf")
    write_gguf(stored, load_tokenizer(stored.directory), target, kind, outputs, name=name)
    log.info(f"written: {target}")
    return target


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    asymmetric: bool = False,
    folds: Mapping[str, Fold] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> Path:
    """Rewrite a model directory. `dtype` float32, bfloat16, float16 or fp8; None keeps each tensor's own.

    `quantize` fp8, int8 or int4 rounds the weights that the format is for to it, and `dtype` is that of the others.
    `asymmetric` int4 has zeros. `folds` (name on disk -> what to multiply the tensor by first) change the numbers but
    not what the model computes. `dtype` fp8 is `quantize` fp8 with bfloat16 for the other matrices.

    Raises ValueError for a source that does not load, or an existing target unless it is a model to `overwrite`.
    """
    dtype = _named(dtype)
    source, target = resolve_model_dir(source), Path(target)
    check_target(source, target, overwrite)
    steps = plan(source, dtype, quantize, asymmetric=asymmetric, folds=folds or {})
    log.info(_summary(source, target, steps, max_shard_bytes))
    _check_space(target, _size(steps))
    with replacing_directory(target) as draft:
        _copy_texts(source, draft)
        planned = create_weight_files(draft, [spec for step in steps for spec in step.outputs()], max_shard_bytes)
        write_json(draft / CONFIG, _config_json(read_config(source), planned, dtype))
        jobs = (job for step in steps for job in _jobs(step, planned))
        warn_of_nonfinite(_shown(in_parallel(lambda job: job(), jobs), _size(steps)), source)
    log.info(f"written: {target}")
    return target


def _copy_texts(source: Path, target: Path) -> None:
    """The tokenizer and what belongs to it; of a GGUF file what its metadata say."""
    if not is_gguf(source):
        copy_members(source, target, COPIED)
        return
    load_tokenizer(source).save(target)
    ids = {name: value for name, value in read_config(source).items() if name in ("bos_token_id", "eos_token_id")}
    write_json(target / "generation_config.json", ids)


def _named(dtype: str | None) -> str | None:
    """The full name of a dtype; None for "auto" too."""
    name = dtype_name(dtype or "auto")
    return None if name == "auto" else name


def plan(
    source: Path,
    dtype: str | None,
    quantize: str | None = None,
    *,
    asymmetric: bool = False,
    folds: Mapping[str, Fold] = {},
) -> list[Step]:
    """What to do with each stored weight, in the order of the files. Checks the source as loading it would."""
    if asymmetric and quantize != "int4":
        raise ValueError(f"asymmetric: is a kind of int4, not of quantize = {quantize!r}; take int4 or leave it out")
    config = load_config(source)
    stored = stored_tensors(source, config)
    check_quantization(read_config(source), source)
    model = empty_model(config_as_stored(config, stored, source), stored_dtype(stored))
    check_agreement(model, stored, source)
    format = "fp8" if dtype == "fp8" else quantize
    chosen = set()
    if format:
        make_packed(model, format)
        chosen = {name for name, layer in packable(model, format) if layer.format}
    weights = sorted(weights_of(stored)[0].values(), key=lambda weight: (weight.data.file, weight.data.offset))
    steps = []
    for weight in weights:
        if weight.name.endswith(".weight") and _layer_of(weight.name) in chosen:
            steps.append(Step(weight, torch.float32, format or "", asymmetric, folds.get(weight.name)))
        elif weight.format and dtype is None and not quantize:
            steps.append(Step(weight, torch.float32, weight.format))
        else:
            steps.append(Step(weight, _target(weight, dtype), "", fold=folds.get(weight.name)))
    return steps


def _layer_of(name: str) -> str:
    """The layer whose format a weight takes on: the MTP modules' copies of the head that of the head."""
    return "lm_head" if name.endswith(HEAD_COPY) else module_of(name)


def _target(weight: Weight, dtype: str | None) -> torch.dtype:
    """What the numbers of a dense weight become."""
    own = DTYPES.get(weight.data.dtype, torch.bfloat16)
    if weight.format:
        own = torch.bfloat16
    if dtype is None or weight.name.endswith(_KEPT):
        return own
    if dtype != "fp8":
        return _TARGETS[dtype]
    return own if len(weight.shape) < 2 else torch.bfloat16


Job = Callable[[], tuple[int, str | None]]
"""Moves one piece. Returns the bytes written, and the tensor's name where it holds NaN or infinity."""


def _jobs(step: Step, planned: Mapping[str, StoredTensor]) -> Iterator[Job]:
    if step.keeps:
        for part in step.source.parts.values():
            yield from (partial(_keep, part, start, stop, planned) for start, stop in row_ranges(part))
        return
    move = _pack if step.format else _cast
    yield from (partial(move, step, start, stop, planned) for start, stop in row_ranges(step.source.data))


def _keep(part: StoredTensor, start: int, stop: int, planned: Mapping[str, StoredTensor]) -> tuple[int, str | None]:
    rows = read_rows(part, start, stop)
    if part.name.endswith(tuple(SCALES.values())):
        check_scales(part, rows)
    write(planned[part.name], start, as_bytes(rows))
    return rows.nbytes, part.name if has_nonfinite(part.dtype, as_bytes(rows)) else None


def _cast(step: Step, start: int, stop: int, planned: Mapping[str, StoredTensor]) -> tuple[int, str | None]:
    name, rows = step.source.name, read_dense(step.source, start, stop, step.dtype)
    rows = rows if step.fold is None else step.fold.of(rows, start)
    finite = not has_nonfinite(CODES[rows.dtype], as_bytes(rows))
    if not finite and step.dtype == torch.float16 and _is_finite(step, start, stop):
        raise ValueError(f"{step.source.data.file}: {name} exceeds float16's largest number, 65504; use bfloat16")
    write(planned[name], start, as_bytes(rows))
    return rows.nbytes, None if finite else name


def _is_finite(step: Step, start: int, stop: int) -> bool:
    return bool(read_dense(step.source, start, stop, torch.float32).isfinite().all())


def _pack(step: Step, start: int, stop: int, planned: Mapping[str, StoredTensor]) -> tuple[int, str | None]:
    rows = read_dense(step.source, start, stop, torch.float32)
    rows = rows if step.fold is None else step.fold.of(rows, start)
    check_packable(step.source, rows, step.format)
    options: dict[str, Any] = {"asymmetric": True} if step.asymmetric else {}
    if step.fold is not None and step.format == "int4":
        options |= {"importance": step.fold.importance, "spread": step.fold.spread}
    done = 0
    for name, part in parts_on_disk(step.source.name, FORMATS[step.format].pack(rows, **options)):
        if name.endswith(SHAPE):
            first, part = 0, torch.tensor(step.source.shape)
        else:  # the rows of every part are in proportion, but for the last one
            first = start * planned[name].num_rows // step.source.shape[0]
        write(planned[name], first, as_bytes(part.contiguous()))
        done += part.nbytes
    return done, None


def _shown(results: Iterator[tuple[int, str | None]], total: int) -> Iterator[str | None]:
    """The names among the results, while saying now and then how far the conversion is."""
    done, last = 0, time.monotonic()
    for nbytes, name in results:
        done += nbytes
        if time.monotonic() - last > _PROGRESS_SECONDS:
            log.info(f"  {_gib(done)} of {_gib(total)} ({done / total:.0%})")
            last = time.monotonic()
        yield name


def _config_json(data: dict[str, Any], planned: Mapping[str, StoredTensor], dtype: str | None) -> dict[str, Any]:
    """The source's, with its own words about type and quantisation. Code that it points to is not copied."""
    announced, found = data.get("quantization_config"), describe(weights_of(planned)[0])
    data = {key: value for key, value in data.items() if key not in ("auto_map", "quantization_config")}
    if dtype is not None:
        data["dtype" if "dtype" in data else "torch_dtype"] = "bfloat16" if dtype == "fp8" else dtype
    if found is not None:
        same = isinstance(announced, dict) and announced.get("quant_method") == found["quant_method"] == "fp8"
        data["quantization_config"] = announced if same else found
    return data


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target}: exists already; choose another place, or replace it with --overwrite")
    if not (target / CONFIG).is_file() or target.resolve() in source.resolve().parents:
        raise ValueError(f"{target}: not just a model directory; --overwrite replaces only those. Choose another place")


def _check_space(target: Path, needed: int) -> None:
    place = next(parent for parent in target.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{target}: needs {_gib(needed)}, {place} has {_gib(free)} free; make room first")


def _size(steps: Sequence[Step]) -> int:
    return sum(num_bytes(dtype, shape) for step in steps for _, dtype, shape in step.outputs())


def _summary(source: Path, target: Path, steps: Sequence[Step], max_shard_bytes: int) -> str:
    outputs = [spec for step in steps for spec in step.outputs()]
    before = [part for step in steps for part in step.source.parts.values()]
    copied = ["the tokenizer"] if is_gguf(source) else [name for name in COPIED if os.path.lexists(source / name)]
    return "\n".join(
        [
            f"{source} -> {target}",
            f"  from    {_types((t.stored_type, t.stored_bytes) for t in before)}",
            f"  to      {_types((dtype, num_bytes(dtype, shape)) for _, dtype, shape in outputs)}",
            f"  files   {len(split_shards(outputs, max_shard_bytes))} with {len(outputs):,} tensors; {CONFIG}",
            f"  copied  {', '.join(copied) or 'nothing: no tokenizer is there'}",
        ]
    )


def _gguf_summary(stored: Stored, target: Path, outputs: Sequence[Output]) -> str:
    left_out = stored.config.num_mtp_layers
    lines = [
        f"{stored.directory} -> {target}",
        f"  from    {_types((t.stored_type, t.stored_bytes) for t in stored.tensors.values())}",
        f"  to      {_types((output.type, output.nbytes) for output in outputs)}",
        f"  files   1 with {len(outputs):,} tensors and the tokenizer",
    ]
    return "\n".join([*lines, f"  left    {left_out} module(s) of multi-token prediction"] if left_out else lines)


def _types(tensors: Iterator[tuple[str, int]]) -> str:
    """`638.1 GiB: F8_E4M3 637.2 GiB, BF16 0.9 GiB`."""
    sizes: Counter[str] = Counter()
    for dtype, nbytes in tensors:
        sizes[dtype] += nbytes
    return f"{_gib(sizes.total())}: " + ", ".join(f"{dtype} {_gib(nbytes)}" for dtype, nbytes in sizes.most_common())


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**20 * 10 else f"{nbytes / 2**20:,.2f} MiB"
