"""The trainer's side of vLLM's weight-transfer engines: weights to one server, in buckets.

`marlhf_tcp`   over TCP, from and to CPUs; the server needs this library's plug-in (`vllm_plugin`)
`nccl`         vLLM's own, from GPU to GPU

Every server has a connection, or a group, of its own: one that is lost takes no other with it.
"""

from __future__ import annotations

import importlib
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from marlhf.rollout.vllm_client import Server, ServerError

Named = Sequence[tuple[str, Tensor]]


class Transfer(Protocol):
    """A connection to the workers of one server."""

    def send(self, bucket: Named) -> None:
        """Send tensors, and wait until the server has loaded them. Raises ServerError."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class TCPTransfer:
    """Sends tensors over TCP, to each of a server's workers."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connections: list[socket.socket] = []
        host, token = server.local_address(), secrets.token_hex(16)
        with _listener(host) as listener:
            rendezvous = {"host": host, "port": listener.getsockname()[1], "token": token}
            rendezvous["timeout"] = server.timeout
            joined = server.begin("init_weight_transfer_engine", {"init_info": rendezvous})
            try:
                while len(self._connections) < server.workers:
                    self._accept(listener, token, joined)
                joined.result()
            except BaseException:
                self.close()
                raise

    def _accept(self, listener: socket.socket, token: str, joined: Any) -> None:
        """Take the connection of a worker; any other is closed."""
        deadline = time.monotonic() + self._server.timeout
        listener.settimeout(0.2)
        while time.monotonic() < deadline:
            if joined.done():
                joined.result()  # raises what the server said
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(2.0)
            if _received(connection, len(token)) == token:
                connection.settimeout(self._server.timeout)
                self._connections.append(connection)
                return
            connection.close()
        raise ServerError(self._server.address, "did not connect to the trainer for weights")

    def send(self, bucket: Named) -> None:
        """See `Transfer`."""
        loaded = self._server.begin("update_weights", {"update_info": _described(bucket)})
        try:
            for connection in self._connections:
                for _, tensor in bucket:
                    flat = tensor.detach().cpu().contiguous().reshape(-1)
                    connection.sendall(flat.view(torch.uint8).numpy().data)
        except OSError as error:  # where a worker failed, the server says why
            loaded.result()
            raise ServerError(self._server.address, f"took no weights: {error}") from error
        loaded.result()

    def close(self) -> None:
        """See `Transfer`."""
        while self._connections:
            self._connections.pop().close()


class NCCLTransfer:
    """Broadcasts tensors from this GPU to the workers of a server, by vLLM's engine."""

    def __init__(self, server: Server) -> None:
        self._server = server
        common: Any = importlib.import_module("vllm.distributed.weight_transfer.nccl_common")
        host = server.local_address()
        with _listener(host) as listener:
            port = listener.getsockname()[1]
        group = {"master_address": host, "master_port": port, "world_size": server.workers + 1}
        info = {**group, "rank_offset": 1, "packed": False}
        joined = server.begin("init_weight_transfer_engine", {"init_info": info})
        self._group = common.trainer_init(group)
        joined.result()

    def send(self, bucket: Named) -> None:
        """See `Transfer`."""
        loaded = self._server.begin("update_weights", {"update_info": _described(bucket)})
        on_device = [tensor.cuda() for _, tensor in bucket]  # kept until all are sent
        for tensor in on_device:
            self._group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
        sent = torch.cuda.Event()
        sent.record()
        deadline = time.monotonic() + self._server.timeout
        while not sent.query():  # a synchronisation would wait for a lost server for ever
            if loaded.done():
                loaded.result()
            if time.monotonic() > deadline:
                raise ServerError(self._server.address, "took no weights")
            time.sleep(0.001)
        loaded.result()

    def close(self) -> None:
        """See `Transfer`."""
        self._group.destroy()


TRANSFERS: dict[str, Callable[[Server], Transfer]] = {
    "marlhf_tcp": TCPTransfer,
    "nccl": NCCLTransfer,
}


def _listener(host: str) -> socket.socket:
    """Listens at a free port of one of this machine's addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)


def _described(bucket: Named) -> dict[str, list[Any]]:
    """Names, dtypes and shapes of tensors, as vLLM's engines read them."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def _received(connection: socket.socket, count: int) -> str:
    """The first `count` bytes of a connection, or fewer where it ends or stays silent."""
    data = b""
    try:
        while len(data) < count and (part := connection.recv(count - len(data))):
            data += part
    except OSError:
        return ""
    return data.decode("latin-1")
