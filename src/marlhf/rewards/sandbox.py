"""Runs untrusted Python programs.

    with Sandbox() as sandbox:
        sandbox.run([Script("print(int(input()) + 1)", ("1", "41"))])    # outputs "2\n", "42\n"

Each program runs in a *jail*: a process of its own, killed with everything it started when
it ends or reaches a limit. On Linux a jail has

- user, pid, mount, network, IPC, UTS and cgroup namespaces of its own: it sees no process, no
  network interface that is up and no socket of the host, and has no capability and no root;
- a read-only root with Python's standard library, the system's libraries, four device files and a
  small in-memory file system for scratch; no /proc, no home, no installed packages;
- an empty environment, and no open files except stdin, stdout and stderr (and the pipes for calls);
- limits on wall time, CPU time, memory, output, scratch, threads and open files (`Limits`);
- a seccomp filter: no new process, no other program, no signal, no socket but a connected pair, no
  debugging, no memory that the limit does not count, no file notifications and no `flock`. Threads
  are allowed. The filter exists for x86-64 and arm64.

Outputs are compared outside the jail, which never contains the expected answers, as they arrive:
this process holds one run's output at a time (see `Script`). The processes of a sandbox end with
the process that created it, however that ends.

**Not protected against.** Kernel bugs: they need a virtual machine. Programs that share a machine
can slow each other down, so that one near a time limit may exceed it; their total memory may reach
workers x (memory_mb + scratch_mb), twice that for `Check`. Programs can read the clock and the
standard and system libraries, put read locks of `fcntl` on them, learn much about the machine's
hardware, and detect the sandbox. They can print answers without computing them: tests with few or
guessable answers can be passed without solving the problem. A test that compares an answer with an
argument that it passed in can be passed by changing that argument.

**Weak sandbox** (`allow_weak=True`, used only where the above is unavailable, as on macOS or in
many containers). *It does not protect any file that this user may read or write, nor whatever
depends on such files.* There remain a process group that is killed, the limits (except those of
threads and of total scratch size), an empty environment, closed files, a scratch folder that is
removed, and, on Linux, the filter, which blocks the network, new processes and, by their arguments
too, calls that signal, limit, slow or read the user's other processes; files by which Linux
accesses a process (/proc/PID/mem) remain. Without the filter (macOS, machines other than x86-64
and arm64) it protects neither against use of the network, against signals to the user's other
processes, the trainer included, nor against processes that leave the group and survive.
"""

from __future__ import annotations

import io
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from marlhf.common.errors import UserError, one_line
from marlhf.jail.messages import receive, receive_output, send
from marlhf.jail.runner import Limits
from marlhf.jail.scratch import remove
from marlhf.jail.values import Opaque, encode

Status = Literal["ok", "failed", "syntax", "error", "timeout", "output"]

_SERVER = "import sys; sys.path[0] = sys.argv.pop(1); from marlhf.jail.server import main; main()"
_SOURCE_FOLDER = str(Path(__file__).parents[2])
KEPT = 4
_LONGEST_WAIT = 2e6  # seconds; systems accept timeouts up to 2^31 milliseconds
_GRACE_SECONDS = 60.0  # beyond a job's own limits, before its server counts as dead


@dataclass(frozen=True)
class Script:
    """A program to run once per stdin, up to the first run that fails.

    keep: maps run number i and its output to the entry of `Outcome.outputs`; default: the output
        itself; over `KEPT` times `output_mb` in all, the program's status is "output".
    """

    source: str
    stdins: tuple[str, ...] = ("",)
    keep: Callable[[int, str], Any] | None = None


@dataclass(frozen=True)
class Calls:
    """A program whose `function` is called with each of `arguments`, in one process.

    The function may be a method of the program's class `Solution`; arguments are plain data. The
    code `prelude` defines names before the program runs.

    keep: maps i and answer number i, a line for `read_answer`, to the entry of `Outcome.outputs`;
        default: its value.
    """

    source: str
    function: str
    arguments: tuple[tuple[Any, ...], ...]
    prelude: str = ""
    keep: Callable[[int, str], Any] | None = None


@dataclass(frozen=True)
class Check:
    """A program whose `function` is tested by `check(candidate)`, defined in the code `test`.

    The test runs in a jail of its own, after the code `helpers`. The function receives copies of
    arguments; its changes to them are copied back. Objects of the program's classes stay in its
    jail, and the test holds proxies. A proxy may not decide whether it is right: its comparisons
    with values of the test, and its methods that receive one, count only with `is_class`, that is,
    where the problem asks for a class (docs/rewards.md has the rules).

    The test may catch the function's exceptions. A program fails whatever the test catches if it
    exits, hangs or does not answer; so does one whose exception is caught by a test that would
    accept any other exception, and some answer, as well.
    """

    source: str
    function: str
    test: str
    helpers: str = ""
    is_class: bool = False


Job = Script | Calls | Check


@dataclass(frozen=True)
class Outcome:
    """Result of running a program.

    status   "ok": ran to its end; "failed": its `check` failed; "syntax": does not compile;
             "error": an exception, an exit status other than 0, or killed; "timeout": of wall or
             CPU time; "output": wrote too much
    outputs  results of `keep`. By default, `Script`: stdout of each run that succeeded. `Calls`: if
             "ok", each value in JSON's types (tuples are lists, keys are text), an `Opaque` where
             JSON has no such type
    detail   the fault, in one line
    """

    status: Status
    outputs: tuple[Any, ...] = ()
    detail: str = ""


