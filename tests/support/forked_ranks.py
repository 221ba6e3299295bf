"""Ranks in forked children, connected by gloo: no start-up, as the parent has imported all."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState


def two_ranks(work: Callable[[int], str], folder: Path) -> list[str]:
    """What `work(rank)` returns on each of two ranks; see `ranks`."""
    return ranks(2, work, folder)


def ranks(
    count: int, work: Callable[[int], str], folder: Path, zero: Mapping[str, Any] | None = None
) -> list[str]:
    """What `work(rank)` returns on each rank; of an exception, its type and message.

    "none" of a rank that ends within.

    zero   DeepSpeed's `zero_optimization`; None: without DeepSpeed
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if zero is not None:
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
        launched["ACCELERATE_USE_DEEPSPEED"] = "true"
        launched["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(folder / "zero.json")
    files = [folder / f"outcome-{rank}" for rank in range(count)]
    for file in files:  # of an earlier launch
        file.unlink(missing_ok=True)
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            outcome = "none"
            try:
                AcceleratorState._reset_state(True)  # of a launch that the parent has made
                os.environ |= {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                outcome = work(rank)
            except BaseException as error:
                traceback.print_exc()
                outcome = f"{type(error).__name__}: {error}"
            finally:
                files[rank].write_text(outcome)
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [file.read_text() if file.exists() else "none" for file in files]
