"""Without namespaces: what the filter and the server still hold back, tried on a victim of ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from marlhf.jail import scratch
from marlhf.rewards import sandbox as sandbox_module
from marlhf.rewards.sandbox import Limits, Outcome, Sandbox, Script

WITHOUT_NAMESPACES = """
import sys
sys.path[0] = sys.argv.pop(1)
from marlhf.jail import kernel
def refuse(_): raise OSError("unshare: not here")
kernel.enter_namespaces = refuse
from marlhf.jail.server import main
main()
"""

if sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"):
    pytest.skip("there is no filter", allow_module_level=True)


@pytest.fixture(scope="module")
def weak() -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_module, "_SERVER", WITHOUT_NAMESPACES)
        limits = Limits(wall_seconds=60, cpu_seconds=3, output_mb=1)
        with Sandbox(limits, workers=1, allow_weak=True) as made:
            assert not made.strong
            yield made


@pytest.fixture(scope="module")
def victim() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def run(box: Sandbox, source: str) -> Outcome:
    return box.run([Script(source)])[0]


@pytest.mark.parametrize(
    "attempt",
    [
        "fcntl.fcntl(r, fcntl.F_SETOWN, v)",
        "fcntl.fcntl(r, 10, 9)  # F_SETSIG",
        "fcntl.fcntl(r, 15, struct.pack('ii', 1, v))  # F_SETOWN_EX",
        "fcntl.ioctl(r, 0x8901, struct.pack('i', v))  # FIOSETOWN",
        "resource.prlimit(v, resource.RLIMIT_CPU, (1, 1))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))",
        "os.setpriority(os.PRIO_PROCESS, v, 19)",
        "os.setpriority(os.PRIO_USER, 0, 19)",
        "os.sched_setaffinity(v, {0})",
        "os.sched_setscheduler(v, os.SCHED_BATCH, os.sched_param(0))",
        "os.sched_setparam(v, os.sched_param(0))",
        "os.kill(v, 9)",
        "os.pidfd_open(v)",
        "call('ptrace', 16, v, 0, 0)",
        "call('process_vm_readv', v, 0, 0, 0, 0, 0)",
        "call('sigqueue', v, 9, 0)",
        "call('inotify_init')",
        "call('timer_create', 0, 0, ctypes.create_string_buffer(8))",
        "call('shmat', 0, 0, 0)",
        "fcntl.flock(open('x', 'w'), fcntl.LOCK_EX)",
        "fcntl.fcntl(r, 1031, 1 << 20)  # F_SETPIPE_SZ",
        "os.mknod('d', 0o20600, os.makedev(1, 3))",
        "datagram().connect(name)",
        "datagram().sendto(b'out', name)",
        "datagram().sendmsg([b'out'], [], 0, name)",
        "datagram().bind(name + 'x')",
    ],
)
def test_other_processes_and_sockets_are_out_of_reach(weak, victim, attempt):
    before = victim.nice(), victim.cpu_affinity(), victim.rlimit(psutil.RLIMIT_CPU)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as host:
        host.bind(f"\0marlhf-{os.getpid()}")
        host.setblocking(False)
        source = (
            "import ctypes, fcntl, os, resource, socket, struct\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "def call(name, *arguments):\n"
            "    ctypes.set_errno(0)\n"
            "    result = ctypes.c_int(getattr(libc, name)(*arguments)).value\n"
            "    if ctypes.get_errno(): raise OSError(ctypes.get_errno(), name)\n"
            "def datagram(): return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]\n"
            f"v, name = {victim.pid}, '\\0marlhf-{os.getpid()}'\n"
            f"r, w = os.pipe()\n{attempt}\n"
        )
        outcome = run(weak, source)
        assert outcome.detail.startswith("PermissionError: [Errno 1]"), outcome
        with pytest.raises(BlockingIOError):
            host.recv(100)
    assert victim.is_running()
    assert (victim.nice(), victim.cpu_affinity(), victim.rlimit(psutil.RLIMIT_CPU)) == before


def test_what_is_a_programs_own_is_left_to_it(weak):
    source = (
        "import os, resource, socket\n"
        "os.nice(1)\n"
        "os.sched_setaffinity(0, os.sched_getaffinity(0))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
        "os.mkfifo('pipe')\n"
        "a, b = socket.socketpair()\n"
        "a.send(b'x')\n"
        "print(b.recv(1), os.isatty(0))\n"
    )
    assert run(weak, source).outputs == ("b'x' False\n",)


def test_folders_deep_long_and_locked_are_removed(weak):
    (folder,) = [server._folder for server in weak._servers]
    for source in (
        "import os\nfor i in range(1500): os.mkdir('d'); os.chdir('d')",
        "import os\nfor i in range(300): os.mkdir('d' * 200); os.chdir('d' * 200)",
        "import os\nos.makedirs('a/b/c'); os.symlink('/etc', 'a/l'); os.chmod('a/b', 0)\n"
        "open('a/f', 'w').close(); os.chmod('.', 0)",
    ):
        assert run(weak, source).status == "ok"
        assert os.listdir(folder) == []


def test_a_folder_that_cannot_be_removed_is_kept_for_later(weak):
    (folder,) = [server._folder for server in weak._servers]
    stays = os.path.join(folder, "stays")
    os.mkdir(stays)
    point = subprocess.run(["mount", "-t", "tmpfs", "none", stays], capture_output=True)
    if point.returncode != 0:
        pytest.skip("no right to mount")
    try:
        assert run(weak, "print(1)").outputs == ("1\n",)
        assert weak.folders_left == 1
    finally:
        subprocess.run(["umount", stays], check=True)
    assert run(weak, "print(1)").outputs == ("1\n",)
    assert weak.folders_left == 0
    assert os.listdir(folder) == []


def test_links_are_removed_and_not_followed(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "link").symlink_to(outside)
    (inside / "link").symlink_to(outside)
    assert scratch.remove(str(inside))
    inside.symlink_to(outside)  # in the place of the folder itself
    assert scratch.remove(str(inside))
    assert [path.name for path in tmp_path.rglob("*")] == ["outside", "kept"]
