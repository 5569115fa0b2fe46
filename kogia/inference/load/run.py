"""A load on a server: what it takes to begin, the requests as they arrive, and what came of them."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kogia import __version__, log
from kogia.config import to_dict
from kogia.files import check_target, write_json
from kogia.inference.config import SERVER_OPTIONS, BenchConfig
from kogia.inference.load.client import PATHS, follow
from kogia.inference.load.connections import Address, Connections, error_text
from kogia.inference.load.outcome import Outcome, figures, lines_of
from kogia.inference.load.plan import WORDS, Ask, Sizes, asked, common, draw
from kogia.terminal import LiveLine, printable
from kogia.text.files import read_text

SHORT, LONG = 8, 40
"""Words of the two prompts from which is learnt how the server counts."""
BUSY = 0.8
"""Share of the time from which on a client that computes is what is measured."""
SHARED = ("prompt_tokens", "max_tokens", "rate", "requests", "seed", "url")


def main(config: BenchConfig) -> int:
    """Raises ValueError or OSError for a server that cannot be asked, and where every request fails. Ctrl-C ends the
    load, and tells what came until then; returns 130 then."""
    if config.out is not None:
        check_target(config.out)
    assert config.url is not None
    connections = Connections(Address.of(config.url), _authorization(config))
    load = Load(config, connections)
    with _many_files():
        asyncio.run(load.run())
    _tell(config, load)
    return 130 if load.was_interrupted else 0


def _authorization(config: BenchConfig) -> dict[str, str]:
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            raise ValueError(f"api_key_env = {config.api_key_env!r}: no such environment variable, or an empty one")
    elif config.api_key_file is not None:
        lines = [line.strip() for line in read_text(Path(config.api_key_file).expanduser()).splitlines()]
        first = next((line for line in lines if line and not line.startswith("#")), "")
        key = first.rpartition(": ")[2]  # a name may stand before it, as in the file of a server
        if not key or key.startswith("sha256:"):
            raise ValueError(f"{config.api_key_file}: holds no key on its first line")
    if key is None:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("the key of the server holds blanks or signs that no key has")
    return {"Authorization": f"Bearer {key}"}


class Load:
    """Requests on their way to one server."""

    def __init__(self, config: BenchConfig, connections: Connections) -> None:
        self.config = config
        self.model = config.model or ""
        self.outcomes: list[Outcome] = []
        self.duration = 0.0
        self.busy = 0.0
        """Share of the duration that this process computed."""
        self.was_interrupted = False
        self._connections = connections
        self._path = PATHS[config.api]
        self._gate = asyncio.Semaphore(config.clients or config.requests)
        self._started = 0.0

    async def run(self) -> None:
        self.model = self.model or await self._first_model()
        asks = draw(self.config, self.model, await self._measure_words())
        self._started, computed = time.perf_counter(), time.process_time()
        with LiveLine("bench") as line, self._interruptible() as tasks:
            tasks += [asyncio.ensure_future(self._ask(ask, line)) for ask in asks]
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()
        self.duration = self._clock()
        self.busy = (time.process_time() - computed) / self.duration
        self._connections.close()

    def _clock(self) -> float:
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[list["asyncio.Task[None]"]]:
        """Ctrl-C ends the tasks, and a second one the program."""
        tasks: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()

        def end() -> None:
            self.was_interrupted = True
            loop.remove_signal_handler(signal.SIGINT)
            for task in tasks:
                task.cancel()

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # no signals in this thread or system
            loop.add_signal_handler(signal.SIGINT, end)
        try:
            yield tasks
        finally:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(signal.SIGINT)

    async def _ask(self, ask: Ask, line: LiveLine) -> None:
        await asyncio.sleep(ask.due - self._clock())
        async with self._gate:
            began = ask.due if self.config.rate else self._clock()
            self.outcomes.append(await self._bounded(ask.body, began))
            done = len(self.outcomes)
            failed = sum(each.error is not None for each in self.outcomes) if done % 100 == 0 or done < 100 else 0
            fields = [f"{failed} failed"] if failed else []
            line.update(done, self.config.requests, rate=f"{done / self._clock():.1f} requests/s", fields=fields)

    async def _bounded(self, body: dict[str, Any], began: float) -> Outcome:
        following = follow(self._connections, self._path, body, began, self._clock)
        try:
            return await asyncio.wait_for(following, self.config.timeout)
        except TimeoutError:
            return Outcome(began, self._clock(), error=f"took more than --timeout {self.config.timeout:g} seconds")

    async def _first_model(self) -> str:
        """The name of the first model that the server lists. Raises ValueError where there is none."""
        response = await self._reached(self._connections.ask("GET", "/models"))
        body = await response.body()
        self._connections.release(response)
        if response.status != 200:
            raise ValueError(f"{self.config.url}: GET /v1/models says {response.status}: {error_text(body)}")
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{self.config.url}: GET /v1/models names no model; name one by --model") from None

    async def _reached(self, asking: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(asking, min(self.config.timeout, 30.0))
        except TimeoutError:
            raise ValueError(f"{self.config.url}: nobody answers within 30 seconds") from None
        except OSError as error:
            number = error.errno or 0
            reason = os.strerror(number) if number > 0 else error.strerror or error
            raise ValueError(f"{self.config.url}: {reason}; is the server running?") from None

    async def _measure_words(self) -> Sizes:
        """How the server counts words, by two requests that warm it up besides. Raises ValueError where it refuses
        them."""
        counts = [await self._count(number) for number in (SHORT, LONG)]
        per_word = (counts[1] - counts[0]) / (LONG - SHORT)
        if per_word <= 0:
            log.warn("the server tells no number of prompt tokens; a word is taken for a token")
            return Sizes()
        return Sizes(per_word, counts[0] - SHORT * per_word)

    async def _count(self, number: int) -> int:
        words = " ".join(WORDS[:number])
        body = {**common(self.config, self.model), **asked(self.config, words), "max_tokens": 2}
        outcome = await self._bounded(body, 0.0)
        if outcome.error is not None:
            raise ValueError(f"{self.config.url}: the first request failed: {outcome.error}")
        return outcome.num_prompt


@contextlib.contextmanager
def _many_files() -> Iterator[None]:
    """As many open connections as the system allows."""
    try:
        import resource
    except ImportError:  # a system without such limits
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _tell(config: BenchConfig, load: Load) -> None:
    """Print the table, and write the figures. Raises ValueError where no request was answered."""
    found = figures(load.outcomes, load.duration, config.goals)
    if load.outcomes and not found["completed"]:
        first, count = next(iter(found["errors"].items()))
        raise ValueError(f"{config.url}: all of {len(load.outcomes)} requests failed; {count} of them with: {first}")
    if load.was_interrupted:
        log.warn(f"interrupted: {len(load.outcomes)} of {config.requests} requests have ended, and are counted")
    print(lines_of(found, config.rate, config.clients))
    for error, count in list(found["errors"].items())[:5]:
        print(f"{count} failed: {printable(error)}")
    if load.busy > BUSY:
        log.warn(f"this client computed for {load.busy:.0%} of the time: its own speed limits these figures")
    if config.out is not None:
        write_json(config.out, _report(config, load, found))


def _report(config: BenchConfig, load: Load, found: dict[str, Any]) -> dict[str, Any]:
    settings = to_dict(config)
    return {
        "model": load.model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kogia": __version__,
        "settings": {name: settings[name] for name in (*SHARED, *SERVER_OPTIONS) if name in settings},
        "interrupted": load.was_interrupted,
        "client_busy": load.busy,
        **found,
    }
