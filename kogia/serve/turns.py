"""Work that goes one at a time, its callers by turns: whoever asks for a hundred waits for his own, not everybody."""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

Made = TypeVar("Made")


class Turns:
    """For one event loop. Those who wait hold no thread."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By caller; the first one is next."""

    async def take(self, caller: str) -> None:
        """Wait for the caller's turn, which lasts until `pass_on`."""
        if self._is_taken:
            await self._wait(caller)
        self._is_taken = True

    async def _wait(self, caller: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it came all the same
                self.pass_on()
            raise

    def pass_on(self) -> None:
        """The next one's turn."""
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


async def in_thread(
    work: Callable[[], Made],
    turns: Turns | None = None,
    caller: str = "",
    *,
    give_up: Callable[[Made], object] = lambda _: None,
) -> Made:
    """What `work` makes, in a thread; with `turns` in a turn of the caller's.

    Whoever is cancelled gives up his place. Nothing ends a thread: once the work has begun, the turn lasts until it is
    done, and what it has made for nobody goes to `give_up`.
    """
    if turns is not None:
        await turns.take(caller)
    working = asyncio.ensure_future(asyncio.to_thread(work))
    if turns is not None:
        working.add_done_callback(lambda _: turns.pass_on())
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        working.add_done_callback(partial(_made_for_nobody, give_up))
        raise


def _made_for_nobody(give_up: Callable[[Made], object], working: "asyncio.Future[Made]") -> None:
    with contextlib.suppress(BaseException):  # whatever it raised, nobody waits for it
        give_up(working.result())


@dataclass
class Lanes:
    """Work of one model that may take seconds, each kind in a lane of its own; what is quick stands in none."""

    formats: Turns = field(default_factory=Turns)
    """Requests whose grammar may be compiled."""
    templates: Turns = field(default_factory=Turns)
    """Conversations for a chat template that came with the model."""
    large: Turns = field(default_factory=Turns)
    """Prompts of large bodies."""
