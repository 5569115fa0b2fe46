"""Models as requests see them: one that is loaded, and one that may be asked for, loaded or not."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from kogia.engine.engine import Engine, EngineStats
from kogia.inference.llm import LLM
from kogia.model.config import ModelConfig
from kogia.serve.config import ServeConfig
from kogia.serve.turns import Lanes
from kogia.text.tokenizer import Tokenizer
from kogia.text.tools import ToolFormat, tool_format


@dataclass(eq=False)
class ServedModel:
    """One model that answers."""

    name: str
    llm: LLM
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings of requests that name none."""
    max_tokens: int | None = None
    takes_marks: bool = False
    """Whether texts of messages may spell the model's marks."""
    lanes: Lanes = field(default_factory=Lanes)

    @property
    def engine(self) -> Engine:
        return self.llm.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.llm.model.config

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model calls tools; None where its chat template knows none."""
        return tool_format(self.tokenizer.template_source)


class Phase(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    """Not loaded, as the last try has failed."""


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes, over all processes that share it. What a step works with comes on top."""

    weights: int
    cache: int | None
    """None where it takes what is free when the model is loaded."""

    @property
    def total(self) -> int:
        return self.weights + (self.cache or 0)


@dataclass(eq=False)
class Entry:
    """A model that requests may name, loaded or not. Changed in the event loop's thread alone."""

    names: tuple[str, ...]
    """The first is the one that is shown."""
    settings: ServeConfig
    config: ModelConfig
    defaults: Mapping[str, Any]
    need: Need
    at_start: bool = True
    """Loaded before the server is ready."""
    created: int = field(default_factory=lambda: int(time.time()))
    phase: Phase = Phase.UNLOADED
    served: ServedModel | None = None
    """Set while it is loaded."""
    loading: asyncio.Task[None] | None = None
    error: str | None = None
    """Why it could not be loaded. For the operator alone."""
    retry_at: float = 0.0
    """After a failure: when a request may have it tried again."""
    is_drained: bool = False
    """Takes no more requests, by an operator's word."""
    num_users: int = 0
    """Requests that have named it and are not answered yet; none of them may lose it."""
    last_used: float = 0.0
    num_loads: int = 0
    load_seconds: float = 0.0
    """Of all loads together."""
    stats: EngineStats = field(default_factory=EngineStats)
    """Of its engine; the next one goes on counting."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def num_bytes(self) -> int:
        """That it takes now, or will when it has loaded."""
        if self.served is None:
            return self.need.total if self.phase is Phase.LOADING else 0
        return self.need.total if self.need.cache is not None else self.need.weights + self.cache_bytes

    @property
    def cache_bytes(self) -> int:
        return 0 if self.served is None else self.served.engine.runner.cache.rows.nbytes
