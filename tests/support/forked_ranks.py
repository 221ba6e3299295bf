"""Two ranks in forked children, connected by gloo: no start-up, as the parent has imported all."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState


def two_ranks(work: Callable[[int], str], folder: Path) -> list[str]:
    """What `work(rank)` returns on each of two ranks; of an exception, its type and message.

    "none" of a rank that ends within.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                AcceleratorState._reset_state(True)  # of a launch that the parent has made
                os.environ |= {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                outcome = work(rank)
            except BaseException as error:
                traceback.print_exc()
                outcome = f"{type(error).__name__}: {error}"
            finally:
                (folder / f"outcome-{rank}").write_text(outcome)
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    files = [folder / f"outcome-{rank}" for rank in range(2)]
    return [file.read_text() if file.exists() else "none" for file in files]
