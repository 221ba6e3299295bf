"""Hostile programs: each is stopped, the next one runs, and nothing is left behind."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from marlhf.common.errors import UserError
from marlhf.rewards import sandbox as sandbox_module
from marlhf.rewards.sandbox import Calls, Check, Limits, Outcome, Sandbox, Script

# generous on the wall, as the machine may be busy; what runs for ever is stopped by its CPU time
LIMITS = Limits(wall_seconds=60, cpu_seconds=1, memory_mb=256, output_mb=1, scratch_mb=2)
HELLO = Script("print('hello')")
INCREMENT = "def f(x): return x + 1"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where this module's sandboxes have their files: others of the machine's are none of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("sandboxes")))
        yield


@pytest.fixture(scope="module")
def sandbox():
    try:
        made = Sandbox(LIMITS, workers=2)
    except UserError as error:
        pytest.skip(f"no namespaces here: {error}")
    with made:
        yield made


@pytest.fixture(scope="module")
def weak_sandbox():
    with pytest.MonkeyPatch.context() as patch:
        without_namespaces(patch)
        made = Sandbox(LIMITS, workers=1, allow_weak=True)
    with made:
        yield made


def without_namespaces(patch: pytest.MonkeyPatch) -> None:
    patched(patch, "def enter_namespaces(_): raise OSError('unshare: not here')")


def patched(patch: pytest.MonkeyPatch, definition: str) -> None:
    """Have servers start with a function of `marlhf.jail.kernel` replaced."""
    name = definition.split("(")[0].removeprefix("def ")
    replace = f"from marlhf.jail import kernel\n{definition}\nkernel.{name} = {name}\n"
    path, rest = sandbox_module._SERVER.split(";", 2)[:2], sandbox_module._SERVER.split(";", 2)[2]
    patch.setattr(sandbox_module, "_SERVER", f"{';'.join(path)}\n{replace}\n{rest.strip()}")


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest):
    """After a test the servers alone are there, and no file is that was not."""
    box = next((b for b in ("sandbox", "weak_sandbox") if b in request.fixturenames), None)
    if box is None:
        yield
        return
    box = request.getfixturevalue(box)
    files, mounts = scratch_files(), mount_points()
    yield
    assert box.run([HELLO])[0].outputs == ("hello\n",)
    assert processes_left(box) == []
    assert scratch_files() == files
    assert mount_points() == mounts


def processes_left(box: Sandbox) -> list[psutil.Process]:
    """The servers' descendants. A job's handler ends a moment after it has answered."""
    deadline = time.monotonic() + 10
    while True:
        servers = [psutil.Process(server._process.pid) for server in box._servers]
        left = [p for server in servers for p in server.children(recursive=True)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


def scratch_files() -> set[str]:
    return {f for f in os.listdir(tempfile.gettempdir()) if f.startswith("marlhf-jail-")}


def mount_points() -> list[str]:
    """But for those in the folders of other sandboxes and of other tests."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines if "/pytest-of-" not in line.split()[4]]
    return [p for p in points if p.startswith(tempfile.gettempdir()) or "marlhf-jail-" not in p]


def run(box: Sandbox, source: str, *stdins: str) -> Outcome:
    return box.run([Script(source, stdins or ("",))])[0]


def denied(outcome: Outcome, error: str = "PermissionError") -> bool:
    return outcome.status == "error" and outcome.detail.startswith(error)


