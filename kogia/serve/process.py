"""The process of a server: it listens at once, loads meanwhile, says when it is ready, and drains when told to end."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from kogia import log
from kogia.checkpoint.directory import resolve_model_dir
from kogia.engine.threads import generation_threads
from kogia.inference.config import FILTERS, engine_options, filtered_sampling
from kogia.inference.llm import LLM
from kogia.model.costs import num_params
from kogia.serve.access import Keys
from kogia.serve.access_log import access_log
from kogia.serve.app import create_app
from kogia.serve.config import ServeConfig
from kogia.serve.connection import IDLE_SECONDS, Protocol
from kogia.serve.guard import MOST_HEADER_BYTES
from kogia.serve.state import ServedModel, ServerState, Status
from kogia.text.files import read_generation


def serve(config: ServeConfig) -> int:
    """Serve until a signal ends it. Raises ValueError or OSError for what will not do."""
    state = ServerState(config, Keys.read(config.api_key_file))
    with listen(config) as listener:
        asyncio.run(Process(state, lambda: load_model(config)).run(listener))
    return 0


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the address of the server. Raises OSError that names it."""
    host = config.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, config.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host} port {config.port}: {error.strerror}; take another --port") from None
    return listener


def load_model(config: ServeConfig) -> ServedModel:
    """Load the model of a configuration. Raises ValueError as `LLM` does."""
    directory = resolve_model_dir(config.path)
    own = {} if directory.is_file() else read_generation(directory)
    filters = filtered_sampling(config, own)
    llm = LLM(
        directory,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        tensor_parallel=config.tensor_parallel,
        expert_parallel=config.expert_parallel,
        **engine_options(config.engine, config.draft_tokens),
    )
    name = config.name[0] if config.name else Path(config.path).resolve().name
    defaults = {name: getattr(filters, name) for name in FILTERS}
    return ServedModel(name, llm, defaults, config.max_tokens)


class Process(uvicorn.Server):
    """One application at one socket, with a model that is loaded while it listens."""

    def __init__(self, state: ServerState, load: Callable[[], ServedModel]) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(state),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=5,
            )
        )
        self.state = state
        self._load = load
        self._began = time.perf_counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def run(self, listener: socket.socket) -> None:  # type: ignore[override]
        """Serve until `stop`. Raises what loading raises."""
        self._loop = asyncio.get_running_loop()
        with access_log(self.state):
            loading = asyncio.ensure_future(self._load_and_say(listener))
            await self.serve(sockets=[listener])
        if loading.done():
            loading.result()
        if self._error is not None:
            raise self._error

    async def _load_and_say(self, listener: socket.socket) -> None:
        try:
            served = await asyncio.to_thread(self._load)
        except BaseException as error:  # noqa: BLE001 - `run` raises it
            self._error, self.should_exit = error, True
            return
        self.state.add(served, self.state.config.name)
        if self.state.status is not Status.LOADING:
            return
        self.state.status = Status.READY
        host, port = listener.getsockname()[:2]
        log.info(ready_line(served, f"http://{f'[{host}]' if ':' in host else host}:{port}"))
        with generation_threads(None, num_params(served.config)):
            while not self.should_exit:
                await asyncio.sleep(0.1)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.look()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends at once."""
        if self._loop is None or self.state.status is Status.DRAINING:
            self.should_exit = self.force_exit = True
            return
        log.info(f"{signal.Signals(sig).name}: no new requests, {len(self.state.running)} running ones end")
        self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Drain, then end. In the event loop's thread."""
        task = asyncio.ensure_future(self._drain())
        self._tasks.add(task)
        self.state.status = Status.DRAINING

    async def _drain(self) -> None:
        await self.state.drain(self.state.config.drain_seconds)
        self.should_exit = True


def ready_line(served: ServedModel, url: str) -> str:
    """URL, model, memory, and what it took."""
    engine, model = served.engine, served.llm.model
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    cache = engine.runner.cache
    tokens = cache.num_blocks * cache.block_size
    return (
        f"{url} serves {served.name}: "
        f"weights {_size(weights)}, cache {_size(cache.rows.nbytes)} for {tokens:,} tokens, "
        f"context {served.config.max_position:,}; {served.llm.readiness}"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
