"""Load and save a `Transformer` as a directory in the published Hugging Face layout, FP8 included.

Tensors go piece by piece between the files and the memory where they stay, so neither direction holds more than a few
pieces on the side. What they are called is in layout.py, the files in directory.py and tensorfile.py.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    check_agreement,
    config_as_stored,
    disk_views,
    disk_weights,
    module_of,
    stored_dtype,
)
from kogia.checkpoint.quantisation import SCALES, Weight, check_quantization, describe, weights_of
from kogia.checkpoint.tensorfile import (
    PIECE,
    StoredTensor,
    has_nonfinite,
    in_parallel,
    populate,
    row_ranges,
    write,
)
from kogia.checkpoint.weights import (
    CODES,
    DTYPES,
    as_bytes,
    check_scales,
    dense_shape,
    packed_rows,
    read_dense,
    read_rows,
    read_zeros,
)
from kogia.files import replacing_directory, write_json
from kogia.model.config import ModelConfig
from kogia.model.hf_export import config_to_hf
from kogia.model.linear import Linear
from kogia.model.mla import MLA
from kogia.model.quantised import make_packed
from kogia.model.sharding import Part, Share, check_cuts, empty_share
from kogia.model.transformer import Transformer, empty_model, materialize
from kogia.ops.packed import FORMATS, Packed, Shape
from kogia.text.tokenizer import Tokenizer

__all__ = ["Stored", "load_config", "load_model", "read_stored", "resolve_model_dir", "save_model", "write_model_files"]

SHARD_BYTES = 5 * 2**30
STORED = "stored"
"""For `load_model`: quantised weights stay as they are."""
_PIECES_ON_DEVICE = 16
"""Pieces that a GPU rounds at once, which takes some twenty launches whatever their number."""


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

    @property
    def formats(self) -> set[str]:
        """Keys of `FORMATS` that some of the weights are stored in."""
        return {weight.format for weight in weights_of(self.tensors)[0].values() if weight.format}


def read_stored(path: str | Path, *, weights: bool = True) -> Stored:
    """What is known of a model before it is loaded. Raises ValueError as `load_model` does, but for the weights.

    Without `weights` nothing of that size is fetched: of a model of the Hugging Face Hub no header is read.
    """
    directory = resolve_model_dir(path, weights=weights)
    config = load_config(directory)
    if not weights and not os.path.lexists(path):
        return Stored(directory, config, {})
    tensors = stored_tensors(directory, config)
    check_quantization(read_config(directory), directory)
    return Stored(directory, config_as_stored(config, tensors, directory), tensors)


def load_model(
    path: str | Path | Stored,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    share: Share | None = None,
) -> Transformer:
    """Build the model of a directory and stream its tensors into place; of a `share`, one rank's part of them.

    `dtype` None keeps the stored one, bfloat16 for an FP8 checkpoint; router biases stay float32. Quantised weights are
    made dense, or with `quantize` "stored" stay as they are and are made dense whenever they are used. `quantize` may
    also be a key of `FORMATS`, which the weights that it is for are rounded to while they are read.

    Raises ValueError naming the file for a damaged one, and listing all tensors that do not fit `config.json` at once.
    Weights that are not finite are warned of.
    """
    stored = path if isinstance(path, Stored) else read_stored(path)
    dtype, (weights, _) = dtype or stored.dtype, weights_of(stored.tensors)
    model = whole = empty_model(stored.config, dtype)
    check_agreement(whole, stored.tensors, stored.directory)
    if share is not None:
        model = empty_share(stored.config, share, dtype)
    if quantize is not None:
        _make_packed(model, weights, quantize, stored.directory)
    if share is not None and quantize is not None:
        _make_packed(whole, weights, quantize, stored.directory)
        check_cuts(model, whole)
    materialize(model, device)
    warn_of_nonfinite(in_parallel(lambda piece: piece(), _pieces(model, weights, share)), stored.directory)
    return model.eval()


def loaded_bytes(stored: Stored, *, dtype: torch.dtype | None = None, quantize: str | None = None) -> int:
    """What the weights of `load_model` will take, with the copies of packed ones that attention reads. No weight is
    read. Raises ValueError as it does for weights that cannot be kept as they are."""
    model = empty_model(stored.config, dtype or stored.dtype)
    model.tie_head()
    if quantize is not None:
        _make_packed(model, weights_of(stored.tensors)[0], quantize, stored.directory)
    copied = [module.kv_b_proj for module in model.modules() if isinstance(module, MLA) and module.kv_b_proj.format]
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return held + sum(math.prod(layer.shape) for layer in copied) * model.dtype.itemsize


def _make_packed(model: Transformer, weights: Mapping[str, Weight], quantize: str, directory: Path) -> None:
    """Make room for packed weights; those that are stored in that format stay as they are.

    Raises ValueError where all are to stay, but the experts of a stack are not alike.
    """
    kinds: dict[str, set[tuple[str, bool]]] = {}
    for name, weight in weights.items():
        kinds.setdefault(module_of(name), set()).add((weight.format, weight.zero is not None))
    if quantize != STORED:
        make_packed(model, quantize)
    for name, module in model.named_modules():
        kind = kinds.get(name, {("", False)})
        if not isinstance(module, Linear):
            continue
        if len(kind) > 1 and quantize == STORED:
            raise ValueError(
                f"{directory}: the weights of {name} are of several types, {_types(kind)}, and cannot be kept so; make "
                "them dense (`--quantize none`, or `quantize=None`)"
            )
        format, zeros = next(iter(kind))
        if len(kind) == 1 and format and quantize in (STORED, format):
            if not FORMATS[format].takes(module.shape):
                raise ValueError(
                    f"{name}: a share of {list(module.shape)} numbers has no {format} form; choose another "
                    "tensor_parallel, or load dense weights"
                )
            module.make_packed(format, zeros=zeros)


def _types(kinds: set[tuple[str, bool]]) -> str:
    return " and ".join(sorted((format or "dense") + (" with zeros" if zeros else "") for format, zeros in kinds))


Piece = Callable[[], str | None]
"""Reads rows into their place. Returns the tensor's name where it holds NaN or infinity."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rounding:
    """Rows of a weight that are to be rounded, and where they go."""

    weight: Weight
    start: int
    target: Packed
    columns: Part | None
    """Of the weight, where it is not all."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is equal in those that may be rounded together."""
        return self.target.format, tuple(self.target.data.shape), self.weight.format, self.weight.data.dtype

    @property
    def size(self) -> int:
        return math.prod(dense_shape(self.target))

    def read(self) -> Tensor:
        """The dense rows on the CPU. Numbers of 16 bits stay so: on the way to a GPU they are half as many bytes."""
        own = torch.float32 if self.weight.format else DTYPES.get(self.weight.data.dtype, torch.float32)
        dtype = own if own.itemsize < 4 else torch.float32
        rows = _cut(read_dense(self.weight, self.start, self.start + len(self.target), dtype), self.columns)
        check_packable(self.weight, rows, self.target.format)
        return rows


