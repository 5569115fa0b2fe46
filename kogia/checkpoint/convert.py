"""`kogia convert SRC DST`: another dtype, FP8 or back, merged or split, to GGUF, without building the model.

Each tensor goes piece by piece from its old file to its new one, rounded once; what is FP8 is dequantised in float32.
"""

import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from kogia.checkpoint.gguf_file import is_gguf
from kogia.checkpoint.gguf_tokenizer import load_tokenizer
from kogia.checkpoint.gguf_write import Output, plan_gguf, write_gguf
from kogia.checkpoint.hf import Stored, as_bytes, check_scales, read_rows, read_stored, warn_of_nonfinite
from kogia.checkpoint.layout import (
    CODES,
    DTYPES,
    QUANTIZATION,
    check_agreement,
    check_quantization,
    config_as_stored,
    model_for,
    stored_dtype,
)
from kogia.checkpoint.tensorfile import (
    FP8,
    SCALE,
    Spec,
    StoredTensor,
    has_nonfinite,
    in_parallel,
    num_bytes,
    row_ranges,
    write,
)
from kogia.files import replacing_directory, write_json
from kogia.ops.packed import FORMATS, format_of

# What DeepSeek-V3 and V3.2 publish in FP8; embedding, head, router, eh_proj and weights_proj are not
_FP8_MATRICES = frozenset(
    "q_proj k_proj v_proj o_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj wq_b wk "
    "gate_proj up_proj down_proj".split()
)
_KEPT = ("e_score_correction_bias", "rotary_emb.inv_freq")  # float32 in every checkpoint, and needed so
_TARGETS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "merges.txt chat_template.jinja generation_config.json"
).split()
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor to read, apply `scale` to and write in `dtype`, with scales of its own where that quantises it."""

    source: StoredTensor
    scale: StoredTensor | None
    dtype: torch.dtype

    @property
    def format(self) -> str:
        """The key in `FORMATS` of what is written; empty for a dense tensor."""
        return format_of(self.dtype) or ""

    @property
    def quantizes(self) -> bool:
        return bool(self.format) and self.source.dtype != CODES[self.dtype]

    def outputs(self) -> Iterator[Spec]:
        name, shape = self.source.name, self.source.shape
        yield name, CODES[self.dtype], shape
        if self.quantizes:
            yield name + SCALE, "F32", FORMATS[self.format].scale_shape(shape)


def main(config: ConvertConfig) -> None:
    if config.to_gguf:
        _main_gguf(config)
        return
    max_shard_bytes = int(min(config.shard_gib, 2.0**30) * 2**30)
    if config.dry_run:
        source = resolve_model_dir(config.src)
        steps = plan(source, _named(config.dtype))
        print(log.printable(_summary(source, Path(config.dst), steps, max_shard_bytes)))
        return
    convert(config.src, config.dst, dtype=config.dtype, max_shard_bytes=max_shard_bytes, overwrite=config.overwrite)


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
    check_agreement(model_for(stored.config, stored.tensors, dtype=stored.dtype), stored.tensors, stored.directory)
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
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> Path:
    """Rewrite a model directory. `dtype` float32, bfloat16, float16 or fp8; None keeps each tensor's own.

    Raises ValueError for a source that does not load, or an existing target unless it is a model to `overwrite`.
    """
    dtype = _named(dtype)
    source, target = resolve_model_dir(source), Path(target)
    _check_target(source, target, overwrite)
    steps = plan(source, dtype)
    log.info(_summary(source, target, steps, max_shard_bytes))
    _check_space(target, _size(steps))
    with replacing_directory(target) as draft:
        write_json(draft / CONFIG, _config_json(read_config(source), steps, dtype))
        _copy_texts(source, draft)
        planned = create_weight_files(draft, [spec for step in steps for spec in step.outputs()], max_shard_bytes)
        jobs = [(step, *rows, planned) for step in steps for rows in row_ranges(step.source)]
        warn_of_nonfinite(_shown(in_parallel(_convert, jobs), _size(steps)), source)
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


def plan(source: Path, dtype: str | None) -> list[Step]:
    """What to do with each stored tensor, in the order of the files. Checks the source as loading it would."""
    config = load_config(source)
    stored = stored_tensors(source, config)
    check_quantization(read_config(source), source)
    model = model_for(config_as_stored(config, stored, source), stored, dtype=stored_dtype(stored))
    check_agreement(model, stored, source)
    steps = []
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset)):
        target = _target(tensor, dtype)
        if name.endswith(SCALE):  # kept beside a weight that stays FP8, else applied to it
            if _target(stored[name.removesuffix(SCALE)], dtype) == DTYPES[FP8]:
                steps.append(Step(tensor, None, DTYPES[tensor.dtype]))
        elif tensor.dtype == FP8 and target != DTYPES[FP8]:
            steps.append(Step(tensor, stored[name + SCALE], target))
        else:
            steps.append(Step(tensor, None, target))
    return steps


def _target(tensor: StoredTensor, dtype: str | None) -> torch.dtype:
    own = DTYPES[tensor.dtype]
    if dtype is None or tensor.name.endswith(_KEPT):
        return own
    if dtype != "fp8":
        return _TARGETS[dtype]
    if len(tensor.shape) < 2 or own == DTYPES[FP8]:
        return own
    return DTYPES[FP8] if tensor.name.split(".")[-2] in _FP8_MATRICES else torch.bfloat16


Job = tuple[Step, int, int, Mapping[str, StoredTensor]]


def _convert(job: Job) -> tuple[int, str | None]:
    """Move one piece. Returns the bytes written, and the tensor's name where it holds NaN or infinity."""
    step, start, stop, planned = job
    name = step.source.name
    rows = read_rows(step.source, step.scale, start, stop, torch.float32 if step.quantizes else step.dtype)
    finite = not has_nonfinite(CODES[rows.dtype], as_bytes(rows))
    if name.endswith(SCALE):
        check_scales(step.source, rows)
    if step.quantizes:
        if not finite:
            raise ValueError(f"{step.source.file}: {name} holds NaN or infinity and has no FP8 form; repair the source")
        packed = FORMATS[step.format].pack(rows)
        write(planned[name + SCALE], start // FORMATS[step.format].row_block, as_bytes(packed.scale))
        rows = packed.data
    elif not finite and step.dtype == torch.float16 and _is_finite(step, start, stop):
        raise ValueError(f"{step.source.file}: {name} exceeds float16's largest number, 65504; use bfloat16")
    write(planned[name], start, as_bytes(rows))
    return rows.nbytes, None if finite else name


def _is_finite(step: Step, start: int, stop: int) -> bool:
    return bool(read_rows(step.source, step.scale, start, stop, torch.float32).isfinite().all())


def _shown(results: Iterator[tuple[int, str | None]], total: int) -> Iterator[str | None]:
    """The names among the results, while saying now and then how far the conversion is."""
    done, last = 0, time.monotonic()
    for nbytes, name in results:
        done += nbytes
        if time.monotonic() - last > _PROGRESS_SECONDS:
            log.info(f"  {_gib(done)} of {_gib(total)} ({done / total:.0%})")
            last = time.monotonic()
        yield name


def _config_json(data: dict[str, Any], steps: Sequence[Step], dtype: str | None) -> dict[str, Any]:
    """The source's, with its own words about type and quantisation. Code that it points to is not copied."""
    announced = data.get("quantization_config") or QUANTIZATION
    data = {key: value for key, value in data.items() if key not in ("auto_map", "quantization_config")}
    if dtype is not None:
        data["dtype" if "dtype" in data else "torch_dtype"] = "bfloat16" if dtype == "fp8" else dtype
    if any(step.dtype == DTYPES[FP8] for step in steps):
        data["quantization_config"] = announced
    return data


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
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
    before = {tensor.name: tensor for step in steps for tensor in (step.source, step.scale) if tensor}
    copied = ["the tokenizer"] if is_gguf(source) else [name for name in COPIED if os.path.lexists(source / name)]
    return "\n".join(
        [
            f"{source} -> {target}",
            f"  from    {_types((t.stored_type, t.stored_bytes) for t in before.values())}",
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
