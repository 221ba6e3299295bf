"""Ranks that wait for others, of which one is late, or has ended without a word."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# a launcher of two ranks, the second of them within a shell
LAUNCHER = """
RANK={other} LOCAL_RANK={other} {does} &
RANK={waits} LOCAL_RANK={waits} sh -c '"{python}" script.py; exit $?'
status=$?; wait; exit $status
"""
SCRIPT = """
from datetime import timedelta
from marlhf.distributed import roll_call
roll_call._PERIOD = 0.5
with roll_call.all_ranks_present(2, timedelta(seconds=90)):
    print("present")
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("other", "does"),
    [(0, "true"), (1, "true"), (0, "sh -c 'sleep 2; \"{python}\" script.py'")],
)
def test_a_rank_that_ended_is_named_and_a_late_one_waited_for(
    other: int, does: str, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "script.py").write_text(SCRIPT)
    python = sys.executable
    command = LAUNCHER.format(
        other=other, waits=1 - other, does=does.format(python=python), python=python
    )
    launch = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, **launch},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=80,  # less than ranks wait
    )
    if does != "true":
        assert (done.returncode, done.stdout) == (0, "present\n" * 2), done.stderr
    else:
        assert done.returncode == 1
        assert f"ReportedError: ranks: rank {other} ended without an error before" in done.stderr
