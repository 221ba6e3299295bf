"""Messages between the trainer's process and a server: framed JSON, and programs' raw output."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any


def send(control: socket.socket, message: dict[str, Any]) -> None:
    """Send one message."""
    body = json.dumps(message).encode()
    control.sendall(struct.pack(">I", len(body)) + body)


def receive(control: socket.socket) -> dict[str, Any]:
    """Read exactly one message. Raises EOFError if the other end is closed."""
    (length,) = struct.unpack(">I", _read_exactly(control, 4))
    return json.loads(_read_exactly(control, length))


def _read_exactly(control: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = control.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def send_output(control: socket.socket, output: bytes) -> None:
    """Send a program's output, byte for byte."""
    send(control, {"output": len(output)})
    control.sendall(output)


def receive_output(control: socket.socket, message: dict[str, Any]) -> bytes | None:
    """A program's output if `message` announces one, else None."""
    return _read_exactly(control, message["output"]) if "output" in message else None
