"""Lost ranks are recognised and named, and this rank disconnects before it exits."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from marlhf.common.errors import one_line

# messages of gloo and NCCL about a lost rank; gloo's errors have no class of their own
_LOST = re.compile(r"gloo|nccl|connection (closed|reset) by peer|broken pipe", re.IGNORECASE)


_TIMEOUT = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)
_processes: list[tuple[str, int]] = []  # `this_process` of every rank
_minutes = 0.0


def this_process() -> tuple[str, int]:
    """This rank's node and process id."""
    with suppress(OSError):  # ids of processes are per container
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}", os.getpid()
    return socket.gethostname(), os.getpid()


def remember(processes: list[tuple[str, int]], timeout_minutes: float) -> None:
    """Keep `this_process` of every rank, for the messages of `lost_peer`."""
    global _minutes
    _processes[:], _minutes = processes, timeout_minutes


def lost_peer(error: BaseException) -> str | None:
    """A message if an error, or its cause, is a failed collective; else None.

    A collective fails where another rank has exited or timed out; the message names it if it is of
    this node.
    """
    cause: BaseException | None = error
    while cause is not None and not _is_lost_peer(cause):
        cause = cause.__cause__
    if cause is None:
        return None
    others = [r for r, process in enumerate(_processes) if process != this_process()]
    if _TIMEOUT.search(str(cause)):
        name = f"rank {others[0]}" if len(others) == 1 else "another rank"
        return (
            f"{name} did not answer within {_minutes:g} minutes (distributed_timeout_minutes): it "
            "hangs, is stopped, or needs longer"
        )
    deadline = time.monotonic() + 1
    while not (ended := [rank for rank in others if _has_ended(rank)]):
        if time.monotonic() > deadline:
            return one_line(f"another rank has ended, or its connection: {cause}", 300)
        time.sleep(0.02)
    names = ", ".join(f"rank {rank}" for rank in ended)
    return f"{names} ended before the run did; it was killed, or some code called os._exit"


def _is_lost_peer(error: BaseException) -> bool:
    if not torch.distributed.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or bool(_LOST.search(str(error)))


def _has_ended(rank: int) -> bool:
    """Whether a rank's process on this node has ended; False on other nodes."""
    node, process = _processes[rank]
    if node != this_process()[0]:
        return False
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX"  # exited, and not waited for by its launcher yet
    except OSError:
        return Path("/proc/self").exists()


def disconnect(accelerator: Accelerator) -> None:
    """Destroy the process group at exit, and wait until its threads are idle.

    A thread that frees its last tensor during interpreter shutdown cannot take the GIL and aborts
    the process: a complete run would fail.
    """
    accelerator.end_training()
    deadline = time.monotonic() + 5
    time.sleep(0.1)
    while _others_run() and time.monotonic() < deadline:
        time.sleep(0.01)


def _others_run() -> bool:
    """Whether another thread of this process is running or blocked on I/O; False without /proc."""
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # the thread has exited
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state in "RD" and int(task.name) != threading.get_native_id():
                return True
    return False
