"""Real servers of vLLM: `vllm serve`, as docs/engines.md says to start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support.tiny_models import byte_tokenizer

FLAGS = (
    *("--enable-scale-out", "--logprobs-mode", "processed_logprobs"),
    *("--weight-transfer-config", '{"backend": "marlhf_tcp"}'),
)
TINY = (
    *("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(10**8)),
    *("--max-model-len", "128", "--load-format", "dummy"),
)


@dataclass(frozen=True)
class VLLMServer:
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        os.killpg(self.process.pid, number)

    def signal_engine(self, number: int) -> None:
        """Send a signal to all but the one that answers requests."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.send_signal(number)


def save_model(lm: Any, folder: Path) -> Path:
    lm.config.architectures = [type(lm).__name__]
    lm.config.save_pretrained(folder)
    byte_tokenizer(add_bos=True).save_pretrained(folder)
    return folder


@contextmanager
def vllm_servers(folder: Path, models: Sequence[Path]) -> Iterator[list[VLLMServer]]:
    """A server for each model, all started at a time."""
    servers = [_start(folder / f"server-{i}", model) for i, model in enumerate(models)]
    try:
        for server in servers:
            _wait(server)
        yield servers
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGKILL)
            server.process.wait()


def _start(folder: Path, model: Path) -> VLLMServer:
    # its command looks itself up as `vllm`, which the build for CPUs is not called
    metadata = folder / "vllm-0.32.0+cpu.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    command = [Path(sys.executable).with_name("vllm"), "serve", model, "--port", port]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", *FLAGS, *TINY],
            env={**os.environ, **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return VLLMServer(f"http://127.0.0.1:{port}", process, log)


def _wait(server: VLLMServer) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no server within 240 s:\n{server.log.read_text()[-4000:]}")
