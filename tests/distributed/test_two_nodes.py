"""Two launchers that meet over TCP: network namespaces with an address each stand for machines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from support.launches import TIMES, ppo_folder

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
NODES = {"marlhf-0": "10.77.0.1", "marlhf-1": "10.77.0.2"}
CONFIG = REPOSITORY / "configs" / "accelerate" / "multi_node.yaml"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces with a wire between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip`")
    names = list(NODES)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
        for i, (name, address) in enumerate(NODES.items()):
            ip("link", "set", f"wire{i}", "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"wire{i}")
            for device in (f"wire{i}", "lo"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    yield names
    for name in names:
        ip("netns", "delete", name)


def start(nodes: list[str], folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    """One launcher per node, of one process each."""
    launched = []
    for i, name in enumerate(nodes):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(CONFIG), "--num_machines", "2", "--num_processes", "2"]
        command += ["--machine_rank", str(i), "--main_process_ip", NODES[nodes[0]]]
        command += ["--main_process_port", "29511", "-m", "marlhf", "ppo", "my_run.yaml", *words]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": f"wire{i}", "OMP_NUM_THREADS": "1"}
        launched.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
    return launched


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in found]


def test_a_run_over_two_nodes_survives_the_loss_of_one(nodes: list[str], tmp_path: Path) -> None:
    reward = "def score(prompts, completions): return [float(len(c)) for c in completions]\n"
    ppo_folder(tmp_path, reward)
    settings = "steps=5", "checkpoint.every=2"
    whole = start(nodes, tmp_path, *settings, "output_dir=whole")
    assert [process.wait(300) for process in whole] == [0, 0]

    broken = start(nodes, tmp_path, *settings, "output_dir=broken")
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in psutil.Process(broken[1].pid).children(recursive=True):
        process.send_signal(signal.SIGKILL)
    errors = [process.communicate(timeout=240)[1] for process in broken]
    assert all(process.returncode != 0 for process in broken)
    (line,) = [line for line in errors[0].splitlines() if line.startswith("marlhf: ")]
    assert "rank 1" in line

    again = start(nodes, tmp_path, *settings, "output_dir=broken", "resume=auto")
    assert [process.wait(300) for process in again] == [0, 0]
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    found = load_file(tmp_path / "broken" / "final" / "model.safetensors")
    wanted = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    assert all(bool((found[name] == weight).all()) for name, weight in wanted.items())
