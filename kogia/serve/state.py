"""What a server has: models by name, keys, the requests that run, and whether it takes more."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kogia import log
from kogia.engine.loop import Stream, ask
from kogia.engine.request import SamplingParams
from kogia.serve.access import Caller, Keys
from kogia.serve.config import ServeConfig
from kogia.serve.conversations import ConversationStore
from kogia.serve.errors import ApiError
from kogia.serve.exchange import Exchange, current
from kogia.serve.fields import Body
from kogia.serve.limits import Limiter
from kogia.serve.models import Models
from kogia.serve.sampling import Asked
from kogia.serve.served import ServedModel
from kogia.serve.turns import Turns

CHUNKS_PER_SECOND = 300
"""Of all streams together, roughly: a chunk costs a tenth of a millisecond, and disturbs the steps."""
MOST_CHUNK_SECONDS = 0.05
"""Text that comes later is seen to come late."""


MOST_ANSWERS = 16_384
"""Under way and in line, of all requests together: each takes some ten kilobytes."""
ENDS = "the server is shutting down; ask again"


class Status(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """Runs what it has, and takes no more."""


@dataclass(eq=False)
class Running:
    """A request that the engine works on."""

    id: str
    """As its answer names it."""
    model: ServedModel
    caller: Caller
    stream: Stream
    asked: Asked
    prompt_ids: Sequence[int]
    opens_thought: bool
    """Whether its answer starts inside a thought."""
    is_text: bool = False
    """Its answer is the continuation of a text, with no thoughts or calls to tell apart."""
    began: float = 0.0
    """When it came, by the server's clock."""
    first_token: float | None = None
    token_times: dict[int, float] = field(default_factory=dict)
    """When tokens of each of its answers came last, by its number."""
    num_tokens: int = 0
    """That have come, of all its answers."""
    reason: str | None = None
    """Why the server gave it up."""
    request_id: str | None = None
    """Of the exchange that it belongs to."""

    @property
    def params(self) -> SamplingParams:
        return self.asked.params

    @property
    def num_cached(self) -> int:
        """Prompt tokens that nobody had to compute for any answer: those that come after the first find more."""
        return min((each.num_cached_tokens for each in self.stream.completions.values()), default=0)


class ServerState:
    """Shared by all routes; changed in the event loop's thread alone."""

    def __init__(self, config: ServeConfig, keys: Keys | None = None, admin_keys: Keys | None = None) -> None:
        """Raises ValueError for an admin key that is a user's, too."""
        self.config = config
        self.keys = keys or Keys()
        self.admin_keys = admin_keys or Keys()
        self.admin_keys.check_apart(self.keys)
        self.limiter = Limiter.read(config.limits_file, [caller.name for caller in self.keys.callers])
        self.store = ConversationStore.of(config)
        """None where conversations stay in the browser."""
        self.models = Models(config)
        self.running: dict[str, Running] = {}
        """By the id of the answer."""
        self.num_answers = 0
        """Of those that run; a request may ask for several."""
        self.is_loaded = False
        """What is loaded at the start has been."""
        self.is_drained = False
        """By an operator, who may take it back."""
        self.is_ending = False
        self.is_hurried = False
        """What runs is given up, whatever `drain` would wait for."""
        self.rendering = Turns()
        """Of those who have texts made HTML."""
        self.clock = time.monotonic
        self.on_tokens: list[Callable[[Running, int, int, float], None]] = []
        """Told of tokens that have come: the request, which of its answers, how many, and when."""
        self.on_end: list[Callable[[Running], None]] = []
        """Told of every request that has ended, however it did."""
        self.on_begin: list[Callable[[Exchange, Mapping[str, str]], None]] = []
        """Told of everything that is asked, with its headers."""
        self.on_exchange: list[Callable[[Exchange], None]] = []
        """Told of everything that was asked, when its answer is sent."""
        self._resting: list[Stream] = []
        """Those that wait for `next_chunks`."""
        self._ignored: set[tuple[str, str]] = set()

    async def find(self, name: str | None) -> ServedModel:
        """The model of a request that names it, or of one that names none where there is one, loaded. Raises 404 for a
        name that the server does not know, 503 where it takes no requests or cannot load the model in time."""
        self.check_ready()
        return await self.models.use(name, current.get())

    @property
    def status(self) -> Status:
        if self.is_ending or self.is_drained:
            return Status.DRAINING
        return Status.READY if self.is_loaded else Status.LOADING

    def check_ready(self) -> None:
        if self.status is not Status.READY:
            raise ApiError(f"the server is {self.status}; try again later", 503, headers={"Retry-After": "5"})

    def check_room(self, num_answers: int) -> None:
        """Raise 503 where so many more answers would be too many."""
        if self.num_answers + num_answers > MOST_ANSWERS:
            message = f"{self.num_answers:,} answers are under way or in line; try again later"
            raise ApiError(message, 503, headers={"Retry-After": "5"})

    @property
    def chunk_seconds(self) -> float:
        """Least time between two chunks of a stream. Tokens that come faster share one, so that what is spent on chunks
        does not grow with the number of clients."""
        return min(MOST_CHUNK_SECONDS, len(self.running) / CHUNKS_PER_SECOND)

    async def next_chunks(self, stream: Stream) -> None:
        """Wait until the streams send what has come: all at once, so that engine and event loop are each disturbed
        once for all of them. One that ends does not wait."""
        if not self._resting:
            asyncio.get_running_loop().call_later(self.chunk_seconds, self._send_chunks)
        self._resting.append(stream)
        await stream.next()

    def _send_chunks(self) -> None:
        resting, self._resting = self._resting, []
        ask(each for each in resting if not each.has_ended)

    def begin(self, running: Running) -> None:
        self.running[running.id] = running
        self.num_answers += running.params.n

    def note_tokens(self, running: Running, index: int, count: int) -> None:
        """Tokens of one of a request's answers have come."""
        now = self.clock()
        for listener in self.on_tokens:
            listener(running, index, count, now)
        is_first = running.first_token is None
        used = count + (len(running.prompt_ids) if is_first else 0)
        self.limiter.take_tokens(running.caller.name, used, now)
        running.num_tokens += count
        running.token_times[index] = now
        if is_first:
            running.first_token = now

    def note_exchange(self, exchange: Exchange) -> None:
        """An answer has been sent, or could not be: nothing more is done for it."""
        self.models.leave(exchange)
        for listener in self.on_exchange:
            listener(exchange)

    def end(self, running: Running) -> None:
        """Free what a request holds, whether or not it has ended: within the engine's next step."""
        running.stream.cancel()
        if self.running.pop(running.id, None) is not None:
            self.num_answers -= running.params.n
            self.limiter.leave(running.caller.name)
            for listener in self.on_end:
                listener(running)

    def stop(self, running: Running, reason: str) -> None:
        """Give a request up; its client hears why."""
        running.reason = reason
        running.stream.cancel()

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those that run: those that take longer are given up."""
        self.is_ending = True
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline and not self.is_hurried:
            await asyncio.sleep(0.02)
        for running in list(self.running.values()):
            self.stop(running, ENDS)
        deadline = time.monotonic() + 2
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def note_ignored(self, where: str, body: Body) -> None:
        """Say once of each field that it has no effect here, of a thousand in all. Raises 400 for those that must have
        one."""
        fresh = [name for name in body.passed_over() if (where, name) not in self._ignored]
        fresh = fresh[: 1000 - len(self._ignored)]
        if fresh:
            self._ignored |= {(where, name) for name in fresh}
            log.info(
                f"{where}: fields without effect here are passed over: {', '.join(map(log.one_line, fresh))[:300]}"
            )
