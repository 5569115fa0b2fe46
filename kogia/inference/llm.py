"""The front end: a model directory, prompts in, completions out."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from kogia.checkpoint.open import Found, find_model
from kogia.config import from_dict
from kogia.cores import check_threads
from kogia.data.rows import conversation
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.limits import check_engine
from kogia.engine.request import Completion, SamplingParams, TokenEvent
from kogia.engine.threads import generation_threads
from kogia.inference.parallel import ParallelEngine, StoredModel, open_parallel
from kogia.inference.readiness import Readiness
from kogia.model.costs import num_params
from kogia.text.chat import Message, Prompt, render_prompt

Turn = Message | Mapping[str, Any]
"""A message, or an object with "role" and "content"."""
Given = Prompt | str | Sequence[int] | Sequence[Turn]
"""A prompt, or its text or token ids, or a conversation that ends with a user message."""


@runtime_checkable
class Loading(Protocol):
    """What the settings of a command say of how its model is loaded."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantize(self) -> str: ...
    @property
    def tensor_parallel(self) -> int: ...
    @property
    def expert_parallel(self) -> bool: ...


class LLM:
    """A loaded model with its tokenizer and an engine.

    >>> llm = LLM("runs/demo/rejection_sft")
    >>> llm.chat([{"role": "user", "content": "numbers 4 6 15 target 17"}])[0].answer
    >>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0][0].text
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        quantize: str = "auto",
        num_draft_tokens: int | None = 0,
        tensor_parallel: int = 1,
        expert_parallel: bool = False,
        threads: int | None = None,
        **engine_options: Any,
    ) -> None:
        """Load a model directory or the newest checkpoint of a run directory, as `open_model` says.

        `num_draft_tokens` None drafts one token per step where the model has an MTP module. With `tensor_parallel`, so
        many processes share the model, with a GPU each where there are any; `expert_parallel` then splits the routed
        experts by number instead of each by its width. `threads` are PyTorch's on a CPU: None is one per 10 million
        parameters. `engine_options` are fields of `EngineConfig`.
        """
        check_threads(threads)
        found = find_model(path, device=device, dtype=dtype, quantize=quantize)
        config = engine_config(found, num_draft_tokens=num_draft_tokens, **engine_options)
        self.tokenizer, self.threads = found.tokenizer, threads
        self.readiness = Readiness()
        """What it took, stage by stage."""
        if tensor_parallel == 1 and not expert_parallel:
            with self.readiness.stage("weights"):
                model = found.open().model
            with self.readiness.stage("engine"):
                self.engine = Engine(model, self.tokenizer, config)
        else:
            source = StoredModel(found.directory, dtype, quantize)
            with self.readiness.stage("weights and engines"):
                self.engine = open_parallel(
                    source, config, tensor_parallel, device=found.device, whole_experts=expert_parallel
                )
        self._num_params = num_params(found.config)
        self.model = self.engine.model
        """With `tensor_parallel`, this process's share."""

    def warm_up(self) -> None:
        """On a GPU, compile every kernel and record every graph now, so that no request waits for one. Without it each
        is made when it is first needed, which suits a few prompts and no server."""
        if self.engine.model.device.type == "cuda":
            with self.readiness.stage("graphs"):
                self.engine.warm_up()

    def close(self) -> None:
        """Give the memory back. Nothing can be asked any more."""
        if isinstance(self.engine, ParallelEngine):
            self.engine.close()
        del self.engine, self.model

    @classmethod
    def of(cls, path: str | Path, settings: Loading, **engine_options: Any) -> "LLM":
        """The model of a command, loaded as its settings say. Raises ValueError as the constructor does."""
        names = ("device", "dtype", "quantize", "tensor_parallel", "expert_parallel")
        return cls(path, **{name: getattr(settings, name) for name in names}, **engine_options)

    def generate(
        self,
        prompts: Sequence[Given] | str,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_progress: Callable[[int, int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Continue every prompt, `n` completions each.

        Texts go on as they are, after the leading BOS that the model's texts have: no chat template makes a question of
        them. Conversations are rendered as `chat` does.
        """
        each = [prompts] if isinstance(prompts, str) else prompts
        with self._threads():
            return self.engine.generate([self._given(p) for p in each], params or SamplingParams(), on_progress)

    def chat(
        self, messages: Sequence[Turn], params: SamplingParams | None = None, *, thinking: bool | None = None
    ) -> list[Completion]:
        """Answer one conversation that ends with a user message; `params.n` answers.

        A message is a `Message` or a plain {"role": "user", "content": "..."}. A `Completion` has the thought and the
        answer apart.

        `thinking` turns thoughts on or off for models whose chat template has that switch.
        """
        return self.generate([render_prompt(conversation(messages, "messages"), self.tokenizer, thinking)], params)[0]

    def stream(self, prompt: Given, params: SamplingParams | None = None) -> Generator[TokenEvent, None, None]:
        """Tokens of one continuation or answer as they come; the last event carries the completion.

        Leaving the loop early gives the request up.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"SamplingParams.n = {params.n}: a stream follows one completion; use generate()")
        stream = self.engine.submit(self._given(prompt), params)
        events = iter(stream)
        try:
            while True:
                with self._threads():  # not while the caller has its turn
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            stream.cancel()

    def _threads(self) -> AbstractContextManager[None]:
        return generation_threads(self.threads, self._num_params)

    def _given(self, prompt: Given) -> Prompt | list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode_raw(prompt)
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, Message | Mapping):
            raise ValueError(f"a prompt is {prompt!r:.60}: one message is none; put it into a list, or use chat()")
        ids = [part for part in prompt if not isinstance(part, Message | Mapping)]
        if len(ids) == len(prompt):
            return ids
        return render_prompt(conversation(prompt, "the prompt"), self.tokenizer)


def engine_config(found: Found, *, num_draft_tokens: int | None = 0, **options: Any) -> EngineConfig:
    """The engine's settings for a model, as `LLM` takes them. Raises ValueError for what it could not be built with."""
    if num_draft_tokens is None:
        num_draft_tokens = min(1, found.config.num_mtp_layers)
    config = from_dict(EngineConfig, {**options, "num_draft_tokens": num_draft_tokens}, "engine")
    check_engine(found.config, config, found.dtype)
    return config
