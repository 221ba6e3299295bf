"""The processes of a sandbox end with it, and programs with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from marlhf.rewards.sandbox import Limits, Sandbox, Script


def test_a_sandbox_that_is_closed_leaves_no_process():
    box = Sandbox(workers=2, allow_weak=True)
    servers = [server._process for server in box._servers]
    box.close()
    assert None not in [server.poll() for server in servers]


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_ask_a_job_to_stop_are_for_the_trainer(name):
    """It ends its update first, for which it needs the scores of right programs."""
    sleepy = Script("import time\ntime.sleep(0.5)\nprint(6 * 7)")
    with Sandbox(workers=2, allow_weak=True) as box, ThreadPoolExecutor(1) as pool:
        servers = [psutil.Process(server._process.pid) for server in box._servers]
        assert {os.getpgid(server.pid) for server in servers} & {os.getpgid(0)} == set()
        box.run([sleepy, sleepy])  # so that both have started
        for server in servers:  # idle
            server.send_signal(name)
        outcomes = pool.submit(box.run, [sleepy, sleepy])
        time.sleep(0.2)
        for server in servers:  # busy
            server.send_signal(name)
        assert [outcome.outputs for outcome in outcomes.result()] == [("42\n",)] * 2


def test_a_program_does_not_outlive_its_server():
    source = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(2000)"
    with Sandbox(workers=1, allow_weak=True) as box, ThreadPoolExecutor(1) as pool:
        server = psutil.Process(box._servers[0]._process.pid)
        outcomes = pool.submit(box.run, [Script(source)])
        jails: list[psutil.Process] = []
        while not jails and not outcomes.done():
            with suppress(psutil.NoSuchProcess):  # the handler of the sandbox's trial ends
                jails = [jail for handler in server.children() for jail in handler.children()]
        time.sleep(0.7)  # for the program to start
        server.kill()
        assert outcomes.result()[0].detail == "its sandbox was killed"
        assert psutil.wait_procs(jails, timeout=10)[1] == []


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path):
    """Neither the server nor the program that it runs, with many tests to go."""
    source = (
        "from marlhf.rewards.sandbox import Limits, Sandbox, Script\n"
        "box = Sandbox(Limits(wall_seconds=60), workers=1, allow_weak=True)\n"
        "print('ready', flush=True)\n"
        "box.run([Script('import time; time.sleep(50)', ('',) * 20)])\n"
    )
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        process, started = psutil.Process(trainer.pid), []
        while len(started) < 3:  # server, handler, program
            started = process.children(recursive=True)
        trainer.kill()
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_a_server_ends_with_its_trainer_though_a_child_of_that_lives_on():
    """A worker of a data loader, say, which holds a copy of every open socket."""
    source = (
        "import os, sys, time\n"
        "from marlhf.rewards.sandbox import Sandbox\n"
        "box = Sandbox(workers=1, allow_weak=True)\n"
        "child = os.fork() or time.sleep(600) or os._exit(0)\n"
        "print(child, box._servers[0]._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        child, server = map(psutil.Process, map(int, trainer.stdout.readline().split()))
        trainer.kill()
    try:
        assert psutil.wait_procs([server], timeout=10)[1] == []
    finally:
        child.kill()


def test_what_programs_print_takes_no_memory_that_grows_with_their_tests():
    """The child measures its own peak: 4 MB of one test, and of each of 60."""
    source = (
        "import resource, sys\n"
        "from marlhf.rewards.code import Code\n"
        "code = Code(workers=1, wall_seconds=60, allow_weak_sandbox=True).load()\n"
        "program = \"import sys; sys.stdout.write('\\\\0' * 4_000_000)\"\n"
        "def peak(n):\n"
        "    tests = {'inputs': ['1'] * n, 'outputs': ['1'] * n}\n"
        "    assert code(['?'], [program], input_output=[tests]) == [-0.3]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(2)\n"
        "print(peak(60) - before)\n"
        "code.sandbox.close()\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, check=True)
    grown, child = map(int, done.stdout.split())
    assert grown < 64_000  # kilobytes; kept, the outputs take 240 MB, and six times that as JSON
    assert child < 64_000  # it starts as a copy of this process


def test_what_a_job_keeps_is_bounded():
    """Who keeps every output has an end too."""
    with Sandbox(Limits(output_mb=1), workers=1, allow_weak=True) as box:
        outcome = box.run([Script("print('x' * 900_000)", ("",) * 20)])[0]
        assert outcome.status == "output"
        assert sum(map(len, outcome.outputs)) <= 4 << 20
