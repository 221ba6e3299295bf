"""Makes jails, watches them, and says how their programs ended."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import FileIO

from marlhf.jail import kernel, program, scratch

_SCRATCH = "/tmp"
_ERRORS_KEPT = 4096
_CHUNK = 1 << 16
STARTED = program.READY + program.COMPILED  # on stderr of a program that compiles


class FaultError(RuntimeError):
    """The sandbox failed, not the program."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    wall_seconds  per run
    cpu_seconds   of CPU time, per run
    memory_mb     of address space, including about 30 MB of the interpreter
    output_mb     on stdout, per run; stderr is read, and only its beginning is kept
    scratch_mb    of files, which are kept in memory
    threads       at one time
    """

    wall_seconds: float = 20.0
    cpu_seconds: int = 5
    memory_mb: int = 512
    output_mb: int = 4
    scratch_mb: int = 16
    threads: int = 64

    def problem(self) -> str:
        """The first limit out of its range, in words; "" if all are within."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:  # true for NaN too
                return f"{name}: given {value}, must be {least} to {most}"
        return ""


RANGES = {
    "wall_seconds": (0.01, 86_400),
    "cpu_seconds": (1, 86_400),
    "memory_mb": (64, 1 << 20),
    "output_mb": (1, 1 << 10),
    "scratch_mb": (1, 1 << 20),
    "threads": (1, 1 << 15),
}


