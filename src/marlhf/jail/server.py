"""A server of jails: it confines itself once, then forks a jail for every program it is sent.

    python -s -S -c "..." MODE FD LIMITS    started by marlhf.rewards.sandbox

It reads jobs from a socket, and answers each with what its programs did. A job has a handler of its
own, forked for it, so that nothing of one job is in the memory of another's programs; tests that a
program must not see are read only after that program has been forked.

None of this knows the right answers: the handler passes on what a program wrote as it comes, and
the trainer's process compares. When that process ends, this one kills what runs and ends too.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from typing import Any

from marlhf.jail import kernel, program, scratch

_SCRATCH = "/tmp"
_ERRORS_KEPT = 4096
_CHUNK = 1 << 16
# imported once, before any program is, so that programs need not
_COMMON = (
    *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools"),
    *("hashlib", "heapq", "io", "itertools", "math", "numbers", "operator", "queue", "random"),
    *("re", "statistics", "string", "threading", "typing", "encodings.idna"),
)


class FaultError(RuntimeError):
    """The sandbox, not the program, does not work."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    wall_seconds  of waiting, for one run of it
    cpu_seconds   of CPU time, for each of its runs
    memory_mb     of address space, the interpreter's own 30 MB or so included
    output_mb     on stdout, for one run of it; stderr is read and mostly thrown away
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
        """What is wrong with the first limit that is out of its range; empty where none is."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:  # nor is NaN
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
    """A program's first process, and what has been read of its stderr."""

    pid: int
    stderr: int
    scratch: str | None
    strong: bool
    errors: bytearray = field(default_factory=bytearray)
    status: int | None = None
    cpu_seconds: float = 0.0

    def has_ended(self) -> bool:
        """Whether the first process has ended, without waiting for it."""
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
            scratch.remove(self.scratch)  # else a later job tries again

    def _wait(self, options: int) -> bool:
        pid, status, usage = os.wait4(self.pid, options)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return bool(pid)


