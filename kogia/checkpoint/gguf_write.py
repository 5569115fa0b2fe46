"""A model as one GGUF file, as `kogia convert SRC DST.gguf` writes it: what `gguf_config`, `gguf_tokenizer` and
`gguf_tensors` read, the other way round.

Each tensor goes piece by piece from its old file into the new one, by way of float32. Header and blocks are the `gguf`
library's. Vectors, routers and what its blocks do not divide stay wider, as llama.cpp's own conversion has it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from kogia.checkpoint.gguf_config import config_to_gguf, llama3_factors
from kogia.checkpoint.gguf_tensors import BLOCK_NAMES, GLOBAL_NAMES, ROPE_FACTORS, ROUTER_BIAS, STACKS, Rows, library
from kogia.checkpoint.gguf_tokenizer import tokenizer_to_gguf
from kogia.checkpoint.hf import Stored
from kogia.checkpoint.quantisation import weights_of
from kogia.checkpoint.tensorfile import row_ranges
from kogia.checkpoint.weights import read_dense
from kogia.files import replacing_file, writing
from kogia.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig
from kogia.text.tokenizer import Tokenizer

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""What `--quantize` calls a type of matrices -> ggml's name."""
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}  # general.file_type, which tools show
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Output:
    """One tensor of the new file."""

    name: str
    shape: tuple[int, ...]
    """The slowest axis first."""
    type: str
    rows: Callable[[], Iterator[Rows]]
    """Its parts in order, in float32."""

    @property
    def nbytes(self) -> int:
        gguf = library()
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return int(np.prod(self.shape)) // block * block_bytes


def plan_gguf(stored: Stored, kind: str) -> list[Output]:
    """The tensors that a model has in a file of the type `kind`, a key of `TYPES`; modules of MTP are left out."""
    return list(_Planner(stored, TYPES[kind]).outputs())


def write_gguf(
    stored: Stored, tokenizer: Tokenizer, target: Path, kind: str, outputs: list[Output], *, name: str
) -> None:
    """Write the file; it appears under its name only when complete. Raises ValueError for numbers that have no form."""
    gguf = library()
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[TYPES[kind]],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **config_to_gguf(stored.config),
        **tokenizer_to_gguf(tokenizer, stored.config.vocab_size),
    }
    with replacing_file(target) as draft:
        writer = gguf.GGUFWriter(draft, metadata.pop("general.architecture"))
        for key, value in metadata.items():
            _add_value(writer, key, value)
        for output in outputs:
            ggml_type = gguf.GGMLQuantizationType[output.type]
            writer.add_tensor_info(output.name, output.shape, np.dtype(np.float32), output.nbytes, ggml_type)
        with writing(target):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            for output in outputs:
                _write_tensor(file, output)
                writer.write_padding(file, output.nbytes)
            writer.close()


