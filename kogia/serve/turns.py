"""Work that goes one at a time, its callers by turns: whoever asks for a hundred waits for his own, not everybody."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


class Turns:
    """For one event loop. Those who wait hold no thread."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By caller; the first one is next."""

    @asynccontextmanager
    async def of(self, caller: str) -> AsyncIterator[None]:
        """The caller's turn lasts as long as the block."""
        if self._is_taken:
            await self._wait(caller)
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, caller: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it came all the same
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            caller, own = next(iter(self._waiting.items()))
            turn = own.popleft()
            self._waiting.move_to_end(caller)
            if not own:
                del self._waiting[caller]
            if not turn.done():  # that one has left
                turn.set_result(None)
                return
        self._is_taken = False


@dataclass
class Lanes:
    """Work of one model that may take seconds, each kind in a lane of its own; what is quick stands in none."""

    formats: Turns = field(default_factory=Turns)
    """Requests whose grammar may be compiled."""
    templates: Turns = field(default_factory=Turns)
    """Conversations for a chat template that came with the model."""
    large: Turns = field(default_factory=Turns)
    """Prompts of large bodies."""
