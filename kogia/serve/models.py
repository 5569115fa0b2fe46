"""The models of a server by name: which are loaded, which one goes when another needs its room, and who waits.

Everything runs in the event loop's thread but loading itself. One model is loaded at a time, and whoever asks for it
meanwhile waits for the same loading.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from kogia import log
from kogia.engine.threads import generation_threads
from kogia.model.costs import num_params
from kogia.serve.config import ServeConfig, num_bytes
from kogia.serve.errors import ApiError, shown
from kogia.serve.exchange import Exchange
from kogia.serve.loading import load_model, read_models, reload_weights, size, unload_model
from kogia.serve.served import Entry, Phase, ServedModel

MOST_WAITING = 100
"""Requests that wait for one model to be loaded; more are told to come again."""
RETRY_SECONDS = 30.0
"""After a loading that failed, requests do not have it tried again for so long."""
SETTLE_SECONDS = 10.0
"""For the last step of a model that is unloaded."""


class Models:
    """By every name that requests may use."""

    def __init__(self, config: ServeConfig, load: Callable[[ServeConfig], ServedModel] = load_model) -> None:
        self.limit = math.inf if config.memory_limit is None else num_bytes(config.memory_limit)
        """Bytes."""
        self._config = config
        self._wait_seconds = config.load_wait_seconds
        self._load = load
        self._by_name: dict[str, Entry] = {}
        self._turn = asyncio.Lock()
        """Of whoever loads or unloads."""
        self._freed = asyncio.Event()
        """A model has been left by the last of its users."""
        self._threads = ExitStack()
        self._guest_bytes = 0
        """Of weights that are read to take the place of others."""

    async def open(self) -> None:
        """Find all models, and load those that are loaded at the start. Raises ValueError for one that will not do."""
        for entry in await asyncio.to_thread(read_models, self._config):
            self._by_name |= dict.fromkeys(entry.names, entry)
        for entry in self:
            if entry.at_start:
                await self.load(entry)

    def __enter__(self) -> "Models":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    def __iter__(self) -> Iterator[Entry]:
        """Each once."""
        return iter(dict.fromkeys(self._by_name.values()))

    def __getitem__(self, name: str) -> Entry:
        return self._by_name[name]

    @property
    def names(self) -> dict[str, Entry]:
        return self._by_name

    @property
    def num_bytes(self) -> int:
        """That models take, those that are being loaded included."""
        return sum(entry.num_bytes for entry in self)

    def find(self, name: str | None, field: str = "model") -> Entry:
        """The model of that name, or the only one for None. Raises 404 for a name that nothing has."""
        entries = list(self)
        if name is None and len(entries) == 1:
            return entries[0]
        if name not in self._by_name:
            known = ", ".join(self._by_name) + (", or left out" if len(entries) == 1 else "")
            raise ApiError(f"{field} = {shown(name)}: must be one of {known}", 404, param=field, code="model_not_found")
        return self._by_name[name]

    async def use(self, name: str | None, exchange: Exchange | None) -> ServedModel:
        """The loaded model of a request, which keeps it until the exchange ends. Where it is not loaded that begins
        now, and is waited for. Raises 404 as `find`, and 503 where it cannot be loaded in time."""
        entry = self.find(name)
        _check_drained(entry)
        if exchange is not None and entry not in exchange.models:
            exchange.models.append(entry)
            entry.num_users += 1
        entry.last_used = time.monotonic()
        if entry.served is None:
            await self._arrival(entry)
        if entry.served is None:
            raise _unavailable(entry, RETRY_SECONDS if entry.phase is Phase.FAILED else 5)
        _check_drained(entry)
        return entry.served

    def leave(self, exchange: Exchange) -> None:
        """An exchange has ended."""
        for entry in exchange.models:
            entry.num_users -= 1
            entry.last_used = time.monotonic()
        exchange.models = []
        self._freed.set()

    async def _arrival(self, entry: Entry) -> None:
        """Wait until a model is loaded, or can not be, or for as long as a request waits."""
        if time.monotonic() < entry.retry_at:
            return
        if entry.num_users > MOST_WAITING:
            raise _unavailable(entry, 5)
        await asyncio.wait([self.begin_to_load(entry)], timeout=self._wait_seconds)

    def begin_to_load(self, entry: Entry) -> asyncio.Task[None]:
        """The loading of a model: one for all who wait. Its outcome is in the entry."""
        if entry.loading is None:
            entry.loading = asyncio.ensure_future(self._load_and_note(entry))
        return entry.loading

    async def _load_and_note(self, entry: Entry) -> None:
        try:
            await self.load(entry)
        except ApiError as error:  # others need the room
            entry.error = error.message
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on without this model
            entry.error = str(error) or type(error).__name__
            entry.phase, entry.retry_at = Phase.FAILED, time.monotonic() + RETRY_SECONDS
            log.warn(f"{entry.name} could not be loaded: {log.printable(entry.error)}")
        finally:
            entry.loading = None

    async def load(self, entry: Entry) -> None:
        """Load a model, in the room of others if need be. Raises what loading raises, and 503 where the models that
        are in the way all answer."""
        async with self._turn:
            if entry.served is not None:
                return
            entry.phase = Phase.LOADING
            try:
                await self._make_room(entry)
                began = time.perf_counter()
                served = await asyncio.to_thread(self._load, entry.settings)
            except BaseException:
                entry.phase = Phase.UNLOADED
                raise
            self._note_loaded(entry, served, time.perf_counter() - began)

    def _note_loaded(self, entry: Entry, served: ServedModel, seconds: float) -> None:
        served.engine.stats = entry.stats
        entry.served, entry.phase, entry.error, entry.retry_at = served, Phase.LOADED, None, 0.0
        entry.num_loads += 1
        entry.load_seconds += seconds
        entry.last_used = time.monotonic()
        self._set_threads()

    async def unload(self, entry: Entry) -> None:
        """Unload a model that nobody uses. Raises 409 where somebody does."""
        async with self._turn:
            if entry.num_users:
                raise ApiError(f"{entry.name} answers {entry.num_users} requests; drain it first", 409, param="model")
            await self._unload(entry)

    async def reload(self, entry: Entry, source: Entry) -> None:
        """New weights for a loaded model, of the files of `source`. Running requests go on with them, and cached
        prefixes are forgotten. Raises ValueError for another architecture, OSError for files that cannot be read, and
        409 for a model that is not loaded, or beside which the limit never has room for a second set of weights: the
        weights stay what they were."""
        async with self._turn:
            if entry.served is None:
                raise ApiError(f"{entry.name} is not loaded: its weights are read when it is", 409, param="model")
            settings = replace(entry.settings, path=source.settings.path)
            guest_bytes = entry.need.weights if entry.served.llm.model.device.type == "cpu" else 0
            self._check_room_beside(entry, guest_bytes)
            entry.num_users += 1  # so that it stays
            try:
                self._guest_bytes = guest_bytes
                await self._make_room(entry)
                await asyncio.to_thread(reload_weights, entry.served, settings)
            finally:
                self._guest_bytes = 0
                entry.num_users -= 1
            entry.settings = settings
            log.info(f"{entry.name} has the weights of {settings.path}")

    def _check_room_beside(self, entry: Entry, guest_bytes: int) -> None:
        """Raise 409 where a model and new weights for it are more than the limit, whatever else is unloaded."""
        if entry.num_bytes + guest_bytes > self.limit:
            raise ApiError(
                f"{entry.name} keeps its weights: it takes {size(entry.num_bytes)}, and new ones beside it "
                f"{size(guest_bytes)}, more than memory_limit {size(int(self.limit))}; unload it, and the next request "
                "reads its files again, or start the server with a smaller engine.cache_memory_bytes",
                409,
                param="model",
            )

    async def _unload(self, entry: Entry) -> None:
        served, entry.served, entry.phase = entry.served, None, Phase.UNLOADED
        if served is not None:
            await _settled(served)
            await asyncio.to_thread(unload_model, served)
            self._set_threads()
            log.info(f"{entry.name} is unloaded")

    async def _make_room(self, entry: Entry) -> None:
        """Unload what has not been used for the longest until a model has room. Raises 503 where what is in the way
        goes on answering for longer than requests wait."""
        deadline = time.monotonic() + self._wait_seconds
        while self._excess > sum(each.num_bytes for each in self._idle()):
            self._freed.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._freed.wait()
            except TimeoutError:
                raise self._no_room(entry) from None
        while self._excess > 0:
            await self._unload(min(self._idle(), key=lambda each: each.last_used))

    @property
    def _excess(self) -> float:
        """Bytes above the limit, with what is being loaded."""
        return self.num_bytes + self._guest_bytes - self.limit

    def _idle(self) -> list[Entry]:
        return [each for each in self if each.served is not None and not each.num_users]

    def _no_room(self, entry: Entry) -> ApiError:
        busy = ", ".join(f"{each.name} {size(each.num_bytes)}" for each in self if each.served is not None)
        guest = f", new weights beside it {size(self._guest_bytes)}" if self._guest_bytes else ""
        return ApiError(
            f"{entry.name} takes {size(entry.need.total)}{guest}, and the models that answer now leave no room for it: "
            f"{busy} of {size(int(self.limit))}",
            503,
            headers={"Retry-After": "5"},
        )

    def _set_threads(self) -> None:
        """As the largest of the loaded models wants them."""
        self._threads.close()
        loaded = [num_params(entry.config) for entry in self if entry.served is not None]
        if loaded:
            self._threads.enter_context(generation_threads(None, max(loaded)))


def _check_drained(entry: Entry) -> None:
    """Raise 503 for a model that takes no requests."""
    if entry.is_drained:
        raise ApiError(f"{entry.name} takes no requests now; try again later", 503, headers={"Retry-After": "5"})


async def _settled(served: ServedModel) -> None:
    """Wait for the step after which requests that were given up hold nothing."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while served.engine.loop.num_unfinished and time.monotonic() < deadline:
        await asyncio.sleep(0.005)


def _unavailable(entry: Entry, seconds: float) -> ApiError:
    """503 that says no more than a client may know."""
    why = "could not be loaded; the server's log says why" if entry.phase is Phase.FAILED else "is not loaded yet"
    return ApiError(f"{entry.name} {why}; try again later", 503, headers={"Retry-After": f"{seconds:.0f}"})
