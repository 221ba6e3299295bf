"""Output folder of a run: resolved config, metrics, samples, TensorBoard events, checkpoints."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from marlhf.common.errors import UserError, say
from marlhf.common.paths import check_kinds, local_path, write_atomically
from marlhf.common.paths import writing as writing_below
from marlhf.config import LogSettings, MetricsSettings
from marlhf.config.loading import config_to_dict
from marlhf.config.yaml_text import dump_yaml
from marlhf.runs import checkpoint
from marlhf.runs.alarms import AlarmSink
from marlhf.runs.checkpoint import Checkpoint
from marlhf.runs.metrics import forget_loading
from marlhf.runs.sinks import JsonLines, ProgressBar, TensorBoard, WandB

_RUN_FILES = (
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard", "checkpoints", "rollouts"),
    *("final", "final.partial", "reward_report.json", "metrics.jsonl.bad", "samples.jsonl.bad"),
)
PATIENCE = 5.0  # seconds that a killed process may take to exit


def run_files(folder: str | Path) -> list[Path]:
    """Paths that a run writes in its folder, and deletes before starting over."""
    return [Path(folder).expanduser() / name for name in _RUN_FILES]


class RunDirectory:
    """Claims `folder` for one run; writes are no-ops except on the main rank.

    resume      None refuses a folder that holds a run; `auto` resumes from its latest complete
                checkpoint, or starts where there is none yet; a path resumes from that checkpoint
    overwrite   starts over, deleting the old run's files and nothing else

    Raises UserError where that is impossible. Nothing is deleted or truncated before `open`, as the
    new run may still be refused.
    """

    def __init__(
        self,
        folder: str | Path,
        overwrite: bool,
        log: MetricsSettings,
        is_main: bool,
        resume: str | None = None,
    ) -> None:
        self.path = local_path(folder, "output_dir")
        self.checkpoint: Checkpoint | None = None
        self._log = log
        self._is_main = is_main
        self._is_new = True
        self._sinks: list[Any] = []
        self._sample_sink: JsonLines | None = None
        self._samples: list[Mapping[str, Any]] = []  # of the current update
        self._signature_at_claim: list[Any] = []
        self._lock_fd: int | None = None
        if not is_main:
            return
        self._signature_at_claim = self._signature()
        self.checkpoint = self._to_resume(overwrite, resume)
        if log.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("log.wandb: needs: pip install 'marlhf[wandb]'")
        if not overwrite:
            check_kinds(run_files(self.path), "output_dir")
        with only_writer(self.path):
            pass

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def _to_resume(self, overwrite: bool, resume: str | None) -> Checkpoint | None:
        """The checkpoint to resume from, None to start a run. Raises UserError."""
        is_used = (self.path / "metrics.jsonl").exists() or checkpoint.steps(self.checkpoints) != []
        if resume == "auto":
            start = checkpoint.latest(self.checkpoints, notice)
            if start is None and (self.path / "final").exists():
                raise UserError(
                    f"resume: {str(self.path)!r} holds a finished run without checkpoints; choose "
                    "another output_dir, or set overwrite=true to delete it"
                )
            return start
        if resume is not None:
            start = checkpoint.read_named(local_path(resume, "resume"), self.checkpoints)
            if is_used and start.path.parent.resolve() != self.checkpoints.resolve():
                raise UserError(
                    f"resume: {resume!r} is not of the run that output_dir {str(self.path)!r} "
                    "already holds; choose another output_dir"
                )
            return start
        if is_used and not overwrite:
            raise UserError(
                f"output_dir: {str(self.path)!r} already holds a run; choose another, or set "
                "resume=auto to continue it, or overwrite=true to delete it"
            )
        return None

    def _signature(self) -> list[Any]:
        """Names and times that change when another run writes in the folder."""
        names = [file.name for file in checkpoint.steps(self.checkpoints)]
        files = (self.path / "metrics.jsonl", self.path / "final")
        times = [file.stat().st_mtime_ns if file.exists() else None for file in files]
        return [*names, *times]

    def open(self, config: Any, steps: int, notes: Sequence[str] = ()) -> None:
        """Write the resolved configuration and open the sinks; after `close`, reopen to append.

        notes   lines about the run, for stderr and the head of config.yaml

        Everything after the checkpoint to resume from is truncated first.
        """
        forget_loading()
        if not self._is_main or self._sinks:
            return
        resumed_step = self.checkpoint.step if self.checkpoint is not None else 0
        first_step = None
        self._lock_fd = _lock(self.path, "output_dir")
        if self._is_new and self._signature() != self._signature_at_claim:
            self.close()
            raise UserError(
                f"output_dir: another process has written in {str(self.path)!r} while this one "
                "was loading; start it again"
            )
        with writing(self.path):
            if self._is_new and self.checkpoint is None:
                self._delete_old()
            elif self._is_new:
                self._truncate(resumed_step)
                first_step = resumed_step + 1
            self._is_new = False
            plain = config_to_dict(config)
            for line in notes:
                notice(line)
            text = "".join(f"# {line}\n" for line in notes) + dump_yaml(plain)
            write_atomically(self.path / "config.yaml", text)
            self._sample_sink = JsonLines(self.path / "samples.jsonl")
            self._sinks.append(JsonLines(self.path / "metrics.jsonl"))
            if self._log.tensorboard:
                self._sinks.append(TensorBoard(self.path / "tensorboard", first_step))
            if self._log.wandb:
                self._sinks.append(WandB(self.path, plain))
            if isinstance(self._log, LogSettings) and self._log.warnings:
                self._sinks.append(AlarmSink(self.path / "metrics.jsonl"))
            if self._log.progress:
                self._sinks.append(ProgressBar(steps, resumed_step))

    def _delete_old(self) -> None:
        for file in run_files(self.path):
            checkpoint.delete(file)

    def _truncate(self, step: int) -> None:
        checkpoint.delete_after(self.checkpoints, step)
        JsonLines.truncate(self.path / "metrics.jsonl", step, notice)
        JsonLines.truncate(self.path / "samples.jsonl", step, notice)
        TensorBoard.truncate(self.path / "tensorboard", step)
        checkpoint.delete_after(self.path / "rollouts", step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Send one row of metrics to every sink, after its samples.

        Raises UserError where it cannot be written.
        """
        with writing(self.path):
            if self._sample_sink is not None:
                for sample in self._samples:
                    self._sample_sink.write(sample)
            self._samples = []
            for sink in self._sinks:
                sink.write(row)

    @contextmanager
    def kept_on_error(self, row: Mapping[str, Any]) -> Iterator[None]:
        """Write a row where the enclosed code raises; the other ranks may be anywhere."""
        try:
            yield
        except BaseException:
            self.write(row)
            raise

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Add a line to samples.jsonl, together with the next row of metrics."""
        if self._sample_sink is not None:
            self._samples.append(sample)

    def sync(self) -> None:
        """Fsync all rows, before a checkpoint is written."""
        with writing(self.path):
            for sink in (self._sample_sink, *self._sinks):
                if sink is not None:
                    sink.sync()

    def publish(self, partial: Path) -> None:
        """Fsync a complete folder `NAME.partial` and rename it to NAME."""
        if self._is_main:
            with writing(self.path):
                checkpoint.replace(partial, partial.with_suffix(""))

    def close(self) -> None:
        """Close all sinks and release the folder."""
        sinks = [sink for sink in (self._sample_sink, *self._sinks) if sink is not None]
        self._sample_sink, self._sinks, self._samples = None, [], []
        for sink in sinks:
            with suppress(OSError):  # a full disk, which `write` has reported
                sink.close()
        if self._lock_fd is not None:
            _unlock(self._lock_fd)
        self._lock_fd = None


def check_no_run(folder: Path, key: str) -> None:
    """Check that a folder holds no training run. Raises UserError, naming `key`."""
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"{key}: {str(folder)!r} holds a training run; choose another")


@contextmanager
def only_writer(folder: Path, key: str = "output_dir") -> Iterator[None]:
    """Create a folder, and lock it against other processes in this context.

    Raises UserError, naming `key`, if it cannot be created or written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise UserError(f"{key}: given {str(folder)!r}, which is a file") from None
    except OSError as error:
        raise UserError(f"{key}: cannot write {str(folder)!r}: {error.strerror}") from None
    lock = _lock(folder, key)
    try:
        yield
    finally:
        _unlock(lock)


_locks: set[int] = set()  # descriptors


def _lock(folder: Path, key: str) -> int:
    """Lock a folder until the returned descriptor is closed or the process exits.

    Raises UserError where another process has it: ranks may outlive their killed launcher.
    Processes that this one forks do not hold the lock: those of a reward may outlive it.
    """
    descriptor, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise UserError(
                f"{key}: another process is writing in {str(folder)!r}; wait for it, or end it"
            )
        time.sleep(0.1)
    _locks.add(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    _locks.discard(descriptor)
    with suppress(OSError):  # a plug-in may have closed it
        os.close(descriptor)


os.register_at_fork(after_in_child=lambda: [_unlock(descriptor) for descriptor in (*_locks,)])


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder without waiting; False if another process has it.

    Processes that inherit the descriptor share the lock. True on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def writing(folder: Path) -> AbstractContextManager[None]:
    """Context of a run's writes under `folder`; see `paths.writing`."""
    advice = "; resume the run from its last checkpoint with resume=auto"
    return writing_below("output_dir", folder, advice)


def notice(line: str) -> None:
    """Print a line about the run on stderr."""
    say(f"marlhf: {line}")