def _pieces(model: Transformer, weights: Mapping[str, Weight], share: Share | None) -> Iterator[Piece]:
    """In the order of the files, but for small pieces that are rounded together."""
    waiting: dict[tuple[Any, ...], list[_Rounding]] = {}
    places = sorted(disk_weights(model), key=lambda item: (weights[item[0]].data.file, weights[item[0]].data.offset))
    for name, target in places:
        weight = weights[name]
        if isinstance(target, Packed):
            if (target.format, target.zero is None) == (weight.format, weight.zero is None):
                yield from _kept(weight, target, share)
                continue
            num_pieces = 1 if target.device.type == "cpu" else _PIECES_ON_DEVICE
            for piece in _to_round(weight, target, share, num_pieces):
                together = waiting.setdefault(piece.kind, [])
                together.append(piece)
                if (len(together) + 1) * piece.size > num_pieces * PIECE:
                    yield partial(_pack, waiting.pop(piece.kind))
        elif weight.format:
            for start, rows, columns in _spans(weight.data, weight.shape, tuple(target.shape), share):
                yield partial(_make_dense, weight, start, target[rows], columns)
        else:
            yield from _copies(weight.data, target, share)
    yield from (partial(_pack, together) for together in waiting.values())


def _spans(
    source: StoredTensor, whole: Shape, own: Shape, share: Share | None, num_pieces: int = 1
) -> Iterator[tuple[int, slice, Part | None]]:
    """(row of the source, rows of the target, columns of the source where that is not all) of what a rank, or the only
    one, holds in `own` shape of a tensor of shape `whole`."""
    part = None if share is None else share.part(whole, own)
    first, columns = 0, None
    if part is not None:
        first, columns = (part.start, None) if part.axis == 0 else (0, part)
    for start, stop in row_ranges(source, num_pieces):
        begin, end = max(start - first, 0), min(stop - first, own[0] if own else 1)
        if begin < end:
            yield first + begin, slice(begin, end), columns