def test_a_program_runs_once_for_each_stdin(sandbox):
    assert run(sandbox, "print(int(input()) + 1)", "1", "41") == Outcome("ok", ("2\n", "42\n"))
    assert run(sandbox, "print(input())", "half a pair: \ud800").outputs == ("half a pair: ?\n",)


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("print(", "syntax", "SyntaxError"),
        ("x = '\0'", "syntax", ""),
        ("(" * 100_000, "syntax", ""),
        ("1 / 0", "error", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "error", ""),
        ("import sys; sys.exit()", "ok", ""),
        ("exit()", "ok", ""),
        ("quit(1)", "error", ""),
        ("import os; print(1, flush=True); os._exit(0)", "ok", ""),
        ("import os; os.abort()", "error", "killed by"),
        ("import ctypes; ctypes.string_at(0)", "error", "killed by SIGSEGV"),
        ("print('\\ud800')", "error", "UnicodeEncodeError"),
        ("import sys; sys.stdin.read(); sys.stdout.close()", "ok", ""),
        ("import sys; sys.stderr.write('x' * 10**7)", "ok", ""),
        ("import numpy", "error", "ModuleNotFoundError"),
    ],
)
def test_how_a_program_ends(sandbox, source, status, detail):
    outcome = run(sandbox, source, "in")
    assert (outcome.status, outcome.detail[: len(detail)]) == (status, detail)


def test_exit_functions_and_threads_end_as_they_would(sandbox):
    source = (
        "import atexit, sys, threading, time\n"
        "atexit.register(lambda: sys.stdout.write('last'))\n"
        "threading.stack_size(1 << 25)\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
    )
    assert run(sandbox, source).outputs == ("thread\nlast",)


def test_runs_of_a_program_share_nothing(sandbox):
    source = "import os; print(os.listdir()); open('x', 'w').write('x')"
    assert run(sandbox, source, "", "").outputs == ("[]\n", "[]\n")


def test_programs_run_at_the_same_time(sandbox):
    """Each sleeps half a second; two workers take them two by two."""
    started = time.monotonic()
    outcomes = sandbox.run([Script("import time; time.sleep(1)")] * 4)
    assert {o.status for o in outcomes} == {"ok"}
    assert time.monotonic() - started < 3.7


def test_an_infinite_loop_ends_at_the_cpu_limit(sandbox):
    assert run(sandbox, "while True: pass").status == "timeout"


def test_a_program_that_waits_ends_at_the_wall_limit():
    with Sandbox(Limits(wall_seconds=0.5), workers=1) as box:
        outcomes = box.run([Script("import time; time.sleep(100)"), Script("input()")])
        assert [o.status for o in outcomes] == ["timeout", "error"]
        forever = "import signal\nwhile True: signal.pause()"
        assert box.run([Calls(forever, "f", ((),))])[0].status == "timeout"
        assert box.run([Check(forever, "f", "def check(f): f()")])[0].status == "timeout"
        assert box.run([HELLO])[0].status == "ok"


def test_a_fork_bomb(sandbox):
    assert denied(run(sandbox, "import os\nwhile True: os.fork()"))
    assert denied(run(sandbox, "import multiprocessing as m; m.Process(target=print).start()"))


def test_a_thread_bomb(sandbox):
    source = (
        "import threading, time\n"
        "threading.stack_size(1 << 16)\n"
        "while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    )
    assert denied(run(sandbox, source), "RuntimeError: can't start new thread")


def test_a_memory_bomb(sandbox):
    assert run(sandbox, "x = bytearray(10**9)").detail == "MemoryError"
    grow = "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 20))"
    assert run(sandbox, grow).status == "error"
    assert run(sandbox, "x = []\nwhile True: x.append(' ' * 10**6 + str(len(x)))").status == "error"


def test_memory_that_limits_do_not_count_is_denied(sandbox):
    assert denied(run(sandbox, "import os; os.memfd_create('x')"))
    shared = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.shmget(0, 1 << 20, 0o1600) == -1\n"
        "print(ctypes.get_errno())\n"
    )
    assert run(sandbox, shared).outputs == ("1\n",)


def test_a_gigabyte_of_output(sandbox):
    outcome = run(sandbox, "for _ in range(1000): print('x' * 10**6)")
    assert (outcome.status, outcome.outputs) == ("output", ())
    silent = "def f():\n    for _ in range(100): print('x' * 10**6)\n    return 1"
    assert sandbox.run([Calls(silent, "f", ((),))])[0].outputs == (1,)


