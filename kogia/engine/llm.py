"""The front end: a model directory, prompts in, completions out."""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from kogia.checkpoint.hf import load_model, resolve_model_dir
from kogia.config import from_dict
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import Completion, SamplingParams, TokenEvent
from kogia.text.chat import Message, render_prompt
from kogia.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class LLM:
    """A loaded model with its tokenizer and an engine.

    >>> llm = LLM("runs/demo/model")
    >>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0][0].text
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        num_draft_tokens: int | None = 0,
        **engine_options: Any,
    ) -> None:
        """Load a model directory or the newest checkpoint of a run directory.

        `device` "auto" is the GPU where there is one; `dtype` "auto" is the checkpoint's, float32 on a CPU;
        "fp8" keeps the FP8 weights of an FP8 checkpoint, which halves their memory;
        `num_draft_tokens` None drafts one token per step where the model has an MTP module. `engine_options` are fields
        of `EngineConfig`.
        """
        directory = resolve_model_dir(path)
        place = pick_device(device)
        self.tokenizer = Tokenizer.load(directory)
        self.model = load_model(directory, device=place, dtype=pick_dtype(dtype, place), keep_fp8=dtype == "fp8")
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"{directory}: tokenizer.json has {self.tokenizer.vocab_size} tokens, the model only "
                f"{self.model.config.vocab_size}; they do not belong together"
            )
        if num_draft_tokens is None:
            num_draft_tokens = min(1, self.model.config.num_mtp_layers)
        config = from_dict(EngineConfig, {**engine_options, "num_draft_tokens": num_draft_tokens}, "engine")
        self.engine = Engine(self.model, self.tokenizer, config)

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_progress: Callable[[int, int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Continue texts or token ids, `n` completions each. Texts get the leading BOS that the model's texts have."""
        each = [prompts] if isinstance(prompts, str) else prompts
        return self.engine.generate([self._ids(p) for p in each], params or SamplingParams(), on_progress)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, thinking: bool | None = None
    ) -> list[Completion]:
        """Answer one conversation that ends with a user message; `params.n` answers.

        `thinking` turns thoughts on or off for models whose chat template has that switch.
        """
        return self.generate([render_prompt(messages, self.tokenizer, thinking)], params)[0]

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Generator[TokenEvent, None, None]:
        """Tokens of one continuation or answer as they come; the last event carries the completion.

        Leaving the loop early gives the request up.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"SamplingParams.n = {params.n}: a stream follows one completion; use generate()")
        if prompt and isinstance(prompt[0], Message):
            prompt = render_prompt([m for m in prompt if isinstance(m, Message)], self.tokenizer)
        ids = self._ids(prompt)  # pyright: ignore[reportArgumentType]
        stream = self.engine.submit(ids, params)
        try:
            yield from stream
        finally:
            stream.cancel()

    def _ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return self.tokenizer.encode_raw(prompt)


def pick_device(device: str) -> torch.device:
    """A usable device; ValueError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device = {device!r}: not usable here ({reason}); use auto, cpu or cuda") from None
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The dtype to load with; None keeps the checkpoint's. Beside FP8 weights the rest is as in "auto"."""
    if dtype in ("auto", "fp8"):
        return torch.float32 if device.type == "cpu" else None
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise ValueError(f"dtype = {dtype!r}: must be auto, {', '.join(choices)} or fp8")
    return choices[dtype]