def main() -> None:
    """Serve until the socket's other end is closed, whatever signals ask the job to stop."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    mode, fd, limits = sys.argv[1], int(sys.argv[2]), Limits(**json.loads(sys.argv[3]))
    folder = sys.argv[4] if mode == "weak" else None
    parent = os.getppid()
    del sys.path[0]
    with socket.socket(fileno=fd) as control:
        control.setblocking(True)
        try:
            _prepare(strong=folder is None)
        except Exception as error:
            send(control, {"fault": f"{type(error).__name__}: {error}"})
            return
        send(control, {"ready": True})
        while _another_job(control):
            with _pipe() as (alive, held):
                handler = os.fork()
                if handler == 0:
                    alive.close()
                    _handle(control, limits, folder)
                held.close()
                if _wait(handler, alive, control, parent) != 0:
                    break
    if folder is not None:
        time.sleep(0.1)  # the programs of a handler that was killed have ended
        scratch.remove(folder)


def _wait(handler: int, alive: FileIO, control: socket.socket, parent: int) -> int:
    """A handler's exit status; it is killed when nobody waits for its answer any longer.

    alive: at its end when the handler ends. parent: the process that started this one.
    """
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(control, 0)  # the other end's hanging up, that is, the trainer's end
    while True:
        ready = dict(poll.poll(500))
        if alive.fileno() in ready:
            break
        if ready or os.getppid() != parent:
            os.kill(handler, signal.SIGKILL)
            break
    return os.waitpid(handler, 0)[1]


def _prepare(strong: bool) -> None:
    for name in _COMMON:
        importlib.import_module(name)
    multiprocessing.set_start_method("fork")  # others start a process for a lock of threads
    for name in ("exit", "quit"):  # the work of `site`, which this process goes without
        setattr(builtins, name, sys.exit)
    os.environ.clear()
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # the limit on CPU time bounds long numbers as well
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # rather a program than the trainer
    if strong:
        kernel.enter_namespaces(_python_folders())
    gc.collect()
    gc.freeze()


def _python_folders() -> list[str]:
    """Where the standard library and the libraries that come with this Python are."""
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    folders += [os.path.join(sys.base_prefix, name) for name in {"lib", sys.platlibdir}]
    return [os.path.abspath(folder) for folder in folders]


def _another_job(control: socket.socket) -> bool:
    """Wait for a job, and leave it to the handler to read it."""
    select.select([control], [], [])
    return bool(control.recv(1, socket.MSG_PEEK))


def send(control: socket.socket, message: dict[str, Any]) -> None:
    """Write one message."""
    body = json.dumps(message).encode()
    control.sendall(struct.pack(">I", len(body)) + body)


def receive(control: socket.socket) -> dict[str, Any]:
    """Read one message, and not a byte more. Raises EOFError where the other end is closed."""
    (length,) = struct.unpack(">I", _read_exactly(control, 4))
    return json.loads(_read_exactly(control, length))


def _read_exactly(control: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = control.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def send_output(control: socket.socket, output: bytes) -> None:
    """Write what a program has written, byte for byte."""
    send(control, {"output": len(output)})
    control.sendall(output)


def receive_output(control: socket.socket, message: dict[str, Any]) -> bytes | None:
    """What a program has written, if that is what a message announces."""
    return _read_exactly(control, message["output"]) if "output" in message else None


def _handle(control: socket.socket, limits: Limits, folder: str | None) -> None:
    """Do one job in this process, and end it. Each output goes as it comes, and is forgotten."""
    try:
        kernel.die_with_parent()
        left = 0 if folder is None else scratch.remove_all(folder)
        cell = _Cell(limits, folder)
        job = receive(control)
        kinds = {"script": _script, "calls": _calls, "check": _check}
        try:
            status, detail = kinds[job["kind"]](cell, job, control)
            send(control, {"status": status, "detail": detail, "left": left})
        except (FaultError, OSError) as error:
            send(control, {"fault": str(error)})
            os._exit(1)
        os._exit(0)
    except BaseException:
        with contextlib.suppress(BaseException):
            send(control, {"fault": traceback.format_exc()})
        os._exit(1)


def _script(cell: _Cell, job: dict[str, Any], control: socket.socket) -> tuple[str, str]:
    """Run a program once for every stdin, up to the first run that goes wrong."""
    status = detail = ""
    for stdin in job["stdins"]:
        with _pipe() as (in_read, in_write), _pipe() as (out_read, out_write):
            run = functools.partial(program.run_script, job["source"])
            jail = cell.start(run, in_read, out_write)
            output, reason = cell.watch([jail], stdin.encode(errors="replace"), in_write, out_read)
        status, detail = cell.judge(jail, reason)
        if status != "ok":
            break
        send_output(control, output)
    return status, detail


def _calls(cell: _Cell, job: dict[str, Any], control: socket.socket) -> tuple[str, str]:
    """Have a program's function answer every request, in one process."""
    requests = "".join(json.dumps(request) + "\n" for request in job["requests"])
    with _pipe() as (in_read, in_write), _pipe() as (out_read, out_write):
        names = job["source"], job["function"], job["prelude"]
        run = functools.partial(program.serve_calls, *names)
        jail = cell.start(run, in_read, out_write)
        output, reason = cell.watch([jail], requests.encode(), in_write, out_read)
    status, detail = cell.judge(jail, reason)
    if status == "ok":
        send_output(control, output)
    return status, detail


def _check(cell: _Cell, job: dict[str, Any], control: socket.socket) -> tuple[str, str]:
    """Run a test in one jail against a program in another."""
    function = job["function"]
    with _pipe() as (call_read, call_write), _pipe() as (reply_read, reply_write):
        run = functools.partial(program.serve_check, job["source"], function)
        jail = cell.start(run, call_read, reply_write)
        tests = receive(control)  # only now: the program's memory does not hold them
        check = functools.partial(program.run_check, tests["test"], tests["helpers"], function)
        tester = cell.start(check, reply_read, call_write)
        _, reason = cell.watch([tester, jail])
    if reason:
        return cell.judge(tester, reason)
    if tester.status == program.TESTS_BROKEN or not tester.errors.startswith(_RUNS):
        raise FaultError(f"the test cannot be run: {_last_line(tester.errors)}")
    ended = {program.PASSED: "ok", program.FAILED: "failed", program.RAISED: "error"}
    if tester.status in ended:
        passed = tester.status == program.PASSED
        return ended[tester.status], "" if passed else _last_line(tester.errors)
    status, detail = cell.judge(jail, "")  # the program did not live to answer
    return ("error" if status == "ok" else status), detail


_RUNS = program.READY + program.COMPILED


