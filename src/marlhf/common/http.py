"""An event loop for requests, and the causes of their errors."""

from __future__ import annotations

import asyncio
import functools
import os
import threading


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests, in a thread of its own.

    Requests past their timeout are cancelled there, name resolution included, without a wait.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def root_cause(error: BaseException) -> BaseException | str:
    """The system's error behind those of a client, or the last of them."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    code = error.errno if isinstance(error, OSError) else None
    return os.strerror(code) if code is not None and code > 0 else error
