"""A small HTTP server with the endpoints of vLLM that the client uses, and no model."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor


def facts_of_a_good_server() -> dict[str, Any]:
    model = {"logprobs_mode": "processed_logprobs", "max_model_len": 64, "model": "/nowhere/lm"}
    return {"model_config": model, "weight_transfer_config": {"backend": "marlhf_tcp"}}


@dataclass
class SmallVLLM:
    """What it does; requests are answered by tokens `seed, seed + 1`, as `asked` records.

    does   `answer`, `hang` without an end, or `die` in the middle of an answer
    """

    address: str = ""
    facts: dict[str, Any] = field(default_factory=facts_of_a_good_server)
    scale_out: bool = True
    does: str = "answer"
    fails: dict[str, str] = field(default_factory=dict)  # path -> message of a status 500
    asked: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    version: str | None = None
    reason: str = "stop"
    released: threading.Event = field(default_factory=threading.Event)
    trainer: socket.socket | None = None

    def get(self, path: str) -> Any:
        if path.startswith("/server_info"):
            return {"vllm_config": self.facts}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/metrics":
            return f'vllm:generation_tokens_total{{engine="0"}} {2.0 * len(self.asked)}\n'
        return None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        self.calls.append(path.removeprefix("/"))
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            where = info["host"], info["port"]
            with socket.create_connection(where) as stranger:
                stranger.sendall(b"?" * len(info["token"]))
            self.trainer = socket.create_connection(where, timeout=10)
            self.trainer.sendall(info["token"].encode())
        if path == "/update_weights":
            self._receive(body["update_info"])
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        return {"success": True}

    def _receive(self, info: dict[str, Any]) -> None:
        assert self.trainer is not None
        rows = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        with self.trainer.makefile("rb") as file:
            for name, dtype_name, shape in rows:
                dtype = getattr(torch, dtype_name)
                data = file.read(math.prod(shape) * dtype.itemsize)
                self.weights[name] = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

    def response(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        seed = body["sampling_params"]["seed"]
        tokens = [seed, seed + 1]
        content = [{"token_id": token, "logprob": -0.5 * token} for token in tokens]
        spans = [{"version": self.version, "start": 0, "end": 2}]
        choice = {"token_ids": tokens, "finish_reason": self.reason, "weight_versions": spans}
        return {"choices": [{**choice, "logprobs": {"content": content}}]}


@contextmanager
def small_vllm(**settings: Any) -> Iterator[SmallVLLM]:
    state = SmallVLLM(**settings)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def do_GET(self) -> None:
            if state.does == "hang" and state.asked:
                state.released.wait(30)
            self._reply(state.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            if self.path in state.fails:
                message = f"Worker failed with error '{state.fails[self.path]}', please look"
                self._reply({"error": {"message": message}}, 500)
            elif self.path != "/inference/v1/generate":
                self._reply(state.post(self.path, body))
            elif not state.scale_out:
                self._reply({}, 403)
            elif not body:
                self._reply({}, 400)
            else:
                reply = state.response(body)
                if state.does == "hang":
                    state.released.wait(30)
                if state.does != "die":
                    self._reply(reply)

        def _reply(self, content: Any, status: int = 200) -> None:
            if content is None:
                status = 404
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            with suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        if state.trainer is not None:
            state.trainer.close()
