"""SIGTERM and Ctrl-C, handled between updates; and a time limit."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from marlhf.common.errors import Stopped, say

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_KEYSTROKE = 1.0  # seconds; a launcher forwards signals that the terminal also sent to ranks


class StopSignals:
    """Defers signals within this context until `requested`; a second one stops at once.

    gather   concatenates all ranks' lists: ranks must stop at the same update
    """

    def __init__(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        self._gather = gather
        self._received: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> int | None:
        """The signal that any rank has received, the same on all ranks; None before."""
        return next((number for number in self._gather([self._received]) if number), None)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            line = f"marlhf: {name}: stopping after this update; once more stops at once"
            say(line)
        elif time.monotonic() - self._at > _ONE_KEYSTROKE:
            stop(number)


def stop(number: int) -> None:
    """End as the signal would have: KeyboardInterrupt, or SystemExit with status 128 + number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(128 + number)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the enclosed code after `seconds`.

    Only Python code can be stopped, and only in the main thread, where signals arrive; other
    threads have no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
