"""One request and its answer, as those who watch the server see it: without what was said."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kogia.serve.served import Entry
    from kogia.serve.state import Running


QUICK_BYTES = 2 << 10
"""Of a body: a prompt of that size takes a tenth of a millisecond, and one that is made to be slow one and a half."""


@dataclass(eq=False)
class Exchange:
    id: str
    method: str
    began: float
    """By the server's clock, in seconds."""
    route: str | None = None
    """With names in place of what varies; None where there is no such route."""
    caller: str | None = None
    """Name of the key; None where nobody has been asked for one."""
    status: int | None = None
    """None where the client left before there was one."""
    size: int = 0
    """Bytes of the body."""
    notes: dict[str, str] = field(default_factory=dict)
    """What its answer says in a header: where something is not as was asked."""
    running: list["Running"] = field(default_factory=list)
    """What the engine was given for it."""
    trace: Mapping[str, str] | None = None
    """Headers that name the trace which its client keeps of it, where somebody is told of them."""
    models: list["Entry"] = field(default_factory=list)
    """That it uses: none of them is unloaded before it ends."""

    @property
    def is_quick(self) -> bool:
        """Whether what it asks for first is done at once: to give that to a thread would take as long. What it asks for
        besides, as several prompts do, is not: that may be hundreds."""
        return 0 < self.size <= QUICK_BYTES and not self.running


current: ContextVar[Exchange | None] = ContextVar("current", default=None)
"""That which the running code belongs to."""
