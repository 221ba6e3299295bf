"""A small disk of its own for a test, and what fills it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PAGE = 4096


def mounted(folder: Path, kilobytes: int = 4000) -> bool:
    """Mount a disk of this size; false where the system does not let this process."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    return subprocess.run(words, capture_output=True).returncode == 0


def fill(disk: Path, room: int = 0) -> None:
    """Leave so many bytes, rounded to pages, of a disk."""
    free = os.statvfs(disk).f_bavail * PAGE
    (disk / "filler").write_bytes(bytes(max(0, free - room // PAGE * PAGE)))


def free(disk: Path) -> None:
    """Take back what `fill` wrote."""
    (disk / "filler").unlink(missing_ok=True)
