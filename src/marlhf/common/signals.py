"""SIGTERM and Ctrl-C, heard between two updates; and a limit in time."""

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
_ONE_KEYSTROKE = 1.0  # seconds: a launcher hands on to its ranks what the terminal sent them too


class StopSignals:
    """Within this context the signals wait for `requested`; a second one stops at once.

    gather   the lists of all ranks, one after another: ranks must stop at the same update
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
        """The signal that some rank has received, the same on all ranks; None before."""
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
    """Raise TimeoutError in what is done within, after so long; Python code alone can be stopped,
    and only in the main thread, where signals arrive: elsewhere nothing is limited."""
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
