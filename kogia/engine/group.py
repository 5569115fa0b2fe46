"""Engines side by side over one model on a CPU, a thread each.

What one step of a small model shares out among threads is a hundred short kernels, each of which waits for its slowest
thread. Whole steps of other sequences wait for nobody. Which engine gets a request, and in which order results come,
depends on the requests alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from queue import SimpleQueue

import torch
from torch import Tensor

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine, EngineStats
from kogia.engine.request import Completion, SamplingParams
from kogia.model.transformer import Transformer
from kogia.text.chat import Prompt
from kogia.text.tokenizer import Tokenizer

_Asked = tuple[Prompt | Sequence[int], SamplingParams]
_Answered = tuple[int, list[Completion]]


def build_engine(model: Transformer, tokenizer: Tokenizer | None, config: EngineConfig, number: int = 1) -> Engine:
    """An engine, or `number` of them side by side. Raises ValueError for several on a GPU."""
    return Engine(model, tokenizer, config) if number == 1 else EngineGroup(model, tokenizer, config, number)


class EngineGroup(Engine):
    """The first of several engines, which shares what `complete` and `generate` take with the others."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, config: EngineConfig, number: int) -> None:
        """Sequences and cache of `config` are those of all together."""
        if model.device.type != "cpu":
            raise ValueError(f"engines = {number}: several are for a CPU; on {model.device} one takes the whole of it")
        share = config.share(number)
        super().__init__(model, tokenizer, share)
        self.engines: list[Engine] = [self, *(Engine(model, tokenizer, share) for _ in range(number - 1))]

    def totals(self) -> EngineStats:
        """Of all engines; seconds are the mean of theirs, which pass at the same time."""
        found = super().totals()
        for engine in self.engines[1:]:
            for each in fields(EngineStats):
                mine, others = getattr(found, each.name), getattr(engine.stats, each.name)
                is_list = isinstance(mine, list)
                setattr(found, each.name, [*map(sum, zip(mine, others))] if is_list else mine + others)
        found.seconds /= len(self.engines)
        return found

    def complete(
        self, requests: Iterable[_Asked], *, ahead: int | None = None, on_step: Callable[[int], None] | None = None
    ) -> Iterator[_Answered]:
        """Engines get requests in turn, and give what they have completed in turn. `on_step` is called with each."""
        shares, results = _Shares(requests, len(self.engines)), [SimpleQueue() for _ in self.engines]
        threads, stopped = max(1, torch.get_num_threads() // len(self.engines)), threading.Event()

        def check(_: int) -> None:
            if stopped.is_set():
                raise _Stopped

        def run(turn: int, engine: Engine) -> None:
            torch.set_num_threads(threads)
            try:
                for place, completions in engine.loop.complete(shares.of(turn), ahead=ahead, on_step=check):
                    results[turn].put((place * len(self.engines) + turn, completions))
                results[turn].put(None)
            except BaseException as error:  # noqa: BLE001 - whoever iterates raises it
                results[turn].put(error)

        workers = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(self.engines)]
        num_ended, turns = 0, deque(range(len(self.engines)))
        try:
            for worker in workers:
                worker.start()
            while turns:
                turn = turns.popleft()
                item = results[turn].get()
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    turns.append(turn)
                    num_ended += len(item[1])
                    yield item
                    if on_step is not None:
                        on_step(num_ended)
        finally:
            stopped.set()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()

    def update_weights(self, source: Transformer | Mapping[str, Tensor], version: int | None = None) -> None:
        super().update_weights(source, version)
        for engine in self.engines[1:]:
            engine.update_weights(self.model, self.weights_version)

    def forget_prefixes(self) -> int:
        return super().forget_prefixes() + sum(engine.forget_prefixes() for engine in self.engines[1:])

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(super().deterministic())
            for engine in self.engines[1:]:
                stack.enter_context(engine.deterministic())
            yield


class _Stopped(Exception):
    """Nobody wants any more of an engine's requests."""


class _Shares:
    """Requests in turn for engines that take them at their own pace."""

    def __init__(self, requests: Iterable[_Asked], number: int) -> None:
        self._coming = enumerate(requests)
        self._kept: list[deque[_Asked]] = [deque() for _ in range(number)]
        self._lock = threading.Lock()

    def of(self, turn: int) -> Iterator[_Asked]:
        while (item := self._next(turn)) is not None:
            yield item

    def _next(self, turn: int) -> _Asked | None:
        with self._lock:
            while not self._kept[turn]:
                place, item = next(self._coming, (0, None))
                if item is None:
                    return None
                self._kept[place % len(self._kept)].append(item)
            return self._kept[turn].popleft()
