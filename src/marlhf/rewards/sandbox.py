"""Running Python programs that nobody has read.

    with Sandbox() as sandbox:
        sandbox.run([Script("print(int(input()) + 1)", ("1", "41"))])    # outputs "2\n", "42\n"

Each program runs in a *jail*: a process of its own, killed with everything it has started when it
ends or reaches a limit. On Linux a jail has

- user, pid, mount, network, IPC, UTS and cgroup namespaces of its own: it sees no process, no
  network interface that is up and no socket of the host, and has no capability and no root;
- a read-only root with Python's standard library, the system's libraries, four device files and a
  small file system in memory for scratch; no /proc, no home, no installed packages;
- an empty environment, and no open file but stdin, stdout and stderr (and the pipes for calls);
- limits on wall time, CPU time, memory, output, scratch, threads and open files (`Limits`);
- a seccomp filter: no new process, no other program, no signal, no socket, no debugging, no memory
  beside what the limit counts. Threads are allowed. The filter exists for x86-64 and arm64.

What a program returned is compared outside its jail, with answers that were never in it.

**What it does not protect from.** A fault in the kernel: a virtual machine is the answer to that.
Programs that share a machine can slow each other down, so that one that is near a time limit may
miss it; the memory they use together may reach workers x (memory_mb + scratch_mb), twice that for
`Check`. Programs can read the clock and the standard and system libraries, learn much about the
machine's hardware, and find out that they are in a sandbox. They can print what they should
have computed: tests with few or guessable answers can be passed without solving the problem.

**Weak sandbox** (`allow_weak=True`, used only where the above is not to be had, as on macOS or in
many containers). There remain a process group that is killed, the limits (but for threads and the
size of scratch in all), an empty environment, closed files, a scratch folder that is removed, and
the filter where the system has it. It does *not* protect from reading or writing any file that this
user may read or write, and, without the filter (macOS), neither from use of the network, from
signals to the user's other processes, the trainer among them, nor from processes that leave the
group and stay behind.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from marlhf.errors import UserError, one_line
from marlhf.jail.program import Opaque, encode
from marlhf.jail.server import Limits, receive, send

Status = Literal["ok", "failed", "syntax", "error", "timeout", "output"]

_SERVER = "import sys; sys.path[0] = sys.argv.pop(1); from marlhf.jail.server import main; main()"
_SOURCE_FOLDER = str(Path(__file__).parents[2])
_GRACE_SECONDS = 60.0  # beyond a job's own limits, before its server is taken for dead


@dataclass(frozen=True)
class Script:
    """A program to run once for each stdin, up to the first run that goes wrong."""

    source: str
    stdins: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Calls:
    """A program whose `function` (or method of its class `Solution`) is called with each of
    `arguments`, plain data, in one process. The code `prelude` gives it names before it runs."""

    source: str
    function: str
    arguments: tuple[tuple[Any, ...], ...]
    prelude: str = ""


@dataclass(frozen=True)
class Check:
    """A program whose `function` is tested by `check(candidate)`, which the code `test` defines.

    The test runs in a jail of its own, after the code `helpers`.
    """

    source: str
    function: str
    test: str
    helpers: str = ""


Job = Script | Calls | Check


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    status   "ok": ran to its end; "failed": its `check` did not hold; "syntax": does not compile;
             "error": an exception, an exit status other than 0, or killed; "timeout": by the wall
             or the CPU; "output": wrote too much
    outputs  `Script`: what each run printed that went well. `Calls`: if "ok", each value as JSON
             would have it (tuples are lists, keys are text), an `Opaque` where it has no such type
    detail   what went wrong, on a line
    """

    status: Status
    outputs: tuple[Any, ...] = ()
    detail: str = ""


