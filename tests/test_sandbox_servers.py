"""The processes of a sandbox end with it, and programs with them."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from marlhf.rewards.sandbox import Sandbox, Script


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