def test_output_is_cut_off_for_good(sandbox):
    """Not even a program that takes no notice of the broken pipe goes on."""
    stubborn = (
        "import os, signal\n"
        "while True:\n"
        "    try: os.write(1, b'x' * 10**6)\n"
        "    except BaseException: pass\n"
    )
    assert run(sandbox, stubborn).status == "output"


def test_signals_to_the_parent_and_to_all(sandbox):
    for target in ("os.getppid()", "-1", "0", str(os.getpid()), "1"):
        assert denied(run(sandbox, f"import os; os.kill({target}, 9)"))
    source = "import os; print(os.getpid(), os.getppid())"
    assert run(sandbox, source).outputs == ("1 0\n",)


def test_the_environment_is_empty(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    assert run(sandbox, "import os; print(dict(os.environ))").outputs == ("{}\n",)
    with Sandbox(LIMITS, workers=1) as box:
        assert run(box, "import os; print(dict(os.environ))").outputs == ("{}\n",)
        assert denied(run(box, "open('/proc/self/environ')"), "FileNotFoundError")


def test_a_background_process(sandbox):
    for start in (
        "import subprocess; subprocess.Popen(['/bin/sleep', '1000'])",
        "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import os; os.system('sleep 1000 &') and exit('refused')",
    ):
        assert run(sandbox, start).status == "error"


def test_sockets(sandbox):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0marlhf-test")
        server.listen()
        for family, address in (("AF_UNIX", "'\\0marlhf-test'"), ("AF_INET", "('127.0.0.1', 80)")):
            source = f"import socket; socket.socket(socket.{family}).connect({address})"
            assert denied(run(sandbox, source))


def test_the_hosts_files_are_out_of_sight(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for path in (secret, __file__, "/etc/passwd", "/proc/self/status", "/sys", "/old/etc"):
        assert denied(run(sandbox, f"import os; os.stat({str(path)!r})"), "FileNotFoundError")
    shown = run(sandbox, "import os; print(*sorted(os.listdir('/dev')))").outputs
    assert shown == ("null random shm urandom zero\n",)
    packages = Path(os.__file__).parent / "site-packages"
    if packages.is_dir():
        assert os.listdir(packages)
        assert run(sandbox, f"import os; print(os.listdir('{packages}'))").outputs == ("[]\n",)


def test_no_writes_outside_scratch(sandbox):
    for path in (
        "/x",
        "/dev/x",
        "/old/x",
        "/usr/lib/x",
        os.path.join(os.path.dirname(os.__file__), "x"),
    ):
        assert denied(run(sandbox, f"open({path!r}, 'w')"), "OSError: [Errno 30] Read-only")
    assert denied(run(sandbox, "import os; os.chmod('/dev/null', 0)"))
    assert os.stat("/dev/null").st_mode & 0o777 == 0o666


def test_scratch_is_small(sandbox):
    big = "f = open('x', 'wb')\nfor _ in range(100): f.write(bytes(10**6)); f.flush()"
    assert run(sandbox, big).status == "error"
    spread = "for i in range(100): open(str(i), 'wb').write(bytes(10**5))"
    assert denied(run(sandbox, spread), "OSError: [Errno 28] No space")
    many = "for i in range(10**5): open(str(i), 'w').close()"
    assert denied(run(sandbox, many), "OSError: [Errno 28] No space")
    bomb = (
        "import io, zipfile\n"
        "data = io.BytesIO()\n"
        "with zipfile.ZipFile(data, 'w', 8) as z: z.writestr('x', bytes(10**7))\n"
        "zipfile.ZipFile(data).extractall()\n"
    )
    assert run(sandbox, bomb).status == "error"


def test_privileges_are_gone_and_cannot_be_had(sandbox):
    source = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "calls = dict(unshare=(0x10000000,), mount=(b'x', b'/tmp', b'tmpfs', 0, 0),\n"
        "             umount2=(b'/tmp', 2), chroot=(b'/tmp',), setuid=(1,),\n"
        "             ptrace=(16, 1, 0, 0), sethostname=(b'x', 1))\n"
        "for name, arguments in calls.items():\n"
        "    print(getattr(libc, name)(*arguments), ctypes.get_errno() in (1, 22))\n"
    )
    assert run(sandbox, source).outputs == ("-1 True\n" * 7,)


def test_open_files_are_closed(sandbox):
    source = (
        "import os\n"
        "for fd in range(3, 10000):\n"
        "    try: print(fd, os.readlink(fd) if 0 else os.fstat(fd).st_mode >> 12)\n"
        "    except OSError: pass\n"
    )
    kinds = {line.split()[1] for line in run(sandbox, source).outputs[0].splitlines()}
    assert kinds <= {"1"}  # pipes, the program's own stdin, stdout and stderr


def test_deep_recursion(sandbox):
    source = "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()"
    assert run(sandbox, source).status in ("error", "timeout")
    assert denied(run(sandbox, "def f(): f()\nf()"), "RecursionError")
    nested = (
        "import sys; sys.setrecursionlimit(10**8); x = []\nfor _ in range(10**6): x = [x]\nrepr(x)"
    )
    assert run(sandbox, nested).status in ("error", "timeout")


def test_limits_cannot_be_raised(sandbox):
    source = "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))"
    assert denied(run(sandbox, source), "ValueError")


def test_a_call_answers_in_the_types_of_json(sandbox):
    source = "def f(x): return (x, {3: (4,)}, 10**20, float('inf'), {1, 2}, iter([]))"
    (value,) = sandbox.run([Calls(source, "f", (([1],),))])[0].outputs
    assert value[:4] == [[1], {"3": [4]}, 10**20, float("inf")]
    assert all(x != x for x in value[4:])


def test_an_answer_made_to_take_long_to_read(sandbox):
    """Every element of the set has the hash 0."""
    source = "def f(): return [i * (2**61 - 1) for i in range(25_000)]"
    slow = source + "\nimport json; _d = json.dumps\njson.dumps = lambda x: _d({'set': x})"
    started = time.monotonic()
    assert len(sandbox.run([Calls(slow, "f", ((),))])[0].outputs) == 1
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "lie",
    [
        "import os\ndef f(x):\n    for fd in range(1, 64):\n"
        "        try: os.write(fd, b'1\\n' * 9)\n        except OSError: pass\n    os._exit(0)",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import json; json.dumps = lambda *_: '{\"set\": 1}'\ndef f(x): return 2",
        "import json; json.dumps = lambda *_: '[' * 10**5\ndef f(x): return 2",
        "def f(x):\n    while True: pass",
        "x = 1",
    ],
)
def test_a_call_that_lies(sandbox, lie):
    """The answer to f(1) is 2; nothing else passes for it."""
    outcome = sandbox.run([Calls(lie, "f", ((1,), (1,)))])[0]
    assert outcome.status != "ok" or outcome.outputs != (2, 2)
    checked = sandbox.run([Check(lie, "f", "def check(f): assert f(1) == 2; assert f(2) == 3")])[0]
    assert checked.status not in ("ok", "syntax")


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (INCREMENT, "ok"),
        ("def f(x): return x + 2", "failed"),
        ("def f(x): return None", "failed"),
        ("def f(x): return 1 / 0", "error"),
        ("def g(x): return x + 1", "error"),
        ("def f(x) return x", "syntax"),
        (
            "class E:\n    __eq__ = __ge__ = __le__ = lambda *_: True\ndef f(x): return E()",
            "failed",
        ),
        ("import builtins; builtins.AssertionError = KeyError\ndef f(x): return 0", "failed"),
    ],
)
def test_a_check(sandbox, source, status):
    test = "def check(f):\n    assert f(1) == 2\n    assert f(x=5) == six()"
    outcome = sandbox.run([Check(source, "f", test, "def six(): return 6")])[0]
    assert outcome.status == status


