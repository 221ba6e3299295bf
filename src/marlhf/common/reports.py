"""Error messages of a launch, each printed by one of its ranks.

The ranks of a node claim messages by creating files in the folder that torchrun and accelerate
make per launch. Without one every rank prints its messages.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from marlhf.common.errors import say

_SKEW = 1.0  # seconds between ranks in which the first one prints an error of all
_PATIENCE = 3.0  # seconds in which a rank that failed prints its error
_REPORTED = "error"  # file that exists once a rank has printed an error


def report(message: str, head: str = "marlhf: ") -> None:
    """Print an error of this rank, unless another of this node has printed it.

    The line names the rank, except the first.
    """
    if int(os.environ.get("LOCAL_RANK") or 0) > 0:
        _wait_for(_file(message), _SKEW)
    if claim(message):
        rank = int(os.environ.get("RANK") or 0)
        say(f"{head}rank {rank}: {message}" if rank > 0 else f"{head}{message}")
        set_reported()


def report_of_peer(message: str, has_ended: bool) -> None:
    """Print another rank's failure, unless a rank of this node prints its own.

    has_ended   that rank prints nothing any more
    """
    is_reported = _wait_for(_file(_REPORTED), 0.0 if has_ended else _PATIENCE)
    if not is_reported and claim("of a peer"):
        say(f"marlhf: {message}")


def set_reported() -> None:
    """Record that the launch's end is explained."""
    if (file := _file(_REPORTED)) is not None:
        with suppress(OSError):
            file.touch()


def claim(message: str) -> bool:
    """Whether this rank is the one of its node that prints a message."""
    try:
        if (file := _file(message)) is not None:
            file.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has gone, or the disk is full
        pass
    return True


def _wait_for(file: Path | None, seconds: float) -> bool:
    """Wait until a file exists; whether it does."""
    if file is None:
        return False
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return file.exists()


def _file(message: str) -> Path | None:
    """The file that claims a message; None without the launcher's folder."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:  # FOLDER/LOCAL_RANK/error.json
        return None
    launch = [os.getppid(), *map(os.environ.get, ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))]
    digest = hashlib.sha256(f"{launch} {message}".encode("utf-8", "surrogatepass")).hexdigest()
    return Path(error_file).parents[1] / f"marlhf-{digest[:16]}"