class Sandbox:
    """Runs programs, `workers` at a time. The module's docstring says what it protects from.

    workers: default: as many as CPUs, at most 16.
    allow_weak: make do with less where the system has no namespaces to give.
    Raises UserError where it may not, RuntimeError where a sandbox that worked does no longer.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int | None = None,
        allow_weak: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self.workers = workers or min(os.cpu_count() or 1, 16)
        self.strong = True
        self._idle: queue.SimpleQueue[_Server] = queue.SimpleQueue()
        self._servers = [self._first_server(allow_weak)]
        self._servers += [self._server() for _ in range(self.workers - 1)]
        for server in self._servers:
            self._idle.put(server)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run every job; outcomes come in the order of the jobs."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._run, jobs))

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _server(self) -> _Server:
        return _Server(self.limits, self.strong)

    def _first_server(self, allow_weak: bool) -> _Server:
        """A server that has been seen to run a program, weak only where it must and may be."""
        try:
            return self._tried_server()
        except RuntimeError as error:
            if not allow_weak:
                raise UserError(
                    "allow_weak_sandbox: given false, but this system does not let programs be "
                    f"confined ({one_line(error, 120)}); true runs them with less protection"
                ) from error
        self.strong = False
        return self._tried_server()

    def _tried_server(self) -> _Server:
        server = self._server()
        try:
            outcome = server.ask(Script("print(6 * 7)"))
        except (OSError, EOFError) as error:
            raise RuntimeError(f"the server ended: {one_line(error)}") from error
        if outcome != Outcome("ok", ("42\n",)):
            raise RuntimeError(f"a trial program ends with {outcome.status}: {outcome.detail}")
        return server

    def _run(self, job: Job) -> Outcome:
        server = self._idle.get()
        try:
            return server.ask(job)
        except BaseException as error:
            self._servers.remove(server)
            server.close()
            server = self._server()
            self._servers.append(server)
            if not isinstance(error, OSError | EOFError):
                raise
            # the machine's memory ran out, say: the program's fault, as far as anybody can tell
            return Outcome("error", detail="its sandbox was killed")
        finally:
            self._idle.put(server)


class _Server:
    """A process of `marlhf.jail.server` and the socket to it. It ends when the socket closes."""

    def __init__(self, limits: Limits, strong: bool) -> None:
        self.limits = limits
        self._socket, inside = socket.socketpair()
        command = [sys.executable, "-s", "-S", "-c", _SERVER, _SOURCE_FOLDER]
        command += ["strong" if strong else "weak", str(inside.fileno())]
        # a fixed hash seed: sets of strings have one order, and a program one outcome
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with inside:
            self._process = subprocess.Popen(
                [*command, json.dumps(asdict(limits))],
                pass_fds=[inside.fileno()],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer, which ends its update first
            )
        self._socket.settimeout(_GRACE_SECONDS)
        self._greeting = False

    def ask(self, job: Job) -> Outcome:
        """One job's outcome. Raises OSError or EOFError where the server has ended or hangs, and
        RuntimeError where it cannot do the job."""
        if not self._greeting:
            self._answer()
            self._greeting = True
        runs = len(job.stdins) if isinstance(job, Script) else 1
        self._socket.settimeout(runs * self.limits.wall_seconds + _GRACE_SECONDS)
        for message in _messages(job):
            send(self._socket, message)
        answer = self._answer()
        outputs = answer["outputs"]
        if isinstance(job, Calls):
            try:
                outputs = [_as_json(json.loads(line)) for line in outputs[: len(job.arguments)]]
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                return Outcome("error", detail="its answers are no values")
            if answer["status"] == "ok" and len(outputs) < len(job.arguments):
                return Outcome("error", tuple(outputs), "ended before it had answered every call")
        return Outcome(answer["status"], tuple(outputs), answer["detail"])

    def _answer(self) -> dict[str, Any]:
        answer = receive(self._socket)
        if "fault" in answer:
            raise RuntimeError(f"sandbox: {answer['fault']}")
        return answer

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()


def _messages(job: Job) -> list[dict[str, Any]]:
    """A job as the server reads it; tests come apart from the program that they test."""
    if isinstance(job, Script):
        return [{"kind": "script", "source": job.source, "stdins": job.stdins}]
    if isinstance(job, Calls):
        requests = [[encode(list(arguments)), {"dict": []}] for arguments in job.arguments]
        return [
            {
                "kind": "calls",
                "source": job.source,
                "function": job.function,
                "prelude": job.prelude,
                "requests": [{"tuple": request} for request in requests],
            }
        ]
    return [
        {"kind": "check", "source": job.source, "function": job.function},
        {"test": job.test, "helpers": job.helpers},
    ]


def _as_json(value: Any) -> Any:
    """An encoded value in JSON's types.

    It is not decoded: a program could choose keys of a set that all have one hash, and building it
    would take this process very long.
    """
    if isinstance(value, list):
        return [_as_json(x) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return [_as_json(x) for x in content]
    if kind == "dict":
        return {str(_as_json(k)): _as_json(x) for k, x in content}
    return int(content, 16) if kind == "int" else Opaque()
