"""Models on disk, with tokenizers of two kinds."""

from pathlib import Path

import pytest
import torch
from inference.tiny import CONFIG
from tokenizer_families import write_qwen

from kogia.checkpoint.hf import save_model
from kogia.inference.llm import LLM
from kogia.model.config import ModelConfig
from kogia.model.transformer import build_model
from kogia.text.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    tokenizer = train_bpe(["the answer is 42. " * 20], 280)
    return save_model(build_model(CONFIG, seed=5), tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return LLM(directory, device="cpu", block_size=4)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A model with Qwen3's tokenizer and template that soon ends with <|endoftext|>, the second of its end ids."""
    root = tmp_path_factory.mktemp("qwen")
    tokenizer = Tokenizer.load(write_qwen(root / "tokenizer"))
    model = build_model(ModelConfig(**{**vars(CONFIG), "vocab_size": tokenizer.vocab_size}), seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[tokenizer.token_id("<|endoftext|>")] = 10.0 / CONFIG.dim
    return save_model(model, root / "model", tokenizer)
