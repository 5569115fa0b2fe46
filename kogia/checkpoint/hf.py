"""Load and save a `Transformer` as a directory in the published Hugging Face layout, FP8 included.

Tensors go piece by piece between the files and the memory where they stay, so neither direction holds more than a few
pieces on the side. What they are called is in layout.py, the files in directory.py and tensorfile.py.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kogia import log
from kogia.checkpoint.directory import (
    CONFIG,
    create_weight_files,
    load_config,
    read_config,
    resolve_model_dir,
    stored_tensors,
)
from kogia.checkpoint.layout import (
    CODES,
    DTYPES,
    QUANTIZATION,
    check_agreement,
    check_quantization,
    config_as_stored,
    disk_views,
    model_for,
    stored_dtype,
    stored_format,
)
from kogia.checkpoint.tensorfile import (
    FP8,
    SCALE,
    StoredTensor,
    has_nonfinite,
    in_parallel,
    populate,
    read,
    row_ranges,
    write,
)
from kogia.files import replacing_directory, write_json
from kogia.model.config import ModelConfig
from kogia.model.hf_export import config_to_hf
from kogia.model.sharding import Part, Share, check_cuts
from kogia.model.transformer import Transformer, materialize
from kogia.ops.packed import FORMATS, Packed
from kogia.text.tokenizer import Tokenizer

__all__ = ["Stored", "load_config", "load_model", "read_stored", "resolve_model_dir", "save_model", "write_model_files"]

SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True, eq=False)
class Stored:
    """A model directory as its config.json and the headers of its files tell; no weight is read."""

    directory: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]

    @property
    def dtype(self) -> torch.dtype:
        """What `load_model` takes by itself."""
        return stored_dtype(self.tensors)


def read_stored(path: str | Path, *, keep_fp8: bool = False, weights: bool = True) -> Stored:
    """What is known of a model before it is loaded. Raises ValueError as `load_model` does, but for the weights.

    Without `weights` nothing of that size is fetched: of a model of the Hugging Face Hub no header is read.
    """
    directory = resolve_model_dir(path, weights=weights)
    config = load_config(directory)
    if not weights and not os.path.lexists(path):
        return Stored(directory, config, {})
    tensors = stored_tensors(directory, config)
    check_quantization(read_config(directory), directory)
    if keep_fp8 and all(tensor.dtype != FP8 for tensor in tensors.values()):
        raise ValueError(f"{directory}: holds no FP8 weights to keep; `kogia convert SRC DST --dtype fp8` makes them")
    return Stored(directory, config_as_stored(config, tensors, directory), tensors)


def load_model(
    path: str | Path | Stored,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    keep_fp8: bool = False,
    share: Share | None = None,
) -> Transformer:
    """Build the model of a directory and stream its tensors into place; of a `share`, one rank's part of them.

    `dtype` None keeps the stored one, bfloat16 for an FP8 checkpoint; router biases stay float32. FP8 weights are
    dequantised, or with `keep_fp8` stay FP8 and are dequantised whenever they are used.

    Raises ValueError naming the file for a damaged one, and listing all tensors that do not fit `config.json` at once.
    Weights that are not finite are warned of.
    """
    stored = path if isinstance(path, Stored) else read_stored(path, keep_fp8=keep_fp8)
    whole = model_for(stored.config, stored.tensors, dtype=dtype or stored.dtype, keep_packed=keep_fp8)
    check_agreement(whole, stored.tensors, stored.directory)
    if share is None:
        model = whole
    else:
        model = model_for(stored.config, stored.tensors, dtype=dtype or stored.dtype, keep_packed=keep_fp8, share=share)
        check_cuts(model, whole)
    materialize(model, device)
    warn_of_nonfinite(in_parallel(_fill, _pieces(model, stored.tensors, share)), stored.directory)
    return model.eval()


class Piece(NamedTuple):
    """Rows of a stored tensor on their way to their place."""

    source: StoredTensor
    scale: StoredTensor | None
    """To apply."""
    start: int
    """The first row."""
    target: Tensor
    columns: Part | None
    """All that is kept of each row, where that is not all of it."""


def _pieces(model: Transformer, stored: Mapping[str, StoredTensor], share: Share | None) -> Iterator[Piece]:
    """Pieces of all tensors, in the order of the files."""
    targets = sorted(disk_views(model), key=lambda item: (stored[item[0]].file, stored[item[0]].offset))
    for name, target in targets:
        source = stored[name]
        scale = stored[name + SCALE] if source.dtype == FP8 and target.dtype != DTYPES[FP8] else None
        part = None if share is None else share.part(source.shape, target.shape)
        first, columns = 0, None
        if part is not None:
            first, columns = (part.start, None) if part.axis == 0 else (0, part)
        # what is only copied is best copied in larger parts
        for start, stop in row_ranges(source, 4 if target.dtype == DTYPES[source.dtype] else 1):
            begin, end = max(start - first, 0), min(stop - first, len(target) if target.dim() else 1)
            if begin < end:
                rows = target[begin:end] if target.dim() else target[None]
                yield Piece(source, scale, first + begin, rows, columns)


def _fill(piece: Piece) -> str | None:
    """Read one piece into its place. Returns the tensor's name where it holds NaN or infinity."""
    source, scale, start, target, columns = piece
    if target.is_cpu and target.is_contiguous() and target.dtype == DTYPES[source.dtype] and columns is None:
        rows = target
        populate(as_bytes(rows))
        read(source, start, as_bytes(rows))
    else:
        # cast by the copy; but in float16 first, which may overflow, to see that
        early = scale is not None or target.dtype == torch.float16
        rows = read_rows(source, scale, start, start + len(target), target.dtype if early else DTYPES[source.dtype])
        rows = rows if columns is None else columns.of(rows).contiguous()
        target.copy_(rows)
    if source.name.endswith(SCALE):
        check_scales(source, rows)
    return source.name if has_nonfinite(CODES[rows.dtype], as_bytes(rows)) else None


