"""SIGTERM and Ctrl-C, handled between updates; and a time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from marlhf.common.errors import Stopped, say
from marlhf.common.reports import claim

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# in a process that a plug-in forks: its parent ends it, and outlives the first Ctrl-C
_IN_FORKS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.SIG_IGN}
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
            os.register_at_fork(after_in_child=self._leave_fork)
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
        received = self._gather([self._received])
        return next((number for number in received if number), None)

    def _leave_fork(self) -> None:
        """Handle signals in a forked process as in one that is not a run."""
        for number, handler in _IN_FORKS.items():
            if signal.getsignal(number) == self._hear:
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            line = f"marlhf: {name}: stopping after this update; once more stops at once"
            if claim(line):  # the launcher passes it on to all ranks
                say(line)
        elif time.monotonic() - self._at > _ONE_KEYSTROKE:
            stop(number)


def stop(number: int) -> None:
    """Raise KeyboardInterrupt for SIGINT, else SystemExit with status 128 + number."""
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
