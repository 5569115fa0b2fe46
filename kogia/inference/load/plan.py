"""What is asked, and when: prompts of a length, or of a file, with arrivals by chance, all from one seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from kogia.data.config import SourceConfig
from kogia.data.sources import read_rows
from kogia.inference.config import BenchConfig
from kogia.inference.prompts import question_of

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea body back face others level office door health "
    "person art war history party result change morning reason research girl guy food air teacher force education"
).split()
"""Each is one token in the vocabularies of most models, with the blank before it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a load."""

    due: float
    """Seconds after the load begins."""
    body: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How a server counts words: a prompt of w words has `around + per_word * w` tokens."""

    per_word: float = 1.0
    around: float = 0.0
    """Of the chat template."""

    def words(self, tokens: int) -> int:
        return max(1, round((tokens - self.around) / self.per_word))


def draw(config: BenchConfig, model: str, sizes: Sizes) -> list[Ask]:
    """The requests of a load, in the order in which they arrive. Raises ValueError for a file that will not do."""
    generator = np.random.default_rng(config.seed)
    dues = np.zeros(config.requests)
    if config.rate:
        dues = np.cumsum(generator.exponential(1 / config.rate, config.requests))
        dues -= dues[0]
    if config.prompts is not None:
        bodies = islice(cycle(file_bodies(config)), config.requests)
    else:
        bodies = drawn_bodies(config, sizes, generator)
    return [Ask(float(due), {**common(config, model), **body}) for due, body in zip(dues, bodies, strict=True)]


def common(config: BenchConfig, model: str) -> dict[str, Any]:
    """What all bodies share."""
    own: dict[str, Any] = {
        "model": model,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        own["ignore_eos"] = True
    return own | config.further_fields


def drawn_bodies(config: BenchConfig, sizes: Sizes, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Words by chance; each prompt begins with one of the shared prefixes where there are any."""
    heads = [_words(sizes.words(config.prefix_tokens), generator) for _ in range(config.prefixes)]
    bodies = []
    for _ in range(config.requests):
        head = heads[generator.integers(len(heads))] if config.prefix_tokens else []
        number = sizes.words(_length(config.prompt_tokens, config.vary, generator))
        words = head + _words(max(1, number - len(head)), generator)
        bodies.append(
            {**asked(config, " ".join(words)), "max_tokens": _length(config.max_tokens, config.vary, generator)}
        )
    return bodies


def _words(number: int, generator: np.random.Generator) -> list[str]:
    return [WORDS[i] for i in generator.integers(0, len(WORDS), number)]


def _length(middle: int, vary: float, generator: np.random.Generator) -> int:
    """Evenly within `vary` of the middle, on both sides."""
    return max(1, int(generator.integers(round(middle * (1 - vary)), round(middle * (1 + vary)) + 1)))


def asked(config: BenchConfig, text: str) -> dict[str, Any]:
    if config.api == "completions":
        return {"prompt": text}
    return {"messages": [{"role": "user", "content": text}]}


def file_bodies(config: BenchConfig) -> Sequence[dict[str, Any]]:
    """The prompts of a file, each with its own `max_tokens` where the row has one. Raises ValueError that names the
    row."""
    assert config.prompts is not None
    bodies = [_file_body(config, row, where) for where, row in read_rows(SourceConfig(config.prompts))]
    if not bodies:
        raise ValueError(f"{config.prompts}: holds no prompt; write rows with a 'prompt' or with 'messages'")
    return bodies


def _file_body(config: BenchConfig, row: Any, where: str) -> dict[str, Any]:
    question = question_of(row, where)
    most = question.columns.get("max_tokens", config.max_tokens)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"{where}: max_tokens = {most!r}: must be a number of at least 1")
    if config.api == "completions" and not isinstance(question.asked, str):
        raise ValueError(f"{where}: holds messages; --api chat sends them")
    if isinstance(question.asked, str):
        return {**asked(config, question.asked), "max_tokens": most}
    messages = [{"role": turn.role, "content": turn.content} for turn in question.asked]
    return {"messages": messages, "max_tokens": most}
