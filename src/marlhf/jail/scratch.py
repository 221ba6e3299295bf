"""Removal of scratch folders, however deep, long or locked their contents are."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress


def remove(folder: str, seconds: float = 30.0) -> bool:
    """Remove a folder and its contents; False where that is not possible now.

    Nested folders are moved up to the first level, so that no path is longer than the system
    allows, and nothing recurses. A program may have put a link in the folder's place: it is removed
    and not followed.
    """
    deadline = time.monotonic() + seconds
    prefix, moved = os.urandom(8).hex(), 0
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            os.unlink(folder)
            return True
        os.chmod(folder, 0o700)
        while True:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            for name in names:
                path = os.path.join(folder, name)
                os.chmod(path, 0o700)
                with os.scandir(path) as entries:
                    for inner in entries:
                        if inner.is_dir(follow_symlinks=False):
                            os.chmod(inner.path, 0o700)
                            os.rename(inner.path, os.path.join(folder, f"{prefix}{moved}"))
                            moved += 1
                _unlink_all(path, deadline)
                os.rmdir(path)
            _unlink_all(folder, deadline)
            if not names:
                os.rmdir(folder)
                return True
    except FileNotFoundError:
        return not os.path.lexists(folder)
    except OSError:
        pass
    return False


def _unlink_all(folder: str, deadline: float) -> None:
    """Remove the files of a folder. Raises TimeoutError after the deadline."""
    if time.monotonic() > deadline:
        raise TimeoutError
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            if time.monotonic() > deadline:
                raise TimeoutError


def remove_all(folder: str, seconds: float = 10.0) -> int:
    """Remove the contents of a folder; returns the number of entries left."""
    deadline, left = time.monotonic() + seconds, 0
    with suppress(OSError):
        for name in os.listdir(folder):
            left += not remove(os.path.join(folder, name), deadline - time.monotonic())
    return left
