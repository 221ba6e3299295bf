"""Repair of JSONL files after an interrupted write or a careless edit.

Valid lines are kept wherever they stand; invalid ones are moved, never deleted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ByteSpan = tuple[int, int]  # byte offsets in a file: start, end (exclusive)
_BLOCK = 2**22


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """Parse the JSON object on a line; None where there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def tidy(
    path: Path,
    verdict: Callable[[dict[str, Any]], bool | None],
    report: Callable[[str], None],
) -> None:
    """Keep some lines of a file; move those that are no record into `NAME.bad`.

    verdict   of an object: True keeps it, False drops it, None: it is no record
    report    is called with one line about the moved lines

    An incomplete last line is dropped silently. No line is lost if the process is killed at any
    point. Raises OSError.
    """
    if not path.exists():
        return
    good: list[ByteSpan] = []
    bad: list[ByteSpan] = []
    numbers: list[int] = []
    end, is_cut = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            is_cut = not line.endswith(b"\n")
            row = parse_line(line)
            keep = None if row is None else verdict(row)
            if keep:
                good.append((start, end))
            elif keep is None and line.strip() and not is_cut:
                bad.append((start, end))
                numbers.append(number)
    if bad:
        bad_file = path.with_name(f"{path.name}.bad")
        with bad_file.open("ab") as file:
            _copy(path, bad, file)
        report(
            f"{path}: {_counted(numbers)} no record and moved to {bad_file.name}; all others are "
            "kept"
        )
    keep_spans(path, good)
    if is_cut and good and good[-1][1] == end:  # complete except for its line break
        with path.open("ab") as file:
            file.write(b"\n")


def keep_spans(path: Path, spans: Sequence[ByteSpan]) -> None:
    """Keep only these byte ranges of a file, atomically. Raises OSError."""
    joined: list[ByteSpan] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    if not joined or (len(joined) == 1 and joined[0][0] == 0):
        os.truncate(path, joined[0][1] if joined else 0)
        return
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        _copy(path, joined, file)
    os.replace(partial, path)


def _copy(path: Path, spans: Sequence[ByteSpan], file: Any) -> None:
    with path.open("rb") as source:
        for start, end in spans:
            source.seek(start)
            while start < end and (block := source.read(min(_BLOCK, end - start))):
                file.write(block)
                start += len(block)
    file.flush()
    os.fsync(file.fileno())


def _counted(numbers: Sequence[int]) -> str:
    excerpt = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
    return f"line {excerpt} is" if len(numbers) == 1 else f"{len(numbers)} lines ({excerpt}) are"
