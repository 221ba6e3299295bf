"""A client of one vLLM server: samples, state, and control of its weights."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import httpx

from marlhf.common.errors import ReportedError, UserError, one_line, short_repr
from marlhf.common.http import event_loop, root_cause
from marlhf.rollout.vllm_sampling import Sampled

_START = 'VLLM_SERVER_DEV_MODE=1 vllm serve ... (docs/engines.md, "Servers")'
_CONTROL = 15.0  # seconds for an answer that needs no work
_IN_FLIGHT = 256  # requests at a time, each with a connection; vLLM queues what it cannot run
_COUNTERS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? (\S+)$", re.M)


class ServerError(ReportedError):
    """A server that is lost to the run; `fault` without its address."""

    def __init__(self, address: str, fault: str) -> None:
        super().__init__(f"rollout.engine: the server {address} {fault}")
        self.address, self.fault = address, fault


class Server:
    """A vLLM server, asked by a background thread; methods that wait say so.

    address   of its HTTP interface
    timeout   seconds without progress before it counts as lost
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.address, self.timeout = address, timeout
        self.workers = 1
        self.backend = ""
        self._client = httpx.AsyncClient(
            base_url=address,
            timeout=None,  # every request has a bound of its own
            trust_env=False,  # servers are neighbours: no proxy
            # a kept connection may be closed by the server just as it is used again
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    # -- state -----------------------------------------------------------------------------------

    def config(self) -> Mapping[str, Any]:
        """The server's configuration, checked for what a run needs; waits. Raises ServerError."""
        info = _read_json(
            self.wait(self._send("GET", "/server_info?config_format=json", seconds=60.0))
        )
        config = info.get("vllm_config") if isinstance(info, dict) else None
        if not isinstance(config, dict):
            raise ServerError(self.address, f"is none of vLLM in development mode: start {_START}")
        missing = []
        if config["model_config"].get("logprobs_mode") != "processed_logprobs":
            missing.append("--logprobs-mode processed_logprobs")
        if self.wait(self._status("POST", "/inference/v1/generate")) in (403, 404):
            missing.append("--enable-scale-out")
        if self.wait(self._progress()) is None:
            missing.append("its log of statistics (no --disable-log-stats)")
        transfer = config.get("weight_transfer_config")
        if transfer is None:
            missing.append("""--weight-transfer-config '{"backend": "nccl"}' (CPUs: marlhf_tcp)""")
        if transfer is None or missing:
            raise ServerError(self.address, f"was started without {', '.join(missing)}: {_START}")
        self.backend = str(transfer["backend"])
        self.workers = int(
            _read_json(self.wait(self._send("GET", "/get_world_size")))["world_size"]
        )
        return config

    def local_address(self) -> str:
        """This machine's address on the way to the server."""
        parts = urlsplit(self.address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((parts.hostname or "", port), _CONTROL) as connection:
                return connection.getsockname()[0]
        except OSError as error:
            raise ServerError(self.address, f"does not answer ({root_cause(error)})") from error

    # -- weights ---------------------------------------------------------------------------------

    def begin(self, call: str, body: Mapping[str, Any] | None = None) -> Future[bytes]:
        """Send a control call; its result comes later, or is a ServerError."""
        return asyncio.run_coroutine_threadsafe(
            self._send("POST", f"/{call}", body, self.timeout), event_loop()
        )

    def begin_update(self) -> None:
        """Prepare for new weights, also after an update that was broken off; waits."""
        try:
            self.begin("start_weight_update").result()
        except ServerError as error:
            if "already" not in error.fault:
                raise
            self.begin("finish_weight_update").result()
            self.begin("start_weight_update").result()

    def finish_update(self, version: str) -> None:
        """Use the weights, under a name, and forget what was computed with others; waits."""
        self.begin("finish_weight_update", {"weight_version": version}).result()
        deadline = time.monotonic() + _CONTROL  # what a run that ended has asked for is given up
        while not _read_json(self.begin("reset_prefix_cache").result()).get("success"):
            if time.monotonic() > deadline:
                raise ServerError(self.address, "answers others as well, and may not meanwhile")
            time.sleep(0.1)

    def close(self) -> None:
        """Release its connection to the trainer, if it answers."""
        try:
            self.wait(self._send("POST", "/shutdown_weight_transfer_engine"))
        except ServerError:
            return

    # -- samples ---------------------------------------------------------------------------------

    async def sample_all(
        self, requests: Mapping[int, Mapping[str, Any]], done: Callable[[int, Sampled], None]
    ) -> None:
        """Answer requests, each by `done` as soon as it is there. Raises ServerError.

        The first fault ends all, and so does a server that computes no token for `timeout` seconds.
        """
        slots = asyncio.Semaphore(_IN_FLIGHT)
        answered = 0

        async def answer(key: int, body: Mapping[str, Any]) -> None:
            nonlocal answered
            async with slots:
                data = await self._send("POST", "/inference/v1/generate", body, None)
            done(key, self._parsed(data))
            answered += 1

        work = asyncio.gather(*(answer(key, body) for key, body in requests.items()))
        watch = asyncio.ensure_future(self._watch(lambda: answered))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            (work if work.done() else watch).result()
        finally:
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _watch(self, answered: Callable[[], int]) -> None:
        """Raise ServerError once nothing has moved for `timeout` seconds."""
        last, since = None, time.monotonic()
        while True:
            await asyncio.sleep(min(5.0, self.timeout / 4))
            state = await self._progress(), answered()
            if state[0] is not None and state != last:
                last, since = state, time.monotonic()
            elif time.monotonic() - since >= self.timeout:
                raise ServerError(
                    self.address, f"hangs: no token within timeout_seconds={self.timeout:g}"
                )

    async def _progress(self) -> float | None:
        """Tokens that the server has computed since its start; None where it does not say."""
        try:
            data = await self._send("GET", "/metrics", seconds=min(_CONTROL, self.timeout))
        except ServerError:
            return None
        counters = _COUNTERS.findall(data)
        return sum(map(float, counters)) if counters else None

    def _parsed(self, data: bytes) -> Sampled:
        """A response. Raises ServerError where it is none."""
        answer = _read_json(data)
        try:
            (choice,) = answer["choices"]
            tokens, reason = list(choice["token_ids"]), choice["finish_reason"]
            logprobs = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
            versions = {str(span["version"]) for span in choice["weight_versions"] or ()}
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(self.address, f"sent no response: {one_line(data)}") from error
        if reason not in ("stop", "length") or len(tokens) != len(logprobs):
            raise ServerError(self.address, f"broke a response off (finish_reason {reason})")
        return Sampled(tokens, logprobs, reason == "stop", versions)

    # -- requests --------------------------------------------------------------------------------

    def wait(self, work: Any) -> Any:
        """Run a request and return its result."""
        return asyncio.run_coroutine_threadsafe(work, event_loop()).result()

    async def _status(self, method: str, path: str) -> int:
        """Status of an empty request."""
        try:
            await self._send(method, path, {}, _CONTROL)
        except _StatusError as error:
            return error.status
        return 200

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float | None = _CONTROL,
    ) -> bytes:
        """The body of an answer of status 200. Raises ServerError."""
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = self._client.request(method, path, content=content, headers=headers)
        try:
            response = await asyncio.wait_for(request, seconds)
        except (asyncio.TimeoutError, TimeoutError):
            fault = f"does not answer within {seconds:g} s ({path})"
            raise ServerError(self.address, fault) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            cause = one_line(root_cause(error), 160)
            raise ServerError(self.address, f"does not answer ({cause})") from None
        if response.status_code != 200:
            raise _StatusError(self.address, path, response.status_code, response.text)
        return response.content


class _StatusError(ServerError):
    """An answer of another status than 200."""

    def __init__(self, address: str, path: str, status: int, text: str) -> None:
        reason = one_line(_message(text), 200)
        super().__init__(address, f"answers {path} with status {status}: {reason}")
        self.status = status


def _read_json(data: bytes) -> Any:
    """Parsed JSON, or None."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def _message(text: str) -> str:
    """The message in an error's body, without the words that vLLM wraps a worker's in."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return text
    match = re.search(r"Worker failed with error '(.*?)', please", str(message), re.S)
    return match[1] if match else str(message)


@functools.lru_cache
def checked_address(address: str) -> str:
    """An address without a last slash. Raises UserError."""
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and not (parts.path.strip("/") or parts.query or parts.fragment)
    except ValueError:  # a port that is none, half an IPv6 address
        valid = False
    if not valid or not address.isprintable() or " " in address:
        raise UserError(
            f"address: given {short_repr(address, 80)}, must be that of a server, without a path, "
            "such as http://localhost:8000"
        )
    return address.rstrip("/")
