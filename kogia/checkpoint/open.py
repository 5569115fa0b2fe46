"""Opening a model with its tokenizer, the same for every program that runs one."""

from pathlib import Path
from typing import NamedTuple

import torch

from kogia.checkpoint.config import dtype_name
from kogia.checkpoint.directory import load_config, resolve_model_dir
from kogia.checkpoint.hf import load_model
from kogia.model.transformer import Transformer
from kogia.text.chat import check_thinking
from kogia.text.tokenizer import Tokenizer


class Opened(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    directory: Path
    """The model directory itself: of a run directory, its newest checkpoint."""


def open_model(path: str | Path, *, device: torch.device | str = "auto", dtype: torch.dtype | str = "auto") -> Opened:
    """The model of a model or run directory, and its tokenizer.

    `device` "auto" is the GPU where there is one. `dtype` "auto" is the checkpoint's, float32 on a CPU; "fp8" keeps the
    FP8 weights of an FP8 checkpoint, which halves their memory, and has the rest as "auto". Raises ValueError for what
    is not there, and for a tokenizer with more tokens than the model knows.
    """
    place, keep_fp8 = pick_device(device), dtype_name(dtype) == "fp8"
    chosen = pick_dtype(dtype, place)
    directory = resolve_model_dir(path)
    tokenizer, known = Tokenizer.load(directory), load_config(directory).vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"{directory}: tokenizer.json has {tokenizer.vocab_size} tokens, the model only {known}; they do not "
            "belong together"
        )
    return Opened(load_model(directory, device=place, dtype=chosen, keep_fp8=keep_fp8), tokenizer, directory)


def check_thinking_switch(path: str | Path, thinking: bool | None) -> None:
    """Raise ValueError, before a model is loaded, where `thinking` is set and its chat template has no such switch."""
    if thinking is not None:
        check_thinking(thinking, Tokenizer.load(resolve_model_dir(path, weights=False)))


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
