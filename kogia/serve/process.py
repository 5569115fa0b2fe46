"""The process of a server: it listens at once, loads meanwhile, says when it is ready, and drains when told to end."""

import asyncio
import gc
import signal
import socket
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from kogia import log
from kogia.serve.access import Keys
from kogia.serve.access_log import access_log
from kogia.serve.app import create_app
from kogia.serve.config import ServeConfig
from kogia.serve.connection import IDLE_SECONDS, Outbox, Protocol
from kogia.serve.guard import MOST_HEADER_BYTES
from kogia.serve.loading import size
from kogia.serve.models import Models
from kogia.serve.state import ServerState


def serve(config: ServeConfig) -> int:
    """Serve until a signal ends it. Raises ValueError or OSError for what will not do."""
    state = state_of(config)
    gc.freeze()  # what is imported stays: looking through all of it would hold every stream up for a tenth of a second
    with listen(config) as listener:
        asyncio.run(Process(state).run(listener))
    return 0


def state_of(config: ServeConfig) -> ServerState:
    """The state of a server that has just begun. Raises ValueError for keys and limits that will not do."""
    keys, admin_keys = Keys.read(config.api_key_file), Keys.read(config.admin_key_file, "--admin-key-file")
    return ServerState(config, keys, admin_keys)


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the address of the server. Raises OSError that names it."""
    host = config.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # where the protocol is named asyncio sets TCP_NODELAY: else a chunk waits for the client's system to confirm the
    # one before, which it puts off for up to 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, config.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host} port {config.port}: {error.strerror}; take another --port") from None
    return listener


class Process(uvicorn.Server):
    """One application at one socket, with models that are loaded while it listens."""

    def __init__(self, state: ServerState) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(state),
                http=cast(Any, partial(Protocol, outbox=Outbox())),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # what strangers send is no news
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing here asks who a client is
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=5,
            )
        )
        self.state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._num_signals = 0

    async def run(self, listener: socket.socket) -> None:  # type: ignore[override]
        """Serve until `stop`. Raises what loading raises."""
        self._loop = asyncio.get_running_loop()
        with access_log(self.state), _telemetry(self.state), self.state.models:
            loading = asyncio.ensure_future(self._load_and_say(listener))
            await self.serve(sockets=[listener])
        if loading.done():
            loading.result()
        if self._error is not None:
            raise self._error

    async def _load_and_say(self, listener: socket.socket) -> None:
        try:
            await self.state.models.open()
        except BaseException as error:  # noqa: BLE001 - `run` raises it
            self._error, self.should_exit = error, True
            return
        self.state.is_loaded = True
        if not self.state.is_ending:
            host, port = listener.getsockname()[:2]
            log.info(ready_line(self.state.models, f"http://{f'[{host}]' if ':' in host else host}:{port}"))

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.look()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one gives up what runs, a third one waits for nothing."""
        self._num_signals += 1
        if self._loop is None or self._num_signals > 2:
            self.should_exit = self.force_exit = True
            return
        num_running = len(self.state.running)
        what = "no new requests, {} running ones end" if self._num_signals == 1 else "{} running requests are given up"
        log.info(f"{signal.Signals(sig).name}: {what.format(num_running)}")
        self._loop.call_soon_threadsafe(self.stop if self._num_signals == 1 else self.hurry)

    def stop(self) -> None:
        """Drain, then end. In the event loop's thread."""
        task = asyncio.ensure_future(self._drain())
        self._tasks.add(task)
        self.state.is_ending = True

    def hurry(self) -> None:
        """End what a drain waits for: each client hears why. In the event loop's thread."""
        self.state.is_hurried = True
        self.config.timeout_graceful_shutdown = 1

    async def _drain(self) -> None:
        await self.state.drain(self.state.config.drain_seconds)
        self.should_exit = True


def _telemetry(state: ServerState) -> AbstractContextManager[None]:
    """Imports nothing of it where it is off."""
    if state.config.otlp_endpoint is None:
        return nullcontext()
    from kogia.serve.telemetry import telemetry

    return telemetry(state)


def ready_line(models: Models, url: str) -> str:
    """URL, the first model, its memory and what it took, and which others there are."""
    first, *others = models
    more = "".join(f"; {entry.name} {entry.phase}" for entry in others)
    assert first.served is not None, "it is loaded before the server is ready"
    cache = first.served.engine.runner.cache
    num_tokens = cache.num_blocks * cache.block_size
    return (
        f"{url} serves {first.name}: "
        f"weights {size(first.need.weights)}, cache {size(cache.rows.nbytes)} for {num_tokens:,} tokens, "
        f"context {first.config.max_position:,}; {first.served.llm.readiness}{more}"
    )
