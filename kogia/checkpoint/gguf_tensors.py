"""The tensors of a GGUF file under their names in the Hugging Face layout, read as the numbers they stand for.

What llama.cpp stores otherwise is put back on the way:
  blocks      quantised types are dequantised in float32, by the `gguf` library
  experts     a stack `blk.N.ffn_gate_exps` is one matrix per expert
  rotary      rows of llama's queries and keys come in the order of interleaved pairs, and go back to half-split
  latents     `attn_k_b`, transposed, and `attn_v_b` are the two parts of each head of `kv_b_proj`
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Shaped

from kogia.checkpoint.gguf_file import GGUFEntry, GGUFFile
from kogia.checkpoint.tensorfile import StoredTensor

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
"""Module in `blk.N` -> module in `model.layers.N`."""
STACKS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Stack of experts -> projection of one."""
GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROUTER_BIAS = ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias")
ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3.1's stretching of wavelengths, as numbers; the configuration has it, too."""
_BLOCK = re.compile(r"^blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)$")
Rows = Shaped[np.ndarray, "rows *columns"]
_MAX_EXPERTS = 4096
_PLAIN = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Types that are the same numbers in both formats, BF16 as its bits."""


@dataclass(frozen=True, slots=True)
class GGUFTensor(StoredTensor):
    """A matrix, a vector, or one matrix of a stack. `dtype` is what its numbers are read as: float32 for blocks."""

    type: str
    """ggml's name of the type in the file."""
    row_stored: int
    """Bytes of a row in the file."""
    head_rows: int = 0
    """Rows of a head of llama's queries or keys, whose order is undone; else 0."""

    @property
    def stored_type(self) -> str:
        return self.type

    @property
    def stored_bytes(self) -> int:
        return self.num_rows * self.row_stored

    def read_into(self, row: int, into: memoryview) -> None:
        if self.type in _PLAIN and not self.head_rows:
            return StoredTensor.read_into(self, row, into)
        _copy(self.rows(row, row + len(into) // self.row_bytes), into)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start:stop in `dtype` ("BF16" as its bits)."""
        if not self.head_rows:
            return self._in_file(start, stop)
        first, last = start // self.head_rows, -(-stop // self.head_rows)
        heads = self._in_file(first * self.head_rows, last * self.head_rows)
        pairs = heads.reshape(last - first, self.head_rows // 2, 2, -1).swapaxes(1, 2)
        return pairs.reshape(heads.shape)[start - first * self.head_rows : stop - first * self.head_rows]

    def _in_file(self, start: int, stop: int) -> Rows:
        data = bytearray((stop - start) * self.row_stored)
        self.read_bytes(start * self.row_stored, memoryview(data))
        if self.type in _PLAIN:
            return np.frombuffer(data, _PLAIN[self.type]).reshape(stop - start, *self.shape[1:])
        gguf = library()
        blocks = np.frombuffer(data, np.uint8).reshape(stop - start, self.row_stored)
        with np.errstate(all="ignore"):  # NaN among the scales is looked for, and told, where all numbers are
            return gguf.dequantize(blocks, gguf.GGMLQuantizationType[self.type])


@dataclass(frozen=True, slots=True)
class SplitLatents(StoredTensor):
    """`kv_b_proj` [heads * (nope + v), rank] of its two parts: keys [heads, rank, nope] and values [heads, v, rank]."""

    keys: GGUFTensor
    """[heads * rank, nope]"""
    values: GGUFTensor
    """[heads * v, rank]"""
    num_heads: int

    @property
    def stored_type(self) -> str:
        return self.keys.type

    @property
    def stored_bytes(self) -> int:
        return self.keys.stored_bytes + self.values.stored_bytes

    def read_into(self, row: int, into: memoryview) -> None:
        stop, height = row + len(into) // self.row_bytes, self.shape[0] // self.num_heads
        first, last = row // height, -(-stop // height)
        heads = np.concatenate([self._head(head) for head in range(first, last)])
        _copy(heads[row - first * height : stop - first * height], into)

    def _head(self, head: int) -> Rows:
        rank, v = self.shape[1], self.values.shape[0] // self.num_heads
        keys, values = self.keys.rows(head * rank, (head + 1) * rank), self.values.rows(head * v, (head + 1) * v)
        if self.keys.dtype != self.values.dtype:
            keys, values = _as_float32(keys, self.keys.dtype), _as_float32(values, self.values.dtype)
        return np.concatenate((keys.T, values))


def _as_float32(numbers: Rows, dtype: str) -> Rows:
    if dtype == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def _copy(rows: Rows, into: memoryview) -> None:
    into[:] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


# The tensors of a file ------------------------------------------------------------------------------------------------


def gguf_tensors(file: GGUFFile) -> dict[str, StoredTensor]:
    """Every tensor by its published name; one without keeps its own.

    Raises ValueError for a type that the library does not know, and for a tensor that lies beyond the end of the file.
    """
    architecture = file.metadata.get("general.architecture")
    num_heads = _count(file, f"{architecture}.attention.head_count", 1)
    num_kv_heads = _count(file, f"{architecture}.attention.head_count_kv", num_heads)
    heads = {"self_attn.q_proj": num_heads, "self_attn.k_proj": num_kv_heads} if architecture == "llama" else {}
    found = {tensor.name: tensor for tensor in _each(file, heads)}
    joined: dict[str, StoredTensor] = {}
    for name, tensor in found.items():
        prefix, middle, _ = name.partition(".attn_k_b.")
        values = found.get(f"{prefix}.attn_v_b.weight") if middle else None
        if values is not None:
            both = _joined(
                f"{prefix.replace('blk', 'model.layers')}.self_attn.kv_b_proj.weight", tensor, values, num_heads
            )
            joined |= {name: both, values.name: both}
    return {tensor.name: tensor for tensor in (found | joined).values()}


def _count(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{file.path}: {key} = {value!r:.100}: must be a positive whole number")
    return value


def _each(file: GGUFFile, heads: dict[str, int]) -> Iterator[GGUFTensor]:
    for entry in file.entries.values():
        if entry.name == ROPE_FACTORS:
            continue
        name, module = published_name(entry.name)
        if "*" in name and len(entry.shape) == 3:
            yield from _experts(file, entry, name)
        else:
            yield _tensor(file, entry, name, heads.get(module, 0))


def published_name(name: str) -> tuple[str, str]:
    """(published name, with `*` for the number of an expert in a stack; module in its layer, if it is one of these)."""
    found = _BLOCK.match(name)
    if found is None:
        return GLOBAL_NAMES.get(name, name), ""
    layer, module, kind = f"model.layers.{found[1]}", found[2], found[3]
    if f"{module}.{kind}" == ROUTER_BIAS[0]:
        return f"{layer}.{ROUTER_BIAS[1]}", ""
    if module in STACKS:
        return f"{layer}.mlp.experts.*.{STACKS[module]}.{kind}", ""
    if module not in BLOCK_NAMES:
        return name, ""
    return f"{layer}.{BLOCK_NAMES[module]}.{kind}", BLOCK_NAMES[module]


def _tensor(file: GGUFFile, entry: GGUFEntry, name: str, num_heads: int) -> GGUFTensor:
    kind, row_stored = _stored_rows(file, entry)
    rows = entry.shape[0] if entry.shape else 1
    if num_heads and (rows % num_heads or rows // num_heads % 2):
        raise ValueError(f"{file.path}: {entry.name} {list(entry.shape)} is no {num_heads} heads of an even width")
    shape = entry.shape if len(entry.shape) < 3 else (math.prod(entry.shape[:-1]), entry.shape[-1])
    head_rows = rows // num_heads if num_heads else 0
    return GGUFTensor(name, _read_as(kind), shape, file.path, entry.offset, kind, row_stored, head_rows)


def _experts(file: GGUFFile, entry: GGUFEntry, name: str) -> Iterator[GGUFTensor]:
    kind, row_stored = _stored_rows(file, entry)
    num_experts, rows, columns = entry.shape
    if num_experts > _MAX_EXPERTS:
        raise ValueError(f"{file.path}: {entry.name} has {num_experts:,} experts, more than {_MAX_EXPERTS:,}")
    for i in range(num_experts):
        place = entry.offset + i * rows * row_stored
        yield GGUFTensor(name.replace("*", f"{i}"), _read_as(kind), (rows, columns), file.path, place, kind, row_stored)


def _read_as(kind: str) -> str:
    return kind if kind in _PLAIN else "F32"


def _joined(name: str, keys: GGUFTensor, values: GGUFTensor, num_heads: int) -> SplitLatents:
    rank = values.shape[-1]
    if len(keys.shape) != 2 or keys.shape[0] != num_heads * rank or values.shape[0] % num_heads:
        raise ValueError(
            f"{keys.file}: {keys.name} {list(keys.shape)} and {values.name} {list(values.shape)} are not the two parts "
            f"of {num_heads} heads; copy or download the file again"
        )
    shape = (num_heads * keys.shape[1] + values.shape[0], rank)
    dtype = keys.dtype if keys.dtype == values.dtype else "F32"
    return SplitLatents(name, dtype, shape, keys.file, keys.offset, keys, values, num_heads)


def _stored_rows(file: GGUFFile, entry: GGUFEntry) -> tuple[str, int]:
    """(name of the type, bytes of one row in the file); a vector's rows are its numbers."""
    try:
        kind, block, block_bytes = _type(entry.type)
    except ValueError as error:
        raise ValueError(f"{file.path}: {entry.name}: {error}") from None
    width = entry.shape[-1] if len(entry.shape) > 1 else 1
    if width % block:
        raise ValueError(
            f"{file.path}: {entry.name} {list(entry.shape)} is no whole number of {kind} blocks of {block}"
        )
    row_stored = width // block * block_bytes
    end = entry.offset + math.prod(entry.shape) // width * row_stored
    if end > file.size:
        raise ValueError(
            f"{file.path}: {entry.name} {list(entry.shape)} of {kind} ends at byte {end:,} of {file.size:,}; the file "
            "is cut or damaged, copy or download it again"
        )
    return kind, row_stored


@cache
def _type(number: int) -> tuple[str, int, int]:
    """(name, numbers in a block, bytes of a block) of one of ggml's types. Raises ValueError if it cannot be read."""
    gguf = library()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in _PLAIN:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise ValueError(
            f"its type {number} is none that the gguf library dequantises; use a newer one, or a file in "
            "another type, such as Q8_0"
        ) from None
    return kind.name, block, block_bytes


def library() -> Any:
    """The `gguf` library. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the gguf library: pip install 'kogia[gguf]'") from None
    return gguf
