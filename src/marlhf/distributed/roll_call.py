"""The ranks of a launch wait for each other, unless one has ended.

A launcher ends all ranks when one fails, but a rank that exits with status 0 is no failure to it,
as where a script makes its trainer on the first rank alone. The others would wait until the timeout
of collectives, which is hours.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import (
    DistNetworkError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    is_initialized,
)

from marlhf.common.errors import ReportedError

_ANSWER = timedelta(seconds=10)  # in which the store must answer
_PERIOD = 2.0  # seconds between looks at the processes of this node
_LAUNCH = ("LOCAL_RANK", "RANK", "MASTER_PORT")  # which launchers set


@contextmanager
def all_ranks_present(world: int, timeout: timedelta) -> Iterator[None]:
    """Context, entered when all ranks do, in which to connect them.

    Raises ReportedError where a rank of this node has ended, and DistNetworkError where the ranks
    do not meet in time.
    """
    store = None
    is_new = world > 1 and not is_initialized()
    if is_new and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        store = _meet(world, time.monotonic() + timeout.total_seconds())
    yield
    del store  # which the first rank may serve


def _meet(world: int, deadline: float) -> TCPStore:
    """The launch's key-value store, once all ranks have joined."""
    rank, store, looks = int(os.environ["RANK"]), None, 0
    next_look = time.monotonic() + _PERIOD
    while True:
        if store is None and (rank == 0 or _is_served()):
            store = _store(is_first=rank == 0)
            store.set(_key(rank), "")
            store.add(_key("count"), 1)
        if store is not None and store.add(_key("count"), 0) >= world:
            return store
        now = time.monotonic()
        if now > deadline:
            raise DistNetworkError(f"still missing: {_absent(store, range(world))}")
        if now > next_look:
            looks, next_look = looks + 1 if _one_has_ended() else 0, now + _PERIOD
        if looks > 1:  # a launcher starts one after the other
            first = rank - int(os.environ["LOCAL_RANK"])
            local = range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))
            raise ReportedError(
                f"ranks: {_absent(store, local)} ended without an error before it connected to the "
                "others; a script must make its trainer, or start its job, on every rank"
            )
        time.sleep(0.1)


def _is_served() -> bool:
    """Whether the store is there; its own attempts to connect are many lines on stderr."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with suppress(OSError), socket.create_connection(address, _ANSWER.total_seconds()):
        return True
    return False


def _store(is_first: bool) -> TCPStore:
    """The key-value store of a launch, which the launcher or else the first rank serves."""
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_first and not is_served,
        timeout=_ANSWER,
        wait_for_workers=False,
        multi_tenant=True,  # torch takes the same server when it connects the ranks
    )


def _key(name: int | str) -> str:
    return f"marlhf/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{name}"


def _absent(store: TCPStore | None, ranks: range) -> str:
    """Those of the ranks that have not joined, in words."""
    absent = [0] if store is None else [r for r in ranks if not store.check([_key(r)])]
    names = [f"rank {r}" for r in absent]
    return names[0] if len(names) == 1 else f"one of {', '.join(names) or 'the ranks'}"


def _one_has_ended() -> bool:
    """Whether this node's launcher has fewer processes than it started; False without `/proc`."""
    launch = _launch_of("self")
    if launch is None or any(os.environ.get(name) != value for name, value in launch.items()):
        return False  # not started by a launcher, but forked
    launcher: int | None = os.getppid()
    while launcher is not None and _launch_of(launcher) == launch:  # a shell around this rank
        launcher = _parent_if_alive(launcher)
    processes = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    alive = [_parent_if_alive(process) for process in processes].count(launcher)
    return launcher is not None and alive < int(os.environ.get("LOCAL_WORLD_SIZE", "0"))


def _launch_of(process: int | str) -> dict[str, str] | None:
    """The variables that a launcher started a process with; None without."""
    try:
        text = Path(f"/proc/{process}/environ").read_text(errors="replace")
    except OSError:
        return None
    values = {name: value for name, _, value in (x.partition("=") for x in text.split("\0"))}
    return {name: values[name] for name in _LAUNCH} if values.keys() >= set(_LAUNCH) else None


def _parent_if_alive(process: int) -> int | None:
    """A process's parent; None once it has ended."""
    with suppress(OSError):
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
        return None if state in "ZX" else int(parent)
    return None
