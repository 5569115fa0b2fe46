"""The one loop over steps: many callers, one engine.

Whoever waits for news runs the next step himself and hands out what it brings; the others wait for their turn or their
news. So one thread needs no other, several share the engine, and none is privileged. `asyncio` code waits for a thread
that the loop starts for it.

    stream = engine.submit(prompt_ids, SamplingParams(max_tokens=100))
    for event in stream: ...            # tokens as they come; leave early with stream.cancel()
    completions = stream.result()       # or: completions = await stream;  async for event in stream
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, runtime_checkable

from kogia.engine.request import Completion, Request, SamplingParams, TokenEvent
from kogia.text.chat import Prompt

OnProgress = Callable[[int, int, int], None]
"""Called after every step with (completions that have ended, completions in all, tokens generated)."""


@runtime_checkable
class Steps(Protocol):
    """What the loop asks of an engine. It calls these one at a time, but for `requests`, which changes nothing."""

    @property
    def num_unfinished(self) -> int: ...
    @property
    def num_generated_tokens(self) -> int: ...
    def requests(
        self, prompt: Prompt | Sequence[int], params: SamplingParams, *, stream: bool = False
    ) -> list[Request]: ...
    def queue(self, requests: Sequence[Request]) -> None: ...
    def step(self) -> list[TokenEvent]: ...
    def report(self, request: Request) -> TokenEvent | None: ...
    def abort(self, request_id: int) -> Completion | None: ...
    def stop_thinking(self, request_id: int) -> bool: ...


class Stream:
    """The continuations of one prompt under way. Made by `submit`.

    Events are made for those who wait: tokens that come while nobody does are in the next event, so that a step costs
    no more for a stream than for any other request.
    """

    def __init__(self, loop: "StreamLoop", requests: Sequence[Request], on_end: Callable[["Stream"], None]) -> None:
        self.request_ids = [request.id for request in requests]
        """One per completion, in order; events name them."""
        self.completions: dict[int, Completion] = {}
        """Request id -> completion, as they end."""
        self._loop = loop
        self._requests = requests
        self._on_end = on_end
        self._events: deque[TokenEvent] = deque()
        self.has_ended = False
        """Nothing more will come: `result` does not wait."""
        self._num_ended = 0
        """Completions whose events are there."""
        self._error: BaseException | None = None
        self._waiting: list[asyncio.Future[None]] = []
        """Of asyncio; resolved when there is news. Those who wait add theirs without a lock, and then look for news."""

    @property
    def is_done(self) -> bool:
        """All completions are there."""
        return self._num_ended == len(self.request_ids)

    @property
    def unfinished(self) -> list[Request]:
        """Those without a completion."""
        return [request for request in self._requests if request.id not in self.completions]

    def __iter__(self) -> Iterator[TokenEvent]:
        """Events as they come; the last one of each continuation carries its completion. Raises what a step raises."""
        while True:
            if not self._has_news():
                self._loop.ask((self,))
                self._loop.wait(self._has_news)
            if not self._events:
                return self._raise_error()
            yield self._events.popleft()

    def result(self) -> list[Completion]:
        """Wait for the end; the completions in order."""
        self._loop.wait(lambda: self.has_ended)
        self._raise_error()
        return [self.completions[request_id] for request_id in self.request_ids]

    def cancel(self) -> None:
        """Give up what is unfinished: it ends with reason "abort". Does nothing to what has ended."""
        if self.unfinished:
            self._loop.cancel(self)

    def stop_thinking(self) -> None:
        """Close the thoughts that are open: each answer follows. Takes effect with the next step."""
        self._loop.stop_thinking(self)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        try:
            while await self._arrival():
                yield self._events.popleft()
        finally:
            self.cancel()

    async def arrived(self) -> list[TokenEvent]:
        """Wait for news, and take all there is; nothing at the end. Raises what a step raises."""
        events: list[TokenEvent] = []
        if await self._arrival():
            while self._events:
                events.append(self._events.popleft())
        return events

    async def next(self) -> None:
        """Wait for what somebody else asks for, by `ask`, or for what comes though nobody does: the end."""
        while not self._has_news():  # woken, too, for what this one has taken while it was handed over
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(arrived)
            if not self._has_news():
                await arrived

    def __await__(self) -> Generator[None, None, list[Completion]]:
        return self._all().__await__()

    async def _all(self) -> list[Completion]:
        async for _ in self:
            pass
        return self.result()

    async def _arrival(self) -> bool:
        """Wait until the loop's own thread has brought an event; False at the end."""
        if not self._has_news():
            await self._news()
        if not self._events:
            self._raise_error()
        return bool(self._events)

    async def _news(self) -> None:
        self._loop.run_in_background()
        while not self._has_news():  # woken, too, for what another one who waits has taken
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(arrived)
            self._loop.ask((self,))
            if not self._has_news():
                await arrived

    def _has_news(self) -> bool:
        return bool(self._events) or self.has_ended

    def _raise_error(self) -> None:
        if self._error is not None and not self.is_done:
            raise self._error

    def _take(self, event: TokenEvent) -> None:
        """The loop hands over an event. Readers take no lock: first the completion, for whoever has its event; then the
        event, for whoever sees that the stream has ended."""
        if event.completion is not None:
            # a new dict: another thread may be walking through the old one
            self.completions = {**self.completions, event.request_id: event.completion}
        self._events.append(event)
        if event.completion is not None:
            self._num_ended += 1
            self.has_ended = self.has_ended or self.is_done
            self._on_end(self)


