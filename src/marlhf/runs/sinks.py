"""Sinks of a run's metrics: JSON lines, TensorBoard, Weights & Biases, and the progress bar.

Each has `write(row)`, `sync()` and `close()`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from marlhf.common.errors import say
from marlhf.runs.json_lines import keep_spans, tidy


class JsonLines:
    """Appends one object per line, unbuffered; numbers that are not finite become null.

    Every method raises OSError, for example on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        line = memoryview((json.dumps(_plain(row), ensure_ascii=False) + "\n").encode())
        while line:
            line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Fsync all rows."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @staticmethod
    def truncate(path: Path, step: int, report: Callable[[str], None]) -> None:
        """Drop every row after `step`, and an incomplete last one; see `json_lines.tidy`."""

        def is_kept(row: dict[str, Any]) -> bool | None:
            row_step = row.get("step")
            if (
                isinstance(row_step, bool)
                or not isinstance(row_step, int | float)
                or row_step != row_step
            ):
                return None
            return row_step <= step

        tidy(path, is_kept, report)


class TensorBoard:
    """Writes every metric as a scalar under its name.

    first_step   events from this step on replace older ones
    """

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        import marlhf.compat.tensorboard  # noqa: F401  so that a missing name fails the start

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row at its `step`."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def sync(self) -> None:
        """No-op: `write` flushes every row."""

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    @staticmethod
    def truncate(folder: Path, step: int) -> None:
        """Drop events after `step`, and incomplete or invalid ones, from every event file.

        An event is a record of the TFRecord format: 8 bytes of length, little-endian, 4 of
        checksum, the message, 4 of checksum.
        """
        from marlhf.compat.tensorboard import event_step

        for file in folder.glob("events.out.tfevents.*"):
            spans, end, size = [], 0, file.stat().st_size
            with file.open("rb") as records:
                while len(head := records.read(12)) == 12:
                    length = int.from_bytes(head[:8], "little")
                    start, end = end, end + length + 16
                    if end > size:
                        break
                    body = records.read(length + 4)
                    event = event_step(body[:length])
                    if event is not None and event <= step:
                        spans.append((start, end))
            keep_spans(file, spans)


class WandB:
    """Logs rows to Weights & Biases."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = wandb.init(project="marlhf", dir=str(folder), config=dict(config))

    def write(self, row: Mapping[str, Any]) -> None:
        """Log a row at its `step`."""
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def sync(self) -> None:
        """No-op: rows are sent as they come."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


# metrics on the progress bar, and their labels there
_LABELS = {
    "score_mean": "score",
    "kl_mean": "kl",
    "loss": "loss",
    "eval_score_mean": "held-out score",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
}


class ProgressBar:
    """A progress bar on stderr; plain lines where there is no terminal.

    Shows updates done, score or loss, and time left.
    """

    def __init__(self, steps: int, resumed_step: int = 0) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._steps, self._resumed_step = steps, resumed_step
        self._progress = Progress(
            TextColumn("update"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(
            "train", total=steps, completed=resumed_step, status=""
        )
        self._progress.start()
        self._began = time.perf_counter()

    def write(self, row: Mapping[str, Any]) -> None:
        """Show the score or the loss of a row, or its held-out metrics."""
        status = "  ".join(
            f"{label} {_short(row[name])}" for name, label in _LABELS.items() if name in row
        )
        if "score_mean" in row or "loss" in row:
            self._progress.update(self._task, completed=row["step"], status=status)
        if not self._console.is_terminal:
            elapsed = time.perf_counter() - self._began
            step, new = row["step"], row["step"] - self._resumed_step
            remaining = f"  {elapsed / new * (self._steps - step):.0f} s left" if new else ""
            say(f"update {step}/{self._steps}  {status}{remaining}")

    def sync(self) -> None:
        """No-op."""

    def close(self) -> None:
        """Remove the bar from the screen."""
        # before rich 15, stopping a bar that is disabled wrote a line
        if not self._progress.disable:
            self._progress.stop()


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