def _add_value(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _write_tensor(file: BinaryIO, output: Output) -> None:
    gguf = library()
    for rows in output.rows():
        if not np.isfinite(rows).all():
            raise ValueError(f"{output.name} holds NaN or infinity, of which {output.type} files have none; repair it")
        with np.errstate(over="ignore"):
            data = gguf.quantize(rows, gguf.GGMLQuantizationType[output.type])
        if output.type == "F16" and not np.isfinite(data).all():
            raise ValueError(f"{output.name} exceeds float16's largest number, 65504; use bf16 or q8_0")
        file.write(np.ascontiguousarray(data).data)


class _Planner:
    """Which tensors of a checkpoint make which of the file."""

    def __init__(self, stored: Stored, kind: str) -> None:
        self._weights, self._config, self._kind = weights_of(stored.tensors)[0], stored.config, kind

    def outputs(self) -> Iterator[Output]:
        for name, published in GLOBAL_NAMES.items():
            if not (self._config.tie_embeddings and published == "lm_head.weight"):
                yield self._plain(name, published)
        scaling = self._config.attention.rope_scaling
        if isinstance(scaling, Llama3RopeConfig):
            factors = llama3_factors(scaling, _head_dim(self._config), self._config.attention.rope_theta)
            yield Output(ROPE_FACTORS, (len(factors),), "F32", lambda: iter([np.array(factors, np.float32)]))
        for layer in range(self._config.num_layers):
            yield from self._layer(f"blk.{layer}", f"model.layers.{layer}")

    def _layer(self, name: str, published: str) -> Iterator[Output]:
        for module, ours in BLOCK_NAMES.items():
            for kind in ("weight", "bias"):
                source = f"{published}.{ours}.{kind}"
                if module == "attn_kv_b" and source in self._weights:
                    yield from self._latents(name, source)
                elif source in self._weights:
                    yield self._plain(f"{name}.{module}.{kind}", source, self._heads(module))
        if f"{published}.{ROUTER_BIAS[1]}" in self._weights:
            yield self._plain(f"{name}.{ROUTER_BIAS[0]}", f"{published}.{ROUTER_BIAS[1]}")
        for stack, projection in STACKS.items():
            if f"{published}.mlp.experts.0.{projection}.weight" in self._weights:
                yield self._experts(f"{name}.{stack}.weight", f"{published}.mlp.experts.{{}}.{projection}.weight")

    def _heads(self, module: str) -> int:
        """Heads whose rows llama.cpp has in another order: queries and keys of llama; else 0."""
        attention = self._config.attention
        if not isinstance(attention, GQAConfig) or config_to_gguf(self._config)["general.architecture"] != "llama":
            return 0
        return {"attn_q": attention.num_heads, "attn_k": attention.num_kv_heads}.get(module, 0)

    def _type(self, name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or ".ffn_gate_inp." in name:
            return "F32"
        gguf = library()
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self._kind]]
        return "F16" if shape[-1] % block else self._kind

    def _plain(self, name: str, source: str, num_heads: int = 0) -> Output:
        shape = self._weights[source].shape
        rows = partial(self._interleaved, source, num_heads) if num_heads else partial(self._pieces, source)
        return Output(name, shape, self._type(name, shape), rows)

    def _experts(self, name: str, source: str) -> Output:
        assert self._config.moe is not None, "experts are stored"
        sources = [source.format(i) for i in range(self._config.moe.num_experts)]
        shape = (len(sources), *self._weights[sources[0]].shape)
        return Output(name, shape, self._type(name, shape), lambda: (p for each in sources for p in self._pieces(each)))

    def _latents(self, name: str, source: str) -> Iterator[Output]:
        """The two parts of every head: keys, transposed, and values."""
        attention = self._config.attention
        assert isinstance(attention, MLAConfig)
        heads, rank, nope = attention.num_heads, attention.kv_lora_rank, attention.qk_nope_head_dim
        for part, rows, columns in (("k", rank, nope), ("v", attention.v_head_dim, rank)):
            full, shape = f"{name}.attn_{part}_b.weight", (heads, rows, columns)
            yield Output(full, shape, self._type(full, shape), partial(self._parts, source, heads, nope, part == "k"))

    def _read(self, source: str, start: int, stop: int) -> Rows:
        return read_dense(self._weights[source], start, stop, torch.float32).numpy()

    def _pieces(self, source: str) -> Iterator[Rows]:
        for start, stop in row_ranges(self._weights[source].data):
            yield self._read(source, start, stop)

    def _by_head(self, source: str, num_heads: int) -> Iterator[Rows]:
        height = self._weights[source].shape[0] // num_heads
        for head in range(num_heads):
            yield self._read(source, head * height, (head + 1) * height)

    def _interleaved(self, source: str, num_heads: int) -> Iterator[Rows]:
        """Rows i and i + half of each head side by side, as llama.cpp turns neighbours."""
        for head in self._by_head(source, num_heads):
            yield head.reshape(2, len(head) // 2, -1).swapaxes(0, 1).reshape(head.shape)

    def _parts(self, source: str, num_heads: int, nope: int, keys: bool) -> Iterator[Rows]:
        for head in self._by_head(source, num_heads):
            yield np.ascontiguousarray(head[:nope].T) if keys else head[nope:]


def _head_dim(config: ModelConfig) -> int:
    assert isinstance(config.attention, GQAConfig), "only it has this scaling"
    return config.attention.head_dim
