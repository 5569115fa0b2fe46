"""Opening a model with its tokenizer, the same for every program that runs one."""

from pathlib import Path
from typing import NamedTuple

import torch

from kogia.checkpoint.config import dtype_name
from kogia.checkpoint.directory import load_config, resolve_model_dir
from kogia.checkpoint.gguf_tokenizer import load_tokenizer
from kogia.checkpoint.hf import Stored, load_model, read_stored
from kogia.model.config import ModelConfig
from kogia.model.sharding import Share
from kogia.model.transformer import Transformer
from kogia.text.chat import check_thinking
from kogia.text.tokenizer import Tokenizer


class Opened(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    directory: Path
    """The model directory itself, or GGUF file: of a run directory, its newest checkpoint."""


class Found(NamedTuple):
    """A model that can be opened, before its weights are read."""

    stored: Stored
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    """That its weights will have, but for those that stay FP8."""
    keep_fp8: bool

    @property
    def config(self) -> ModelConfig:
        return self.stored.config

    @property
    def directory(self) -> Path:
        return self.stored.directory

    def open(self, share: Share | None = None) -> Opened:
        """Read the weights, or a rank's share of them. Raises ValueError as `open_model` does."""
        model = load_model(self.stored, device=self.device, dtype=self.dtype, keep_fp8=self.keep_fp8, share=share)
        return Opened(model, self.tokenizer, self.directory)


def open_model(path: str | Path, *, device: torch.device | str = "auto", dtype: torch.dtype | str = "auto") -> Opened:
    """The model of a model or run directory or of a GGUF file, and its tokenizer.

    `device` "auto" is the GPU where there is one. `dtype` "auto" is the checkpoint's, float32 on a CPU; "fp8" keeps the
    FP8 weights of an FP8 checkpoint, which halves their memory, and has the rest as "auto". Raises ValueError for what
    is not there, and for a tokenizer with more tokens than the model knows.
    """
    return find_model(path, device=device, dtype=dtype).open()


def find_model(
    path: str | Path,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    weights: bool = True,
) -> Found:
    """All of `open_model` but the weights, and all of its errors but what only they tell.

    Without `weights` it is for looking at, as in a dry run: those of the Hugging Face Hub are not fetched.
    """
    place, keep_fp8 = pick_device(device), dtype_name(dtype) == "fp8"
    directory = resolve_model_dir(path, weights=weights)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, load_config(directory), directory)
    stored = read_stored(path, keep_fp8=keep_fp8, weights=weights)
    return Found(stored, tokenizer, place, pick_dtype(dtype, place) or stored.dtype, keep_fp8)


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig, directory: Path) -> None:
    """Raise ValueError for a tokenizer, from `directory`, with more tokens than the model knows."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}; they "
            "do not belong together"
        )


def check_thinking_switch(path: str | Path, thinking: bool | None) -> None:
    """Raise ValueError, before a model is loaded, where `thinking` is set and its chat template has no such switch."""
    if thinking is not None:
        check_thinking(thinking, load_tokenizer(resolve_model_dir(path, weights=False)))


def pick_device(device: torch.device | str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. Raises ValueError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device = {str(device)!r}: not usable here ({reason}); use auto, cpu or cuda") from None
    return chosen


def pick_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype | None:
    """The dtype to load with; None keeps the checkpoint's, which "auto" and "fp8" do but on a CPU."""
    name = dtype_name(dtype)
    if name in ("auto", "fp8"):
        return torch.float32 if device.type == "cpu" else None
    return getattr(torch, name)