class Sandbox:
    """Runs programs, `workers` at a time; the module's docstring lists the protection.

    workers: default: the number of CPUs, at most 16.
    allow_weak: fall back to the weak sandbox where the strong one is unavailable.
    Raises UserError where neither may be used, RuntimeError where a working sandbox breaks.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int | None = None,
        allow_weak: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        if problem := self.limits.problem():
            raise UserError(problem)
        self.workers = workers or min(os.cpu_count() or 1, 16)
        self.strong = True
        self._idle: queue.SimpleQueue[_Server] = queue.SimpleQueue()
        self._servers = [self._first_server(allow_weak)]
        self._servers += [self._server() for _ in range(self.workers - 1)]
        for server in self._servers:
            self._idle.put(server)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run every job; outcomes are in the order of the jobs."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._run, jobs))

    @property
    def folders_left(self) -> int:
        """Number of scratch folders not removed yet; 0 except in the weak sandbox."""
        return sum(server.left for server in self._servers)

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
        """Start and test a server; weak only where necessary and allowed."""
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
            # for example, the machine ran out of memory: taken for the program's fault
            return Outcome("error", detail="its sandbox was killed")
        finally:
            self._idle.put(server)


class _Server:
    """A process of `marlhf.jail.server` and its socket; it ends when the socket closes."""

    def __init__(self, limits: Limits, strong: bool) -> None:
        self.limits = limits
        self._socket, inside = socket.socketpair()
        command = [sys.executable, "-s", "-S", "-c", _SERVER, _SOURCE_FOLDER]
        command += [
            "strong" if strong else "weak",
            str(inside.fileno()),
            json.dumps(asdict(limits)),
        ]
        self._folder = None if strong else tempfile.mkdtemp(prefix="marlhf-jail-")
        self.left = 0  # scratch folders not removed yet
        # a fixed hash seed: the order of sets of strings, and so a program's outcome, is fixed
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with inside:
            self._process = subprocess.Popen(
                command if self._folder is None else [*command, self._folder],
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
        """Run one job.

        Raises OSError or EOFError where the server has ended or hangs, and RuntimeError where it
        cannot do the job.
        """
        if not self._greeting:
            self._answer()
            self._greeting = True
        runs = len(job.stdins) if isinstance(job, Script) else 1
        seconds = runs * self.limits.wall_seconds + _GRACE_SECONDS
        self._socket.settimeout(min(seconds, _LONGEST_WAIT))
        for message in _messages(job):
            send(self._socket, message)
        kept: list[Any] = []
        budget = KEPT * self.limits.output_mb << 20
        problem: tuple[Status, str] | None = None
        while (output := receive_output(self._socket, answer := self._answer())) is not None:
            budget -= len(output)
            if isinstance(job, Script) and job.keep is None and budget < 0:
                problem = "output", f"wrote more than {KEPT} x {self.limits.output_mb} MB in all"
            elif isinstance(job, Script):
                text = output.decode("utf-8", "replace")
                kept.append(text if job.keep is None else job.keep(len(kept), text))
            elif isinstance(job, Calls):
                problem = _keep_answers(job, output, kept)
        self.left = answer.get("left", 0)
        status, detail = problem or (answer["status"], answer["detail"])
        return Outcome(status, tuple(kept), detail)

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
        if self._folder is not None and not remove(self._folder):
            warnings.warn(f"sandbox: cannot remove what is left in {self._folder}", stacklevel=2)


def _keep_answers(job: Calls, output: bytes, kept: list[Any]) -> tuple[Status, str] | None:
    """Append a program's answers to `kept`; return status and detail where they are invalid."""
    lines = io.TextIOWrapper(io.BytesIO(output), "utf-8", "replace", newline="\n")
    try:
        for i, line in zip(range(len(job.arguments)), lines, strict=False):
            kept.append(read_answer(line) if job.keep is None else job.keep(i, line))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        kept.clear()
        return "error", "its answers are not values"
    if len(kept) < len(job.arguments):
        return "error", "ended before it had answered every call"
    return None


def read_answer(line: str) -> Any:
    """Decode an answer of `Calls` into JSON's types.

    Raises ValueError, TypeError or the like where it encodes no value.
    """
    return _as_json(json.loads(line, parse_int=_short_integer))


def _short_integer(digits: str) -> int:
    if len(digits) > 20:  # `encode` writes none, and parsing takes quadratic time
        raise ValueError("a long number")
    return int(digits)


def _messages(job: Job) -> list[dict[str, Any]]:
    """A job as the server's messages; a test is sent apart from the program."""
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
        {"test": job.test, "helpers": job.helpers, "is_class": job.is_class},
    ]


def _as_json(value: Any) -> Any:
    """Convert an encoded value to JSON's types.

    Sets are not rebuilt: a program could choose elements that all have one hash, and building the
    set would take this process very long.
    """
    if isinstance(value, list):
        return [_as_json(x) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return [_as_json(x) for x in content]
    if kind == "dict":
        # the text of a list or mapping can be as long as 2 to the power of its depth
        plain = all(not isinstance(k, list | dict) or "int" in k for k, _ in content)
        return {str(_as_json(k)): _as_json(x) for k, x in content} if plain else Opaque()
    return int(content, 16) if kind == "int" else Opaque()
