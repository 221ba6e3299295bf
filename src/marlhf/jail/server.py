"""Server of the sandbox: confines itself once, then forks a jail for each program.

    python -s -S -c "..." MODE FD LIMITS    started by marlhf.rewards.sandbox

It reads jobs from a socket and answers each with its programs' outputs. Each job has a forked
handler, so that no program's memory holds anything of another job; tests that a program must not
see are read only after that program has been forked.

None of these processes knows the right answers: the handler passes outputs on as they arrive, and
the trainer's process compares them. When that process exits, the server kills all jails and exits.
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
import select
import signal
import socket
import sys
import sysconfig
import time
import traceback
from io import FileIO
from typing import Any

from marlhf.jail import kernel, program, scratch
from marlhf.jail.messages import receive, send, send_output
from marlhf.jail.runner import STARTED, FaultError, JailRunner, Limits, last_line, pipe

# imported by the server, so that programs need not import them
_COMMON = (
    *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools"),
    *("hashlib", "heapq", "io", "itertools", "math", "numbers", "operator", "queue", "random"),
    *("re", "statistics", "string", "threading", "typing", "encodings.idna"),
)


def main() -> None:
    """Serve until the other end of the socket closes; ignores signals that stop the trainer."""
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
        while _another_job(control, parent):
            with pipe() as (alive, held_open):
                handler = os.fork()
                if handler == 0:
                    alive.close()
                    _handle(control, limits, folder)
                held_open.close()
                if _wait(handler, alive, control, parent) != 0:
                    break
    if folder is not None:
        time.sleep(0.1)  # the programs of a handler that was killed have ended
        scratch.remove(folder)


def _wait(handler: int, alive: FileIO, control: socket.socket, parent: int) -> int:
    """Wait for a handler and return its exit status; kills it if the trainer exits.

    alive: a pipe that the handler's exit closes. parent: the trainer's process id.
    """
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(control, 0)  # reports a hang-up: the trainer exited
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
    multiprocessing.set_start_method("fork")  # other methods start a process for a lock
    for name in ("exit", "quit"):  # as `site` does, which -S leaves out
        setattr(builtins, name, sys.exit)
    os.environ.clear()
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # the limit on CPU time bounds long numbers as well
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the kernel's first choice, rather than the trainer
    if strong:
        kernel.enter_namespaces(_python_folders())
    gc.collect()
    gc.freeze()


def _python_folders() -> list[str]:
    """Folders of the standard library and of the libraries installed with this Python."""
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    folders += [os.path.join(sys.base_prefix, name) for name in {"lib", sys.platlibdir}]
    return [os.path.abspath(folder) for folder in folders]


def _another_job(control: socket.socket, parent: int) -> bool:
    """Wait until a handler can read a job; False once the trainer has exited.

    The socket alone does not show that: processes that the trainer forked keep it open.
    """
    while not select.select([control], [], [], 0.5)[0]:
        if os.getppid() != parent:
            return False
    return bool(control.recv(1, socket.MSG_PEEK))


def _handle(control: socket.socket, limits: Limits, folder: str | None) -> None:
    """Do one job, sending each output as it arrives, and exit."""
    try:
        kernel.die_with_parent()
        left = 0 if folder is None else scratch.remove_all(folder)
        runner = JailRunner(limits, folder)
        job = receive(control)
        kinds = {"script": _script, "calls": _calls, "check": _check}
        try:
            status, detail = kinds[job["kind"]](runner, job, control)
            send(control, {"status": status, "detail": detail, "left": left})
        except (FaultError, OSError) as error:
            send(control, {"fault": str(error)})
            os._exit(1)
        os._exit(0)
    except BaseException:
        with contextlib.suppress(BaseException):
            send(control, {"fault": traceback.format_exc()})
        os._exit(1)


def _script(runner: JailRunner, job: dict[str, Any], control: socket.socket) -> tuple[str, str]:
    """Run a program once per stdin, up to the first run that fails."""
    status = detail = ""
    for stdin in job["stdins"]:
        with pipe() as (in_read, in_write), pipe() as (out_read, out_write):
            run = functools.partial(program.run_script, job["source"])
            jail = runner.start(run, in_read, out_write)
            output, reason = runner.watch(
                [jail], stdin.encode(errors="replace"), in_write, out_read
            )
        status, detail = runner.judge(jail, reason)
        if status != "ok":
            break
        send_output(control, output)
    return status, detail


def _calls(runner: JailRunner, job: dict[str, Any], control: socket.socket) -> tuple[str, str]:
    """Call a program's function with each request, in one process."""
    requests = "".join(json.dumps(request) + "\n" for request in job["requests"])
    with pipe() as (in_read, in_write), pipe() as (out_read, out_write):
        names = job["source"], job["function"], job["prelude"]
        run = functools.partial(program.serve_calls, *names)
        jail = runner.start(run, in_read, out_write)
        output, reason = runner.watch([jail], requests.encode(), in_write, out_read)
    status, detail = runner.judge(jail, reason)
    if status == "ok":
        send_output(control, output)
    return status, detail


def _check(runner: JailRunner, job: dict[str, Any], control: socket.socket) -> tuple[str, str]:
    """Run a test in one jail against a program in another."""
    function = job["function"]
    with pipe() as (call_read, call_write), pipe() as (reply_read, reply_write):
        run = functools.partial(program.serve_check, job["source"], function)
        jail = runner.start(run, call_read, reply_write)
        tests = receive(control)  # after the fork: not in the program's memory
        parts = tests["test"], tests["helpers"], function, tests["is_class"]
        check = functools.partial(program.run_check, *parts)
        tester = runner.start(check, reply_read, call_write)
        _, reason = runner.watch([tester, jail])
    if reason:
        return runner.judge(tester, reason)
    if tester.status == program.TESTS_BROKEN or not tester.errors.startswith(STARTED):
        raise FaultError(f"the test cannot be run: {last_line(tester.errors)}")
    statuses = {program.PASSED: "ok", program.FAILED: "failed", program.RAISED: "error"}
    if tester.status in statuses:
        passed = tester.status == program.PASSED
        return statuses[tester.status], "" if passed else last_line(tester.errors)
    status, detail = runner.judge(jail, "")  # the program exited without answering
    return ("error" if status == "ok" else status), detail
