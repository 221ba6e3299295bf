"""A Python that has imported everything: processes fork from it and so start in no time.

`command()` is an executable to use instead of `python`, for launchers too (PYTHON_EXEC). It asks a
server, one per test process, for a fork with its own arguments, environment, folder and standard
streams, passes signals on to that, and ends as that ends. Only importing is left out: the fork is
a process of its own. All forks hash strings alike, which processes started in full do not.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

PRELOADED = (
    "accelerate.commands.launch",
    "deepspeed",
    "marlhf.evaluation.job",
    "marlhf.training.ppo",
    "marlhf.training.reward_model",
    "marlhf.training.sft",
    "tensorboard",
    "torch.distributed.run",
)


@cache
def command() -> str:
    """Start the server of this process; the path of an executable that takes `python`'s words."""
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    errors = folder / "errors"
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", str(folder / "socket")],
        stdin=subprocess.PIPE,  # its end is the server's
        stdout=subprocess.PIPE,
        stderr=errors.open("wb"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert server.stdout is not None
    assert "ready\n" in server.stdout, errors.read_text()  # after what libraries print
    command.server = server  # type: ignore[attr-defined]
    executable = folder / "python"
    source = f"#!{sys.executable} -SE\nSOCKET = {str(folder / 'socket')!r}\n{CLIENT}"
    executable.write_text(source)
    executable.chmod(0o755)
    return str(executable)


CLIENT = """
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(SOCKET)
request = {"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
text = json.dumps(request).encode()
socket.send_fds(connection, [len(text).to_bytes(4, "big")], [0, 1, 2])
connection.sendall(text)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
status = int.from_bytes(connection.recv(4), "big", signed=True)
if status < 0:
    if -status in (signal.SIGINT, signal.SIGTERM):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def serve(path: str) -> dict[str, Any]:
    """Fork for every client. Returns in the forks alone, with what is asked of each."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ, None)
    waiting.register(listener, selectors.EVENT_READ, None)
    print("ready", flush=True)
    pids: dict[socket.socket, int] = {}  # of the forks, by their clients
    descriptors: set[int] = set()  # that say when a fork ends
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                for pid in pids.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                length, streams, _, _ = socket.recv_fds(connection, 4, 3)
                text = connection.makefile("rb").read(int.from_bytes(length, "big"))
                pid = os.fork()
                if pid == 0:
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    for other in [connection, listener, waiting, *pids]:
                        other.close()
                    for ended in descriptors:
                        os.close(ended)
                    return json.loads(text)
                for stream in streams:
                    os.close(stream)
                pids[connection] = pid
                waiting.register(connection, selectors.EVENT_READ, None)
                descriptors.add(ended := os.pidfd_open(pid))
                waiting.register(ended, selectors.EVENT_READ, connection)
            elif key.data is None:  # a client passes a signal on, or is dead
                connection = key.fileobj
                number = connection.recv(1)
                os.kill(pids[connection], number[0] if number else signal.SIGKILL)
                if not number:
                    waiting.unregister(connection)
            else:  # a fork has ended
                connection = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(pids.pop(connection), 0)[1])
                waiting.unregister(key.fileobj)
                descriptors.remove(key.fd)
                os.close(key.fd)
                if connection in waiting.get_map():
                    waiting.unregister(connection)
                    connection.send(status.to_bytes(4, "big", signed=True))
                connection.close()


def become(words: list[str], environment: dict[str, str], folder: str) -> None:
    """Do what `python WORDS` does there."""
    import numpy as np

    np.random.seed()
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    words = [word for word in words if word != "-u"]
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if words[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # imported as a module, it is run anew as the program
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this folder, which only `python FILE` puts there
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # else each fork copies what its collector touches
    become(**serve(sys.argv[2]))