def test_a_program_cannot_find_its_test_in_memory(sandbox):
    """It looks through every object and every frame; its own source it does find."""
    source = (
        "import gc, sys\n"
        "def f(x):\n"
        "    todo = [*gc.get_objects(), *sys._current_frames().values()]\n"
        "    found, seen = set(), set()\n"
        "    while todo:\n"
        "        one = todo.pop()\n"
        "        if id(one) in seen: continue\n"
        "        seen.add(id(one))\n"
        "        if isinstance(one, str):\n"
        "            found |= {w for w in ('WANTED', 'MARKED') if w + '=' in one}\n"
        "        todo += gc.get_referents(one)\n"
        "    return sorted(found)  # MARKED=\n"
    )
    test = "def check(f):\n    'WANTED='\n    assert f(1) == ['MARKED'], f(1)"
    for _ in range(2):  # nor that of the job before
        assert sandbox.run([Check(source, "f", test)] * 2) == [Outcome("ok")] * 2


def test_a_test_that_is_broken_is_no_fault_of_the_program(sandbox):
    for test in ("def check(f:", "check = 1 / 0", "x = 1"):
        with pytest.raises(RuntimeError, match="the test cannot be run"):
            sandbox.run([Check(INCREMENT, "f", test)])
    assert sandbox.run([HELLO] * 4) == [Outcome("ok", ("hello\n",))] * 4


