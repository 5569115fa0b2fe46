"""Ctrl-C and SIGTERM end a training loop after its step, with everything saved; a second one ends it at once."""

import signal
import threading
from types import FrameType, TracebackType

from kogia import log


class GracefulStop:
    """Context manager: `requested` turns True at the first SIGINT or SIGTERM, the second acts as it always does.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        log.info(f"{signal.Signals(number).name}: finishing this step, then saving; once more stops at once")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()
