"""A chat endpoint on this machine that misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: Any, **usage: int) -> dict[str, Any]:
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return body | ({"usage": usage} if usage else {})


@dataclass
class Answer:
    """What the server sends: a body (objects as JSON), late, cut off, or drop by drop; or it
    hangs up."""

    body: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int = 0
    drops: float = 0.0
    hangs_up: bool = False


def says(text: Any, **usage: int) -> Answer:
    return Answer(completion(text, **usage))


@dataclass
class JudgeServer:
    """`answer(request body, how many requests came before)` decides what each request gets."""

    answer: Callable[[dict[str, Any], int], Answer]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def judge_server(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[JudgeServer]:
    state, lock, active = JudgeServer(answer), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                count = len(state.bodies)
                state.bodies.append(body | {"path": self.path})
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                active[0] += 1
                state.most_at_once = max(state.most_at_once, active[0])
            found = state.answer(body, count)
            time.sleep(found.delay)
            with lock:  # before the answer leaves: with it the client may send its next request
                active[0] -= 1
            with suppress(BrokenPipeError, ConnectionResetError):  # the client has hung up
                self.reply(found)

        def reply(self, answer: Answer) -> None:
            if answer.hangs_up:
                self.close_connection = True
                return
            body = answer.body
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if not answer.headers.get("Content-Length"):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            data = data[: len(data) - answer.cut]
            if not answer.drops:
                self.wfile.write(data)
            for i in range(len(data) if answer.drops else 0):
                self.wfile.write(data[i : i + 1])
                self.wfile.flush()
                time.sleep(answer.drops)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
