"""A real server, at a real socket, in a thread of the test process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kogia.engine.config import EngineConfig
from kogia.serve.config import ServeConfig
from kogia.serve.process import Process, listen, state_of
from kogia.serve.state import ServerState, Status


class RunningServer:
    def __init__(self, state: ServerState, process: Process, port: int) -> None:
        self.state, self.process = state, process
        self.url = f"http://127.0.0.1:{port}"

    @property
    def engine(self):
        return next(iter(self.state.models)).served.engine

    @property
    def tokenizer(self):
        return next(iter(self.state.models)).served.tokenizer


@contextmanager
def serving(directory: Path, *, engine: dict | None = None, **settings) -> Iterator[RunningServer]:
    """Serve a model until the block ends."""
    config = ServeConfig(
        path=str(directory),
        port=0,
        device="cpu",
        drain_seconds=5,
        engine=EngineConfig(**{"num_blocks": 2048, **(engine or {})}),
        **settings,
    )
    state = state_of(config)
    with listen(config) as listener:
        process = Process(state)
        thread = threading.Thread(target=lambda: asyncio.run(process.run(listener)))
        thread.start()
        try:
            while state.status is Status.LOADING and thread.is_alive():
                thread.join(0.02)
            yield RunningServer(state, process, listener.getsockname()[1])
        finally:
            if process._loop is not None and thread.is_alive():
                process._loop.call_soon_threadsafe(process.stop)
            thread.join(20)
            assert not thread.is_alive(), "the server does not end"
