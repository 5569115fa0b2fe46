"""GGUF files for tests: small models saved as such, files of raw entries, and llama.cpp where it is installed."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.tiny import tiny
from tokenizer_families import write_deepseek, write_llama2, write_llama3, write_qwen

from kogia.checkpoint.convert import convert_to_gguf
from kogia.checkpoint.hf import save_model
from kogia.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

LLAMA_PYTHON = "KOGIA_LLAMA_PYTHON"
"""Names an interpreter that has llama-cpp-python: tests against llama.cpp run there."""
GQA = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16)
MLA = MLAConfig(num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
YARN = YarnConfig(factor=4.0, original_max_position=64, mscale=0.707, mscale_all_dim=0.707)
HEADS_YARN = replace(YARN, mscale=1.0, mscale_all_dim=0.0)
SOFTMAX = MoEConfig(num_experts=4, topk=2, expert_dim=32, score="softmax", normalize_topk=False)
SIGMOID = MoEConfig(num_experts=8, topk=3, expert_dim=32, num_groups=2, topk_groups=1, routed_scale=2.5)
QWEN = replace(SOFTMAX, num_shared_experts=0, num_dense_layers=0, normalize_topk=True)
LLAMA = ModelConfig(vocab_size=460, dim=64, num_layers=2, ffn_dim=96, attention=GQA, moe=None, max_position=256)
LITE = replace(LLAMA, num_layers=27)  # by which llama.cpp tells that queries are not compressed
CONFIGS = {
    "llama": LLAMA,
    "llama-tied": replace(LLAMA, tie_embeddings=True),
    "llama-3.2": replace(LLAMA, attention=replace(GQA, rope_scaling=Llama3RopeConfig(factor=32.0))),
    "qwen2": replace(LLAMA, attention=replace(GQA, qkv_bias=True)),
    "qwen2-yarn": replace(LLAMA, attention=replace(GQA, qkv_bias=True, rope_scaling=HEADS_YARN)),
    "qwen3": replace(LLAMA, attention=replace(GQA, qk_norm=True)),
    "qwen3moe": replace(LLAMA, attention=replace(GQA, qk_norm=True), moe=QWEN),
    "deepseek-v2-lite": replace(LITE, attention=replace(MLA, q_lora_rank=None, rope_scaling=YARN), moe=SOFTMAX),
    "deepseek-v3": replace(LLAMA, attention=MLA, moe=SIGMOID),
}  # fmt: skip
TOKENIZERS = {"llama": write_llama2, "llama-tied": write_llama2, "llama-3.2": write_llama3}


def write_model(root: Path, name: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """A model directory of one of `CONFIGS`, with a tokenizer of its family."""
    import torch

    write = TOKENIZERS.get(name, write_qwen if name.startswith("qwen") else write_deepseek)
    tokenizer = Tokenizer.load(write(root / f"{name}-tokenizer"))
    ids = {"bos_id": tokenizer.bos_id or 0, "eos_id": tokenizer.eos_id}
    model = tiny(replace(CONFIGS[name], init_std=0.1, **ids), getattr(torch, dtype), seed)  # so that tokens differ
    model.config = replace(model.config, init_std=0.02)  # of which GGUF says nothing
    generator = torch.Generator().manual_seed(seed)
    for parameter, vector in model.named_parameters():
        if vector.dim() == 1:
            mean = 1.0 if parameter.endswith("norm.weight") else 0.0
            torch.nn.init.normal_(vector, mean, 0.1, generator=generator)
    return save_model(model, root / name, tokenizer)


def write_gguf_model(root: Path, name: str, kind: str = "f32") -> Path:
    """The same as a GGUF file, written by kogia."""
    return convert_to_gguf(write_model(root, name), root / f"{name}-{kind}.gguf", kind=kind)


def write_entries(file: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A file of the library's own writer. A tensor is an array, or (bytes of its blocks, name of their type)."""
    writer = gguf.GGUFWriter(file, metadata["general.architecture"])
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in metadata.items():
        if key != "general.architecture":
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=gguf.GGMLQuantizationType[tensor[1]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read_entries(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors) of a file by the library's own reader, so that some may be changed and written again."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    return fields, {name: data if kind in plain else (data, kind.name) for name, (data, kind) in tensors.items()}


def random_blocks(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[np.ndarray, str]:
    """Any bytes are blocks of some numbers, if not always of finite ones."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    width = shape[-1] // block * block_bytes
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], width), np.uint8), kind


_GREEDY = """
import json, sys
import llama_cpp
asked = json.load(sys.stdin)
model = llama_cpp.Llama(asked["path"], n_ctx=128, n_threads=1, verbose=False)
answers = []
for prompt in asked["prompts"]:
    model.reset()
    tokens = []
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == asked["count"]:
            break
    answers.append(tokens)
texts = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
print(json.dumps({"tokens": answers, "texts": texts}))
"""


def llama_cpp(path: Path, prompts: list[list[int]] = (), count: int = 0, texts: list[str] = ()) -> dict[str, list]:
    """What llama.cpp makes of a file: greedy `tokens` behind each prompt, and the ids of `texts`."""
    python = os.environ.get(LLAMA_PYTHON)
    if python is None:
        pytest.skip(f"{LLAMA_PYTHON} names no interpreter with llama-cpp-python")
    asked = {"path": str(path), "prompts": list(prompts), "count": count, "texts": list(texts)}
    done = subprocess.run([python, "-c", _GREEDY], input=json.dumps(asked), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
