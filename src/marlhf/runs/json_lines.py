"""Repairs JSONL files that an interrupted writer or a careless editor left.

Good lines are kept wherever they stand, and nothing is thrown away that is not understood.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Span = tuple[int, int]  # byte offsets in a file: start, end (exclusive)
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
    """Keep the wanted lines of a file; move those that are no record into `NAME.bad`.

    verdict   of an object: True keeps it, False drops it, None says that it is no record
    report    is called with one line about what was moved

    A last line that was cut off while being written is dropped silently. Whatever kills the
    process in between, no line is lost. Raises OSError.
    """
    if not path.exists():
        return
    kept: list[Span] = []
    bad: list[Span] = []
    numbers: list[int] = []
    end, is_cut = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            is_cut = not line.endswith(b"\n")
            row = parse_line(line)
            keep = None if row is None else verdict(row)
            if keep:
                kept.append((start, end))
            elif keep is None and line.strip() and not is_cut:
                bad.append((start, end))
                numbers.append(number)
    if bad:
        beside = path.with_name(f"{path.name}.bad")
        with beside.open("ab") as file:
            _copy(path, bad, file)
        report(
            f"{path}: {_counted(numbers)} no record and moved to {beside.name}; all others are kept"
        )
    keep_spans(path, kept)
    if is_cut and kept and kept[-1][1] == end:  # complete but for its line break
        with path.open("ab") as file:
            file.write(b"\n")


def keep_spans(path: Path, spans: Sequence[Span]) -> None:
    """Keep only these byte ranges of a file, atomically. Raises OSError."""
    joined: list[Span] = []
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


def _copy(path: Path, spans: Sequence[Span], file: Any) -> None:
    with path.open("rb") as source:
        for start, end in spans:
            source.seek(start)
            while start < end and (block := source.read(min(_BLOCK, end - start))):
                file.write(block)
                start += len(block)
    file.flush()
    os.fsync(file.fileno())


def _counted(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
    return f"line {shown} is" if len(numbers) == 1 else f"{len(numbers)} lines ({shown}) are"
