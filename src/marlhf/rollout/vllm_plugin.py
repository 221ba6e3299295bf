"""What runs inside a vLLM server: a weight-transfer engine over TCP, for CPUs.

vLLM loads `register` in all of its processes (entry-point group `vllm.general_plugins`), and
`vllm serve --weight-transfer-config '{"backend": "marlhf_tcp"}'` selects the engine. The trainer's
side is `vllm_transfer`. This module needs vLLM and torch alone, not the rest of this library.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import weight_transfer  # pyright: ignore[reportMissingImports]
from vllm.distributed.weight_transfer import base  # pyright: ignore[reportMissingImports]
from vllm.model_executor.model_loader import reload  # pyright: ignore[reportMissingImports]

BACKEND = "marlhf_tcp"
_registered: list[str] = []


def register() -> None:
    """Register the engine; called by vLLM, more than once in a process."""
    if BACKEND not in _registered:
        weight_transfer.WeightTransferEngineFactory.register_engine(BACKEND, TCPEngine)
        _registered.append(BACKEND)


@dataclass
class Rendezvous(base.WeightTransferInitInfo):
    """Where the trainer listens.

    token     that every worker sends first, so that nobody else is sent weights
    timeout   seconds without a byte before the trainer counts as gone
    """

    host: str
    port: int
    token: str
    timeout: float


@dataclass
class Tensors(base.WeightTransferUpdateInfo):
    """The tensors that follow on the connection, in this order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class TCPEngine(base.WeightTransferEngine[Rendezvous, Tensors]):
    """Reads tensors from a connection to the trainer, raw and one after the other."""

    init_info_cls = Rendezvous
    update_info_cls = Tensors

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connection: socket.socket | None = None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        """Connect to a trainer, instead of an earlier one."""
        self.shutdown()
        where = init_info.host, init_info.port
        self._connection = socket.create_connection(where, timeout=init_info.timeout)
        self._connection.sendall(init_info.token.encode())

    def start_weight_update(self) -> None:
        """Prepare the layers for weights as they are in files."""
        reload.initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Pack the layers again."""
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive tensors; nothing is asynchronous here."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Tensors) -> None:
        """Read tensors and load them. On a fault the connection is closed: the trainer sees it."""
        assert self._connection is not None, "init_weight_transfer_engine was not called"
        parts = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        try:
            for name, dtype_name, shape in parts:
                dtype = getattr(torch, dtype_name)
                weight = torch.empty(shape, dtype=dtype)
                _read(self._connection, weight)
                self.model.load_weights([(name, weight.to(self.device))])
        except BaseException:
            self.shutdown()
            raise

    def shutdown(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _read(connection: socket.socket, tensor: torch.Tensor) -> None:
    """Fill a tensor with bytes from a connection."""
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the trainer closed the connection")
        view = view[count:]