@dataclass(frozen=True)
class _Cell:
    """Makes jails, and watches over them."""

    limits: Limits
    folder: str | None  # where programs that are confined less have their scratch

    @property
    def strong(self) -> bool:
        """Whether jails have namespaces of their own."""
        return self.folder is None

    def start(self, run: Callable[[int, int, int], None], stdin: FileIO, stdout: FileIO) -> Jail:
        """Fork a jail that calls `run` with three descriptors; the two given become its own."""
        own = None if self.folder is None else tempfile.mkdtemp(dir=self.folder)
        err_read, err_write = os.pipe()
        fds = stdin.fileno(), stdout.fileno(), err_write
        pid = kernel.clone_namespaces() if self.strong else os.fork()
        if pid == 0:
            try:
                self._confine(own, fds)
                run(*fds)
            except BaseException as error:
                os.write(err_write, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(1)
        stdin.close()
        stdout.close()
        os.close(err_write)
        return Jail(pid, err_read, own, self.strong)

    def _confine(self, own: str | None, keep: Iterable[int]) -> None:
        """Turn this process into a jail."""
        os.setsid()
        past = 3
        for fd in sorted(keep):
            os.closerange(past, fd)
            past = fd + 1
        os.closerange(past, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        if own is None:
            kernel.mount_scratch(_SCRATCH, self.limits.scratch_mb)
        os.chdir(own or _SCRATCH)
        self._set_limits()
        if self.strong:
            kernel.drop_capabilities()
        kernel.die_with_parent()
        with contextlib.nullcontext() if self.strong else contextlib.suppress(OSError):
            kernel.deny_system_calls()

    def _set_limits(self) -> None:
        megabyte = 1 << 20
        wanted = {
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
            wanted["RLIMIT_NPROC"] = self.limits.threads
        for name, value in wanted.items():
            if (kind := getattr(resource, name, None)) is None:
                continue  # macOS does not have all of them, and refuses some
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
        """Wait for the first jail to end, then kill all: `(its output, reason for cutting it off)`.

        feed: written to `feed_end` as the program reads. The reason is "timeout", "output" or "".
        """
        deadline = time.monotonic() + self.limits.wall_seconds
        output, reason = bytearray(), ""
        kept = {jail.stderr: jail.errors for jail in jails}
        with selectors.DefaultSelector() as selector:
            for fd in kept:
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
                    elif not _read(key.fd, kept.get(key.fd, output), key.fd in kept):
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
        if not jail.errors.startswith(_RUNS):
            return "syntax", _last_line(jail.errors)
        if jail.status == -signal.SIGKILL and jail.cpu_seconds > self.limits.cpu_seconds - 0.5:
            return "timeout", f"used more than {self.limits.cpu_seconds} s of CPU time"
        if jail.status == 0:
            return "ok", ""
        if jail.status is not None and jail.status < 0:
            return "error", f"killed by {signal.Signals(-jail.status).name}"
        return "error", _last_line(jail.errors)


_LIMITS = {
    "timeout": "ran for more than {0.wall_seconds:g} s",
    "output": "wrote more than {0.output_mb} MB",
}


def _read(fd: int, data: bytearray, bounded: bool) -> bool:
    """Add what can be read to `data`; False at the end of the stream."""
    chunk = os.read(fd, _CHUNK)
    if not bounded or len(data) < _ERRORS_KEPT:
        data += chunk
    return bool(chunk)


def _drain(fd: int, data: bytearray, keep_all: bool) -> None:
    """What is left in a pipe after its writers have been killed."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while _read(fd, data, not keep_all):
            pass


def _write(selector: selectors.BaseSelector, pipe: FileIO, rest: memoryview) -> memoryview:
    """Write what the program takes of its stdin; closes it when all is written or it is closed."""
    try:
        rest = rest[pipe.write(rest[:_CHUNK]) or 0 :]
    except BrokenPipeError:
        rest = rest[:0]
    if not rest:
        selector.unregister(pipe)
        pipe.close()
    return rest


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """A pipe's two ends; closed at the end where they are not yet."""
    read, write = os.pipe()
    with FileIO(read) as reader, FileIO(write, "w") as writer:
        yield reader, writer


def _last_line(errors: bytearray) -> str:
    lines = errors.decode("utf-8", "replace").removeprefix("RC").removeprefix("R").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
