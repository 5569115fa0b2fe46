"""Opening a model with its tokenizer, the same for every program that runs one."""

from pathlib import Path
from typing import NamedTuple

import torch

from kogia.checkpoint.config import dtype_name
from kogia.checkpoint.directory import load_config, resolve_model_dir
from kogia.checkpoint.gguf_tokenizer import load_tokenizer
from kogia.checkpoint.hf import STORED, Stored, load_model, read_stored
from kogia.model.config import ModelConfig
from kogia.model.sharding import Share
from kogia.model.transformer import Transformer
from kogia.ops.packed import FORMATS
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
    """That its weights will have, but for those that are packed."""
    quantize: str | None
    """As `load_model` takes it."""

    @property
    def config(self) -> ModelConfig:
        return self.stored.config

    @property
    def directory(self) -> Path:
        return self.stored.directory

    def open(self, share: Share | None = None) -> Opened:
        """Read the weights, or a rank's share of them. Raises ValueError as `open_model` does."""
        model = load_model(self.stored, device=self.device, dtype=self.dtype, quantize=self.quantize, share=share)
        return Opened(model, self.tokenizer, self.directory)


def open_model(
    path: str | Path,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    quantize: str = "auto",
) -> Opened:
    """The model of a model or run directory or of a GGUF file, and its tokenizer.

    `device` "auto" is the GPU where there is one. `dtype` "auto" is the checkpoint's, float32 on a CPU; "fp8" keeps the
    FP8 weights of an FP8 checkpoint, which halves their memory, and has the rest as "auto". `quantize` "fp8", "int8" or
    "int4" rounds the weights that the format is for to it; "auto" keeps those that are stored in int8 or int4, "none"
    makes all dense. Raises ValueError for what is not there, and for a tokenizer with more tokens than the model knows.
    """
    return find_model(path, device=device, dtype=dtype, quantize=quantize).open()


def find_model(
    path: str | Path,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    quantize: str = "auto",
    weights: bool = True,
) -> Found:
    """All of `open_model` but the weights, and all of its errors but what only they tell.

    Without `weights` it is for looking at, as in a dry run: those of the Hugging Face Hub are not fetched.
    """
    place, keep_fp8 = pick_device(device), dtype_name(dtype) == "fp8"
    check_quantize(quantize, keep_fp8)
    directory = resolve_model_dir(path, weights=weights)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, load_config(directory), directory)
    stored = read_stored(path, weights=weights)
    if keep_fp8 and stored.tensors and "fp8" not in stored.formats:
        raise ValueError(
            f"{directory}: holds no FP8 weights to keep; `--quantize fp8` rounds them when they are loaded, and "
            "`kogia convert SRC DST --quantize fp8` for good"
        )
    if quantize == "auto":
        chosen = STORED if keep_fp8 or "fp8" not in stored.formats else None
    else:
        chosen = None if quantize == "none" else quantize
    return Found(stored, tokenizer, place, pick_dtype(dtype, place) or stored.dtype, chosen)


def check_quantize(quantize: str, keep_fp8: bool) -> None:
    """Raise ValueError for a name that is no way to load weights, or one that dtype = "fp8" contradicts."""
    if quantize not in ("auto", "none", *FORMATS):
        raise ValueError(f"quantize = {quantize!r}: must be auto, none, {' or '.join(FORMATS)}")
    if keep_fp8 and quantize not in ("auto", "fp8"):
        raise ValueError(f"dtype = 'fp8' keeps FP8 weights, and quantize = {quantize!r} does not; give one of them")


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