def ask(streams: Iterable[Stream]) -> None:
    """Have news of streams, of whichever engines, delivered as soon as there is any."""
    of: dict[StreamLoop, list[Stream]] = {}
    for stream in streams:
        of.setdefault(stream._loop, []).append(stream)
    for loop, own in of.items():
        loop.ask(own)


class StreamLoop:
    """Runs the steps of one engine for everybody who waits."""

    def __init__(self, engine: Steps) -> None:
        self._engine = engine
        self.num_steps = 0
        self._lock = threading.RLock()
        """Guards all that follows. Entered by itself: a Condition's own exit is Python, which Ctrl-C can cut short."""
        self._changed = threading.Condition(self._lock)
        """Notified when any of it changes."""
        self._streams: dict[int, Stream] = {}
        """Request id -> who hears of it."""
        self._arrivals: list[Request] = []
        self._departures: list[Request] = []
        self._to_answer: list[int] = []
        """Whose thoughts are to be closed."""
        self._num_pausing = 0
        """Who wait for a pause: the loop's own thread, which would take its next turn at once, lets them go first."""
        self._asked: dict[Stream, None] = {}
        """Those that somebody waits for, until news of theirs come."""
        self._heard: list[Stream] = []
        """Those with news that asyncio has not been told of."""
        self._turn: object | None = None
        """Of whoever has the engine, for steps or a pause."""
        self._thread: threading.Thread | None = None

    @property
    def num_unfinished(self) -> int:
        """Requests submitted here that have not ended."""
        return len(self._streams)

    def submit(
        self,
        prompt: Prompt | Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = True,
        on_end: Callable[[Stream], None] = lambda _: None,
    ) -> Stream:
        """Start continuations. With `stream` events bring tokens to those who wait, else there is one at each end.

        `on_end` is called, in whatever thread that happens, for each continuation that ends. Never waits for a step
        under way. Raises ValueError for what the engine cannot do.
        """
        requests = self._engine.requests(prompt, params, stream=stream)
        for request in requests:
            request.on_demand = True
        handle = Stream(self, requests, on_end)
        with self._lock:
            self._arrivals += requests
            self._streams.update((request.id, handle) for request in requests)
            self._changed.notify_all()
        return handle

    def ask(self, streams: Iterable[Stream]) -> None:
        """Have news of streams delivered as soon as there is any."""
        with self._lock:
            self._asked.update(dict.fromkeys(streams))
            if self._turn is None:
                self._exchange()

    def cancel(self, stream: Stream) -> None:
        """See `Stream.cancel`. While a step is under way it takes effect after it."""
        with self._lock:
            self._departures += stream.unfinished
            if self._turn is None:
                self._exchange()

    def stop_thinking(self, stream: Stream) -> None:
        """See `Stream.stop_thinking`. While a step is under way it takes effect after it."""
        with self._lock:
            self._to_answer += [request.id for request in stream.unfinished]
            if self._turn is None:
                self._exchange()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Run steps, in turn with others who wait, until `ready`."""
        turn = object()
        try:
            while self._take_turn(turn, ready):
                self._run_step(turn)
        finally:
            self._release(turn)

    def complete(
        self,
        requests: Iterable[tuple[Prompt | Sequence[int], SamplingParams]],
        *,
        ahead: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(place, completions) of each request as soon as all its completions are there.

        Requests are taken from the iterable while fewer than `ahead` sequences of theirs are unfinished, however many
        others there are; all at once for None.
        `on_step(completions that have ended)` is called after every step. If anything fails, Ctrl-C included, or the
        iterator is closed, nothing of this call stays in the engine.
        """
        coming, ended = enumerate(requests), deque[Stream]()
        under_way: dict[Stream, int] = {}
        num_taken = num_ended = 0
        try:
            while True:
                while ahead is None or num_taken - num_ended < ahead:
                    item = next(coming, None)
                    if item is None:
                        break
                    place, (prompt, params) = item
                    num_taken += params.n
                    under_way[self.submit(prompt, params, stream=False, on_end=ended.append)] = place
                if not under_way:
                    return
                seen = self.num_steps
                self.wait(lambda seen=seen: bool(ended) or self.num_steps > seen)
                while ended:
                    stream, num_ended = ended.popleft(), num_ended + 1
                    if stream.has_ended and stream in under_way:
                        yield under_way.pop(stream), stream.result()
                if on_step is not None:
                    on_step(num_ended)
        finally:
            for stream in under_way:
                self.cancel(stream)

    def run_in_background(self) -> None:
        """Let a thread of the loop's own run steps as long as anything is unfinished."""
        if self._thread is not None:
            return  # it ends with the last request, under the lock that brings new ones
        with self._lock:
            if self._thread is None and self._streams:
                self._thread = threading.Thread(target=self._drive, name="kogia-steps", daemon=True)
                self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody steps within the block. Waits for a step under way."""
        turn = object()
        try:
            self._wait_for_pause(turn)
            yield
        finally:
            self._release(turn)

    def _wait_for_pause(self, turn: object) -> None:
        with self._lock:
            self._num_pausing += 1
        try:
            self._take_turn(turn)
        finally:
            with self._lock:
                self._num_pausing -= 1
                self._changed.notify_all()

    def _drive(self) -> None:
        turn = object()
        try:
            while self._take_turn(turn, lambda: not self._streams, is_driver=True):
                self._run_step(turn)
        except BaseException as error:  # noqa: BLE001 - there is no caller to tell: all who wait are told
            with self._lock:
                self._thread = None
                for stream in set(self._streams.values()):
                    self._fail(stream, error)
                self._wake()
        finally:
            self._release(turn)

    def _take_turn(self, turn: object, ready: Callable[[], bool] = lambda: False, *, is_driver: bool = False) -> bool:
        """Wait for `ready` (False) or for the engine to be free (True, and it is taken)."""
        with self._lock:
            self._changed.wait_for(lambda: ready() or (self._turn is None and not (is_driver and self._num_pausing)))
            is_ready = ready()
            if not is_ready:
                self._turn = turn
            elif is_driver:
                self._thread = None
        return (
            not is_ready
        )  # not within: behind a return there CPython 3.11 may leave the lock held where a line raises

    def _run_step(self, turn: object) -> None:
        """One step by whoever has taken the turn."""
        with self._lock:
            self._exchange()
        events = self._engine.step()
        self._release(turn, events, is_idle=not self._engine.num_unfinished)

    def _release(self, turn: object, events: Sequence[TokenEvent] = (), *, is_idle: bool = False) -> None:
        """Hand out what a step brought and give a turn back; nothing where it is not (any more) that one's.

        All that may take a turn ends with this, for an interrupt can come between any two lines. `is_idle` says that
        the engine has nothing left to do.
        """
        with self._lock:
            if self._turn is turn:
                try:
                    self.num_steps += 1
                    for event in events:
                        self._deliver(event)
                    if is_idle and not self._arrivals:
                        self._give_up_lost()
                    self._wake()
                finally:
                    self._turn = None
                    self._changed.notify_all()

    def _give_up_lost(self) -> None:
        """Tell streams that will never hear of their requests: an interrupt came while news were handed over."""
        lost, self._streams = set(self._streams.values()), {}
        for stream in lost:
            error = RuntimeError(f"requests {stream.request_ids}: an interrupt lost their end; submit them again")
            self._fail(stream, error)
            stream._on_end(stream)

    def _exchange(self) -> None:
        """Bring the engine what has arrived and take out what was cancelled, while nothing steps."""
        arrivals, self._arrivals = self._arrivals, []
        departures, self._departures = self._departures, []
        to_answer, self._to_answer = self._to_answer, []
        asked, self._asked = self._asked, {}
        self._engine.queue(arrivals)
        for request_id in to_answer:
            self._engine.stop_thinking(request_id)
        for stream in asked:
            if not stream._events:  # else who asks has them before it: they came as it did
                self._report(stream.unfinished)
        self._report(departures)
        for request in departures:
            completion = self._engine.abort(request.id)
            if completion is not None:
                self._deliver(TokenEvent(request.id, [], [], "", completion))
        if departures or asked:
            self._wake()
            self._changed.notify_all()

    def _report(self, requests: Iterable[Request]) -> None:
        """Deliver what those that stream have to tell, or let their next tokens be delivered."""
        for request in requests:
            event = self._engine.report(request) if request.stream else None
            if event is not None:
                self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return  # of a request that was added without this loop
        self._asked.pop(stream, None)
        self._heard.append(stream)
        stream._take(event)
        if event.completion is not None:
            del self._streams[event.request_id]

    def _fail(self, stream: Stream, error: BaseException) -> None:
        """Let it raise an error where it would wait."""
        stream._error, stream.has_ended = error, True
        self._heard.append(stream)

    def _wake(self) -> None:
        """Tell asyncio of what has been delivered: one call for all who wait in an event loop."""
        waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        told = {stream: len(stream._waiting) for stream in self._heard}  # others may be added meanwhile
        for stream, count in told.items():
            for arrived in stream._waiting[:count]:
                waiting.setdefault(arrived.get_loop(), []).append(arrived)
        for running, futures in waiting.items():
            with suppress(RuntimeError):  # that event loop is closed: nobody waits in it any more
                running.call_soon_threadsafe(_resolve, futures)
        while self._heard:
            stream = self._heard.pop()
            del stream._waiting[: told.pop(stream, 0)]


def _resolve(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