def read_rows(source: StoredTensor, scale: StoredTensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start:stop of a stored tensor on the CPU, rounded once to `dtype`; FP8 with scales is dequantised."""
    if scale is not None and (ahead := start % FORMATS[stored_format(source)].row_block):
        return read_rows(source, scale, start - ahead, stop, dtype)[ahead:]  # scales are those of whole blocks
    rows = torch.empty((stop - start, *source.shape[1:]), dtype=DTYPES[source.dtype])
    read(source, start, as_bytes(rows))
    if scale is None:
        return rows.to(dtype)
    name = stored_format(source)
    height = FORMATS[name].row_block
    blocks = read_rows(scale, None, start // height, -(-stop // height), torch.float32)
    check_scales(scale, blocks)
    return Packed(rows, blocks, None, name).dense(dtype)


def check_scales(scale: StoredTensor, blocks: Tensor) -> None:
    if not bool(((blocks > 0) & (blocks < torch.inf)).all()):  # also false for NaN
        raise ValueError(f"{scale.file}: {scale.name} holds scales that are not positive numbers; the file is damaged")


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def warn_of_nonfinite(names: Iterator[str | None], directory: Path) -> None:
    """Run through the results of reading and name the tensors that hold NaN or infinity."""
    found = sorted({name for name in names if name})
    if found:
        shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
        log.warn(f"{directory}: NaN or infinite values in {shown}")


def save_model(
    model: Transformer,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a complete model directory that other tools can serve. Appears under its name only when complete.

    Weights beyond `max_shard_bytes` go into several files with an index.
    """
    with replacing_directory(Path(directory)) as draft:
        write_model_files(model, draft, tokenizer, max_shard_bytes=max_shard_bytes)
    return Path(directory)


def write_model_files(
    model: Transformer, directory: Path, tokenizer: Tokenizer | None, *, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config, weights, generation settings and tokenizer into an existing directory."""
    views = dict(disk_views(model, copies=True))
    write_json(directory / CONFIG, _config_json(model, views))
    layout = [(name, CODES[view.dtype], tuple(view.shape)) for name, view in views.items()]
    planned = create_weight_files(directory, layout, max_shard_bytes)
    for name, view in views.items():
        for start, stop in row_ranges(planned[name]):
            rows = view[start:stop] if view.dim() else view
            write(planned[name], start, as_bytes(rows.contiguous().cpu()))
    bos, eos = model.config.bos_id, (model.config.eos_id,)
    if tokenizer is not None:
        bos, eos = tokenizer.bos_id, tokenizer.eos_ids
        tokenizer.save(directory)
    settings = {} if tokenizer is None else tokenizer.generation
    kept = {name: value for name, value in settings.items() if name not in ("bos_token_id", "eos_token_id")}
    ids = {"eos_token_id": eos[0] if len(eos) == 1 else list(eos)} | ({} if bos is None else {"bos_token_id": bos})
    write_json(directory / "generation_config.json", {"do_sample": True, **kept, **ids})


def _config_json(model: Transformer, views: Mapping[str, Tensor]) -> dict[str, Any]:
    data = config_to_hf(model.config, str(model.dtype).removeprefix("torch."))
    scales = [view for name, view in views.items() if name.endswith(SCALE)]
    if scales:
        powers_of_two = all(bool((torch.frexp(scale).mantissa == 0.5).all()) for scale in scales)
        data["quantization_config"] = QUANTIZATION | ({"scale_fmt": "ue8m0"} if powers_of_two else {})
    return data
