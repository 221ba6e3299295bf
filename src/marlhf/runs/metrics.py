"""Metrics: collected as sums and counts, reduced over ranks once, written to the sinks."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import AllReduceSum
from marlhf.runs.json_lines import keep_spans, tidy

# Metrics of `marlhf ppo` in addition to reward_NAME_mean, written always or on request.
OWN_NAMES = frozenset(
    """
    step score_mean score_std score_length_correlation kl_mean kl_k3_mean kl_coef objective_mean
    entropy response_length_mean eos_fraction prompt_truncated_fraction macro_length_mean
    macro_count_mean policy_loss value_loss explained_variance advantage_std clip_fraction
    value_clip_fraction approx_kl ratio_max policy_steps skipped_steps ptx_loss grad_norm_policy
    grad_norm_value learning_rate step_seconds generate_seconds score_seconds segment_seconds
    train_seconds tokens_per_second peak_memory_gb eval_score_mean eval_kl_mean
    eval_response_length_mean score_square length_square score_length advantage_mean
    advantage_square
    """.split()
)


class Metrics:
    """Weighted means and maxima of one update, on one rank until `reduce`."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.maxima: dict[str, float] = {}
        self._foreign: list[tuple[str, float, str]] = []

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to a metric's sum and count, whose quotient is its mean."""
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def add_foreign(self, values: Mapping[str, float], source: str) -> None:
        """Add a plug-in's numbers; `reduce` checks that their names are unique."""
        for name, value in values.items():
            self._foreign.append((name, value, source))

    def mean(self, name: str, values: Tensor | None, mask: Tensor | None = None) -> None:
        """Add every value, or those under a mask; None registers a metric without values."""
        if values is None:
            self.add(name, 0.0, 0.0)
            return
        kept = values[mask] if mask is not None else values
        self.add(name, kept.double().sum(), kept.numel())

    def maximum(self, name: str, value: Tensor | float) -> None:
        """Keep the largest value."""
        self.maxima[name] = max(float(value), self.maxima.get(name, -math.inf))

    def include(self, others: Metrics) -> None:
        """Add the sums, counts and maxima of others."""
        for name, (total, count) in others.sums.items():
            self.add(name, total, count)
        for name, value in others.maxima.items():
            self.maximum(name, value)

    def reduce(self, all_reduce: AllReduceSum, gather: Any) -> dict[str, Any]:
        """Name -> mean or maximum over all ranks; None where nothing was counted.

        Raises UserError where a plug-in's metric has a name of this library's, or of another's.
        """
        for name, value, source in self._foreign:
            if name in self.sums or name in self.maxima or name in OWN_NAMES:
                raise UserError(f"{source}: its metric {name!r} has the name of another; rename it")
            self.add(name, value)
        self._foreign = []
        names = sorted({*gather(list(self.sums))})  # a rank without sequences has counted nothing
        sums = [self.sums.get(name, [0.0, 0.0]) for name in names]
        table = torch.tensor(sums, dtype=torch.float64).reshape(-1, 2)
        table = all_reduce(table)
        result: dict[str, Any] = {
            name: total / count if count else None
            for name, (total, count) in zip(names, table.tolist(), strict=True)
        }
        for name, value in gather(list(self.maxima.items())):
            result[name] = max(value, result.get(name, value))
        return result


class Timer:
    """Seconds spent in named phases; a phase may be entered several times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        """Seconds since the timer was created."""
        return time.perf_counter() - self._began


def peak_memory_gb() -> float:
    """Peak memory so far, GB (1e9 bytes): the GPU's, or without one this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


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
    def cut_back(path: Path, step: int, report: Callable[[str], None]) -> None:
        """Drop every row after `step`, and a half-written last one; see `json_lines.tidy`."""

        def is_kept(row: dict[str, Any]) -> bool | None:
            done = row.get("step")
            if isinstance(done, bool) or not isinstance(done, int | float) or done != done:
                return None
            return done <= step

        tidy(path, is_kept, report)


class TensorBoard:
    """Every metric as a scalar under its name; events from `first_step` on replace older ones."""

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

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
    def cut_back(folder: Path, step: int) -> None:
        """Drop events after `step`, and half-written or invalid ones, from every event file.

        An event is a record of the TFRecord format: 8 bytes of length, little-endian, 4 of
        checksum, the message, 4 of checksum.
        """
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        for file in folder.glob("events.out.tfevents.*"):
            kept, end, size = [], 0, file.stat().st_size
            with file.open("rb") as records:
                while len(head := records.read(12)) == 12:
                    length = int.from_bytes(head[:8], "little")
                    start, end = end, end + length + 16
                    if end > size:
                        break
                    body = records.read(length + 4)
                    with suppress(DecodeError):
                        if Event.FromString(body[:length]).step <= step:
                            kept.append((start, end))
            keep_spans(file, kept)


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
_SHOWN = {
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

    def __init__(self, steps: int, done: int = 0) -> None:
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
        self._steps, self._done = steps, done
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
        self._task = self._progress.add_task("train", total=steps, completed=done, status="")
        self._progress.start()
        self._began = time.perf_counter()

    def write(self, row: Mapping[str, Any]) -> None:
        """Show the score or the loss of a row, or its held-out metrics."""
        status = "  ".join(
            f"{label} {_short(row[name])}" for name, label in _SHOWN.items() if name in row
        )
        if "score_mean" in row or "loss" in row:
            self._progress.update(self._task, completed=row["step"], status=status)
        if not self._console.is_terminal:
            elapsed = time.perf_counter() - self._began
            step, here = row["step"], row["step"] - self._done
            left = f"  {elapsed / here * (self._steps - step):.0f} s left" if here else ""
            self._console.print(f"update {step}/{self._steps}  {status}{left}", highlight=False)

    def sync(self) -> None:
        """No-op."""

    def close(self) -> None:
        """Remove the bar from the screen."""
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
