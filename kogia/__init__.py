"""The DeepSeek-R1 system in readable PyTorch. The names below are imported when they are first used."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kogia.checkpoint.hf import load_model
    from kogia.engine.grammar import ResponseFormat
    from kogia.engine.request import SamplingParams
    from kogia.inference.llm import LLM
    from kogia.model.config import ModelConfig
    from kogia.model.transformer import Transformer
    from kogia.tasks.task import Task, load_task
    from kogia.text.chat import Message

# Read by OpenMP once, when torch is loaded, so set before anything here loads it. By default a waiting thread spins for
# long, and a step becomes many times slower as soon as another program wants the core; one that sleeps at once makes
# training of a small model a fifth slower on idle cores. A short spin costs little either way.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0.dev0"
__all__ = [
    "LLM",
    "Message",
    "ModelConfig",
    "ResponseFormat",
    "SamplingParams",
    "Task",
    "Transformer",
    "load_model",
    "load_task",
]

_HOMES = {
    "LLM": "kogia.inference.llm",
    "Message": "kogia.text.chat",
    "ResponseFormat": "kogia.engine.grammar",
    "SamplingParams": "kogia.engine.request",
    "ModelConfig": "kogia.model.config",
    "Transformer": "kogia.model.transformer",
    "load_model": "kogia.checkpoint.hf",
    "Task": "kogia.tasks.task",
    "load_task": "kogia.tasks.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kogia' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
