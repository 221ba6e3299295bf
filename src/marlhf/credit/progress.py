"""Progress of an audit, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from marlhf.common.errors import printable, say


@contextmanager
def progress(label: str, total: int, is_said: bool = False) -> Iterator[Any]:
    """Show a progress bar on stderr, or the label where there is no terminal.

    is_said   a line of the same has been printed
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        if not is_said:
            say(label)
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(printable(label), total=total)
        yield lambda done: bar.advance(task, done)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a text."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