def _copies(source: StoredTensor, target: Tensor, share: Share | None) -> Iterator[Piece]:
    # what is only copied is best copied in larger parts
    num_pieces = 4 if CODES[target.dtype] == source.dtype else 1
    for start, rows, columns in _spans(source, source.shape, tuple(target.shape), share, num_pieces):
        yield partial(_copy, source, start, target[rows] if target.dim() else target[None], columns)


def _kept(weight: Weight, target: Packed, share: Share | None) -> Iterator[Piece]:
    """A packed weight as it is stored."""
    yield from _copies(weight.data, target.data.view(torch.int32) if weight.format == "int4" else target.data, share)
    yield from _copies(weight.scale, target.scale, share)
    if target.zero is not None and weight.zero is not None:
        for start, rows, columns in _spans(weight.data, weight.scale.shape, tuple(target.zero.shape), share):
            yield partial(_copy_zeros, weight.zero, start, target.zero[rows], columns)


def _to_round(weight: Weight, target: Packed, share: Share | None, num_pieces: int) -> Iterator[_Rounding]:
    """A packed weight of one that is stored in another form."""
    for start, rows, columns in _spans(weight.data, weight.shape, dense_shape(target), share, num_pieces):
        yield _Rounding(weight, start, packed_rows(target, rows.start, rows.stop), columns)


def _copy(source: StoredTensor, start: int, target: Tensor, columns: Part | None) -> str | None:
    if target.is_cpu and target.is_contiguous() and CODES[target.dtype] == source.dtype and columns is None:
        rows = target
        populate(as_bytes(rows))
        source.read_into(start, as_bytes(rows))
    else:
        rows = _cut(read_rows(source, start, start + len(target)), columns)
        if target.dtype == torch.float16:  # which may overflow, to see that
            rows = rows.to(torch.float16)
        target.copy_(rows)
    if source.name.endswith(tuple(SCALES.values())):
        check_scales(source, rows)
    return _nonfinite(source.name, rows)


def _copy_zeros(source: StoredTensor, start: int, target: Tensor, columns: Part | None) -> None:
    target.copy_(_cut(read_zeros(source, start, start + len(target)), columns))


def _make_dense(weight: Weight, start: int, target: Tensor, columns: Part | None) -> str | None:
    rows = _cut(read_dense(weight, start, start + len(target), target.dtype), columns)
    target.copy_(rows)
    return _nonfinite(weight.name, rows)


def _pack(together: Sequence[_Rounding]) -> None:
    """Round rows of one kind where they will stay, at once."""
    target = together[0].target
    read = [each.read().to(target.device) for each in together]
    packed = FORMATS[target.format].pack(torch.stack(read) if len(read) > 1 else read[0][None])
    for i, each in enumerate(together):
        each.target.data.copy_(packed.data[i])
        each.target.scale.copy_(packed.scale[i])


def _cut(rows: Tensor, columns: Part | None) -> Tensor:
    return rows if columns is None else columns.of(rows).contiguous()


def check_packable(weight: Weight, rows: Tensor, format: str) -> None:
    """Raise ValueError for rows, on the CPU, with numbers that have no quantised form."""
    if _nonfinite(weight.name, rows):
        raise ValueError(
            f"{weight.data.file}: {weight.name} holds NaN or infinity and has no {format.replace('fp', 'FP')} form; "
            "repair the source"
        )


def _nonfinite(name: str, rows: Tensor) -> str | None:
    return name if rows.numel() and has_nonfinite(CODES[rows.dtype], as_bytes(rows)) else None


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
    layout = [(name, CODES[view.dtype], tuple(view.shape)) for name, view in views.items()]
    planned = create_weight_files(directory, layout, max_shard_bytes)
    write_json(directory / CONFIG, _config_json(model, planned))
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


def _config_json(model: Transformer, planned: Mapping[str, StoredTensor]) -> dict[str, Any]:
    data = config_to_hf(model.config, str(model.dtype).removeprefix("torch."))
    if quantization := describe(weights_of(planned)[0]):
        scales = [layer.weight_scale_inv for layer in model.modules() if isinstance(layer, Linear)]
        scales = [scale for scale in scales if scale is not None]
        if scales and all(bool((torch.frexp(scale).mantissa == 0.5).all()) for scale in scales):
            quantization["scale_fmt"] = "ue8m0"
        data["quantization_config"] = quantization
    return data