@dataclass
class Jail:
    """A program's first process, and its stderr as far as it has been read."""

    pid: int
    stderr: int
    scratch: str | None
    strong: bool
    errors: bytearray = field(default_factory=bytearray)
    status: int | None = None
    cpu_seconds: float = 0.0

    def has_ended(self) -> bool:
        """Whether the first process has exited; does not wait for it."""
        return self.status is not None or self._wait(os.WNOHANG)

    def kill(self) -> None:
        """Kill every process in the jail and remove its scratch folder."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._wait(0)
        if not self.strong:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        if self.scratch is not None:
            scratch.remove(self.scratch)  # on failure, a later job tries again

    def _wait(self, options: int) -> bool:
        pid, status, usage = os.wait4(self.pid, options)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return bool(pid)


@dataclass(frozen=True)
class JailRunner:
    """Starts jails, watches them and judges how their programs ended.

    folder   where programs of the weak sandbox have their scratch folders; None: strong sandbox
    """

    limits: Limits
    folder: str | None

    @property
    def strong(self) -> bool:
        """Whether jails have namespaces of their own."""
        return self.folder is None

    def start(self, run: Callable[[int, int, int], None], stdin: FileIO, stdout: FileIO) -> Jail:
        """Fork a jail that calls `run(stdin, stdout, stderr)`; closes these two files here."""
        scratch_folder = None if self.folder is None else tempfile.mkdtemp(dir=self.folder)
        err_read, err_write = os.pipe()
        fds = stdin.fileno(), stdout.fileno(), err_write
        pid = kernel.clone_namespaces() if self.strong else os.fork()
        if pid == 0:
            try:
                self._confine(scratch_folder, fds)
                run(*fds)
            except BaseException as error:
                os.write(err_write, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(1)
        stdin.close()
        stdout.close()
        os.close(err_write)
        return Jail(pid, err_read, scratch_folder, self.strong)

    def _confine(self, scratch_folder: str | None, keep: Iterable[int]) -> None:
        """Confine this process; closes all files but the descriptors in `keep`."""
        os.setsid()
        first = 3
        for fd in sorted(keep):
            os.closerange(first, fd)
            first = fd + 1
        os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        if scratch_folder is None:
            kernel.mount_scratch(_SCRATCH, self.limits.scratch_mb)
        os.chdir(scratch_folder or _SCRATCH)
        self._set_limits()
        if self.strong:
            kernel.drop_capabilities()
        kernel.die_with_parent()
        with contextlib.nullcontext() if self.strong else contextlib.suppress(OSError):
            kernel.deny_system_calls()

    def _set_limits(self) -> None:
        megabyte = 1 << 20
        limits = {
            "RLIMIT_AS": self.limits.memory_mb * megabyte,
            "RLIMIT_CPU": self.limits.cpu_seconds,
            "RLIMIT_FSIZE": self.limits.scratch_mb * megabyte,
            "RLIMIT_STACK": 64 * megabyte,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }
        if self.strong:  # outside a user namespace it would count the user's other processes too
            limits["RLIMIT_NPROC"] = self.limits.threads
        for name, value in limits.items():
            if (kind := getattr(resource, name, None)) is None:
                continue  # macOS lacks some of them, and refuses others
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            with contextlib.nullcontext() if self.strong else contextlib.suppress(ValueError):
                resource.setrlimit(kind, (value, value))

    def watch(
        self,
        jails: list[Jail],
        feed: bytes = b"",
        feed_end: FileIO | None = None,
        out_end: FileIO | None = None,
    ) -> tuple[bytes, str]:
        """Wait until the first jail ends or exceeds a limit, then kill all jails.

        feed: written to `feed_end` as the program reads it.

        Returns the first jail's output and the limit exceeded: "timeout", "output" or "".
        """
        deadline = time.monotonic() + self.limits.wall_seconds
        output, reason = bytearray(), ""
        errors = {jail.stderr: jail.errors for jail in jails}
        with selectors.DefaultSelector() as selector:
            for fd in errors:
                selector.register(fd, selectors.EVENT_READ)
            if out_end is not None:
                selector.register(out_end.fileno(), selectors.EVENT_READ)
            if feed_end is not None:
                os.set_blocking(feed_end.fileno(), False)
                selector.register(feed_end, selectors.EVENT_WRITE)
            rest = memoryview(feed)
            while not jails[0].has_ended() and not reason:
                left = deadline - time.monotonic()
                watched = jails[0].stderr in selector.get_map()
                for key, _ in selector.select(max(0, min(left, 0.05 if watched else 0.001))):
                    if feed_end is not None and key.fileobj is feed_end:
                        rest = _write(selector, feed_end, rest)
                    elif not _read(key.fd, errors.get(key.fd, output), key.fd in errors):
                        selector.unregister(key.fd)
                if len(output) > self.limits.output_mb << 20:
                    reason = "output"
                elif left <= 0:
                    reason = "timeout"
        for jail in jails:
            jail.kill()
        for jail in jails:
            _drain(jail.stderr, jail.errors, keep_all=False)
            os.close(jail.stderr)
        if out_end is not None and not reason:
            _drain(out_end.fileno(), output, keep_all=True)
        return bytes(output), reason

    def judge(self, jail: Jail, reason: str) -> tuple[str, str]:
        """`(status, detail)` of a program that has ended."""
        if not jail.errors.startswith(program.READY) and not reason:
            raise FaultError(jail.errors.decode("utf-8", "replace") or f"exit status {jail.status}")
        if reason:
            return reason, _LIMITS[reason].format(self.limits)
        if not jail.errors.startswith(STARTED):
            return "syntax", last_line(jail.errors)
        if jail.status == -signal.SIGKILL and jail.cpu_seconds > self.limits.cpu_seconds - 0.5:
            return "timeout", f"used more than {self.limits.cpu_seconds} s of CPU time"
        if jail.status == 0:
            return "ok", ""
        if jail.status is not None and jail.status < 0:
            return "error", f"killed by {signal.Signals(-jail.status).name}"
        return "error", last_line(jail.errors)


_LIMITS = {
    "timeout": "ran for more than {0.wall_seconds:g} s",
    "output": "wrote more than {0.output_mb} MB",
}


def _read(fd: int, data: bytearray, bounded: bool) -> bool:
    """Append available bytes to `data`, or drop them beyond the bound; False at the end."""
    chunk = os.read(fd, _CHUNK)
    if not bounded or len(data) < _ERRORS_KEPT:
        data += chunk
    return bool(chunk)


def _drain(fd: int, data: bytearray, keep_all: bool) -> None:
    """Read what is left in a pipe after its writers were killed."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while _read(fd, data, not keep_all):
            pass


def _write(selector: selectors.BaseSelector, pipe: FileIO, rest: memoryview) -> memoryview:
    """Write a part of `rest` to a program's stdin; closes it after the last part."""
    try:
        rest = rest[pipe.write(rest[:_CHUNK]) or 0 :]
    except BrokenPipeError:  # the program closed its stdin
        rest = rest[:0]
    if not rest:
        selector.unregister(pipe)
        pipe.close()
    return rest


@contextlib.contextmanager
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """Context with the two ends of a pipe; closes those still open on exit."""
    read, write = os.pipe()
    with FileIO(read) as reader, FileIO(write, "w") as writer:
        yield reader, writer


def last_line(errors: bytearray) -> str:
    lines = errors.decode("utf-8", "replace").removeprefix("RC").removeprefix("R").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