def test_a_server_that_dies_costs_one_program(sandbox):
    """As when the machine has no memory left."""
    killer = threading.Timer(
        0.7, lambda: [psutil.Process(s._process.pid).kill() for s in sandbox._servers]
    )
    killer.start()
    outcomes = sandbox.run([Script("import time; time.sleep(2)")] * 2)
    assert {o.detail for o in outcomes} == {"its sandbox was killed"}


def test_many_programs_one_after_another(sandbox):
    """Nothing that a program leaves wears the sandbox out."""
    spiteful = Script(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "1 / 0"
    )
    assert {o.status for o in sandbox.run([spiteful, HELLO] * 50)} == {"ok", "error"}


def test_without_the_filter_namespaces_hold(monkeypatch):
    """Each layer on its own: forks run into a limit, and what they leave dies with the jail."""
    patched(monkeypatch, "def deny_system_calls(): pass")
    fork = (
        "import os, sys, time\n"
        "children = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(1000)\n"
        "        children += 1\n"
        "except BlockingIOError: print(children)\n"
    )
    marker = f"{os.getpid()}.5"
    background = f"import subprocess; subprocess.Popen(['/usr/lib/x', '{marker}'])"
    local = "import socket; socket.create_connection(('127.0.0.1', 22), 5)"
    kill = "import os; os.kill(-1, 9); print(1)"
    with Sandbox(LIMITS, workers=1) as box:
        assert box.strong
        outcome = run(box, fork)
        assert outcome.status == "ok"
        assert 1 < int(outcome.outputs[0]) < LIMITS.threads
        assert denied(run(box, background), "FileNotFoundError")
        assert denied(run(box, local), "OSError: [Errno 101] Network is unreachable")
        assert run(box, kill).status == "error"  # no process but itself to kill
        assert processes_left(box) == []


def test_it_refuses_without_namespaces(monkeypatch):
    without_namespaces(monkeypatch)
    with pytest.raises(UserError, match=r"allow_weak_sandbox: given false, .*unshare: not here"):
        Sandbox(LIMITS, workers=1)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("print('fine')", "ok"),
        ("while True: pass", "timeout"),
        ("import os\nwhile True: os.fork()", "error"),
        ("x = bytearray(10**9)", "error"),
        ("while True: print('x' * 10**6)", "output"),
        ("import os; os.kill(os.getppid(), 9)", "error"),
        ("import subprocess; subprocess.Popen(['/bin/sleep', '1000'])", "error"),
        ("import socket; socket.socket()", "error"),
        ("import os; assert not os.environ; open('x', 'w').write('x')", "ok"),
    ],
)
def test_the_weak_sandbox_holds_what_it_promises(weak_sandbox, source, status):
    assert not weak_sandbox.strong
    assert run(weak_sandbox, source).status == status
