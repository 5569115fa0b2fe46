"""Weights between files and memory: rows of a stored one, dense or packed, and the parts in which one is stored."""

from collections.abc import Iterator

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from kogia.checkpoint.quantisation import CODES_PER_WORD, PACKED, SCALES, SHAPE, ZERO, Weight
from kogia.checkpoint.tensorfile import FP8, StoredTensor
from kogia.ops.packed import FORMATS, Packed

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    FP8: torch.float8_e4m3fn,
}
"""Of numbers that a dense weight may have, by their names in files."""
_INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
CODES = {dtype: code for code, dtype in (DTYPES | _INTEGERS).items()}


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows start:stop of a stored tensor as they are, on the CPU."""
    rows = torch.empty((stop - start, *tensor.shape[1:]), dtype=(DTYPES | _INTEGERS)[tensor.dtype])
    tensor.read_into(start, as_bytes(rows))
    return rows


def read_dense(weight: Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start:stop of a weight on the CPU, rounded once to `dtype`; a quantised one is made dense."""
    if not weight.format:
        return read_rows(weight.data, start, stop).to(dtype)
    ahead = start % FORMATS[weight.format].row_block
    return read_packed(weight, start - ahead, stop).dense(dtype)[ahead:]


def read_packed(weight: Weight, start: int, stop: int) -> Packed:
    """Rows start:stop, between blocks, of a quantised weight on the CPU. The scales are of the type that is stored."""
    data, height = read_rows(weight.data, start, stop), FORMATS[weight.format].row_block
    scale = read_rows(weight.scale, start // height, -(-stop // height))
    check_scales(weight.scale, scale)
    zero = None if weight.zero is None else read_zeros(weight.zero, start, stop)
    return Packed(data.view(torch.uint8) if weight.format == "int4" else data, scale, zero, weight.format)


def read_zeros(zero: StoredTensor, start: int, stop: int) -> UInt8[Tensor, "rows groups"]:
    """The zeros of rows start:stop of an int4 weight."""
    first = start // CODES_PER_WORD
    words = read_rows(zero, first, -(-stop // CODES_PER_WORD))
    shifts = 4 * torch.arange(CODES_PER_WORD, dtype=torch.int32)
    rows = (words[:, None] >> shifts[:, None] & 15).flatten(0, 1).to(torch.uint8)
    return rows[start - first * CODES_PER_WORD : stop - first * CODES_PER_WORD]


def zeros_as_stored(zero: UInt8[Tensor, "rows groups"]) -> Int32[Tensor, "words groups"]:
    """Those of eight rows in a word, the first row's in its lowest bits."""
    padded = torch.nn.functional.pad(zero, (0, 0, 0, -len(zero) % CODES_PER_WORD)).int()
    words = padded.unflatten(0, (-1, CODES_PER_WORD))
    out = words[:, 0].clone()
    for i in range(1, CODES_PER_WORD):
        out |= words[:, i] << 4 * i
    return out


def zeros_shape(scales: tuple[int, ...]) -> tuple[int, ...]:
    """Of stored zeros beside scales of this shape."""
    return (-(-scales[0] // CODES_PER_WORD), *scales[1:])


def check_scales(scale: StoredTensor, blocks: Tensor) -> None:
    if not bool(((blocks > 0) & (blocks < torch.inf)).all()):  # also false for NaN
        raise ValueError(f"{scale.file}: {scale.name} holds scales that are not positive numbers; the file is damaged")


def packed_rows(packed: Packed, start: int, stop: int) -> Packed:
    """Rows start:stop, between blocks, of a packed [out, in] weight: views."""
    height = FORMATS[packed.format].row_block
    zero = None if packed.zero is None else packed.zero[start:stop]
    return Packed(packed.data[start:stop], packed.scale[start // height : -(-stop // height)], zero, packed.format)


def parts_on_disk(name: str, value: Tensor | Packed) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor as it is stored) of all that a weight is stored in; `name` is that of the dense weight."""
    if isinstance(value, Tensor):
        yield name, value
        return
    int4 = value.format == "int4"
    yield (name + PACKED, value.data.view(torch.int32)) if int4 else (name, value.data)
    yield name + SCALES[value.format], value.scale
    if value.zero is not None:
        yield name + ZERO, zeros_as_stored(value.zero)
    if int4:
        yield name + SHAPE, torch.tensor(dense_shape(value))


def dense_shape(packed: Packed) -> tuple[int, ...]:
    """Of the weight that is packed."""
    shape = tuple(packed.data.shape)
    return (*shape[:-1], 2 * shape[-1]) if packed.format == "int4" else shape
