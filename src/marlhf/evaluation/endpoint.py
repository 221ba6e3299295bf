"""A client of OpenAI-compatible chat endpoints: retries, cost caps, and a hidden key."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from marlhf.common.errors import UserError, one_line
from marlhf.config import JudgeSettings

Messages = Sequence[Mapping[str, str]]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 300.0  # seconds between tries
REQUEST = "judge request"  # the name of its thread
_LARGEST_REPLY = 2**20  # bytes
_MOST_TOKENS = 2**32  # per request; a server's larger count is not believed
_RETRIED = {408, 409, 429}
_HOPELESS = {401, 403, 404, 405}  # no other request will fare better
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class RequestError(Exception):
    """A question that got no answer, after any retries.

    hopeless   no other question will get one either
    """

    def __init__(self, message: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class StoppedError(Exception):
    """Nothing more is sent: a cap is reached, or `stop` was called."""


class _RetryError(Exception):
    """A failed try, to be repeated; `wait` is the server's Retry-After in seconds, if any."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """An answer and its token counts: the server's, or else an estimate."""

    text: str
    tokens_in: int
    tokens_out: int


def api_key(settings: JudgeSettings) -> str | None:
    """Read the key from the environment. Raises UserError, which never shows it."""
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise UserError(
            "judge.api_key_env: the environment variable that it names is not set; set it to the "
            "key (never write the key itself here), or give null for a server that wants none"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            "judge.api_key_env: the key in the environment variable that it names holds blanks or "
            "characters that no key has"
        )
    return key


def token_estimate(messages: Messages) -> int:
    """Rough token count of messages: four bytes per token, plus five tokens per message."""
    return sum(len(message["content"].encode()) // 4 + 5 for message in messages)


class Endpoint:
    """Asks questions, from any number of threads. Raises UserError for a missing key."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.requests, self.cost = 0, 0.0
        self._key = api_key(settings)
        address = settings.url.rstrip("/")
        self._address = address.removesuffix("/chat/completions") + "/chat/completions"
        local = urlsplit(address).hostname in _LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirects, _Handler, _SecureHandler, *proxies)
        self._lock, self._stop = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """Send nothing more; pending retries give up."""
        self._stop.set()

    def body(self, messages: Messages) -> dict[str, Any]:
        """Body of a request: with the address, all that an answer depends on."""
        settings = self.settings
        body: dict[str, Any] = {"model": settings.model, "messages": list(messages)}
        body["max_tokens"] = settings.max_tokens
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        # null removes a key: some servers want max_completion_tokens instead of max_tokens
        return {k: v for k, v in (body | settings.extra).items() if v is not None}

    @property
    def longest_answer(self) -> int:
        """Token limit of an answer, as the body of a request sets it."""
        limits = map(self.body([]).get, ("max_tokens", "max_completion_tokens"))
        given = [limit for limit in limits if isinstance(limit, int)]
        return max(given, default=self.settings.max_tokens)

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """Price of these tokens; 0 without prices."""
        prices = self.settings.price_in or 0.0, self.settings.price_out or 0.0
        return (prices[0] * tokens_in + prices[1] * tokens_out) / 1e6

    def ask(self, messages: Messages) -> Reply:
        """Ask, with retries, and return the answer. Raises RequestError and StoppedError."""
        pause, tries = FIRST_PAUSE, 0
        while True:
            try:
                return self._try(messages)
            except _RetryError as fault:
                tries += 1
                if tries > self.settings.retries:
                    raise RequestError(f"{fault} (tried {tries} times)") from fault
                # jitter, so that requests that failed together do not retry together
                wait = pause * random.uniform(0.5, 1.0) if fault.wait is None else fault.wait
                pause = min(2 * pause, LONGEST_PAUSE)
                if wait > LONGEST_PAUSE:
                    raise RequestError(f"{fault}, and asks to wait {wait:.0f} s") from fault
            self._stop.wait(wait)

    def _try(self, messages: Messages) -> Reply:
        estimate = token_estimate(messages)
        reserved = self.price(estimate, self.longest_answer)
        with self._lock:
            cap, most = self.settings.max_cost, self.settings.max_requests
            if self._stop.is_set():
                raise StoppedError("stopped")
            if most is not None and self.requests >= most:
                raise StoppedError(f"judge.max_requests={most} is reached")
            if cap is not None and self.cost + reserved > cap:
                raise StoppedError(f"judge.max_cost={cap:g} is reached")
            self.requests += 1
            self.cost += reserved
        spent = 0.0
        try:
            reply = self._parsed(self._post(self.body(messages)), estimate)
            spent = self.price(reply.tokens_in, reply.tokens_out)
        finally:
            with self._lock:
                self.cost += spent - reserved
        return reply

    def _post(self, body: Mapping[str, Any]) -> bytes:
        """Post a request and return the body of a successful answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body).encode()
        request = _Request(self._address, data, headers, method="POST")
        timeout = self.settings.timeout_seconds
        try:
            status, reason, answer_headers, answer = _within(
                timeout, partial(self._exchange, request, timeout), request.close
            )
        except TimeoutError:
            raise _RetryError(f"no answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _RetryError(f"no answer within {timeout:g} s") from None
            raise _RetryError(f"connection failed: {self._shown(reason)}") from None
        if status < 300:
            return answer
        message = f"status {status} {self._shown(answer.decode('utf-8', 'replace') or reason)}"
        if status in _RETRIED or status >= 500:
            raise _RetryError(message, _retry_after(answer_headers.get("Retry-After")))
        raise RequestError(message, hopeless=status in _HOPELESS or status < 400)

    def _exchange(self, request: _Request, timeout: float) -> tuple[int, str, Any, bytes]:
        """Status, reason, headers and body of whatever the server answers."""
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return response.status, response.reason, response.headers, _read(response)
        except urllib.error.HTTPError as error:
            try:
                said = _read(error)
            except (OSError, http.client.HTTPException, ValueError):
                said = b""
            return error.code, error.reason, error.headers, said

    def _parsed(self, data: bytes, estimate: int) -> Reply:
        """Parse the server's answer. A malformed body is retried: the next may be valid."""
        try:
            body = json.loads(data)
            message = body["choices"][0]["message"]
            text = message["content"]
            if text is None:  # a refusal is an answer, if without a verdict
                text = message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text, body = None, None
        if not isinstance(text, str) or not isinstance(body, dict):
            raise _RetryError(
                f"no chat completion: {self._shown(data[:500].decode(errors='replace'))}"
            )
        text = text.encode("utf-8", "replace").decode()  # JSON can hold lone surrogates
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        guesses = estimate, token_estimate([{"content": text}])
        tokens = [
            count if isinstance(count, int) and 0 <= count <= _MOST_TOKENS else guess
            for count, guess in zip(counts, guesses, strict=True)
        ]
        return Reply(self.without_key(text), *tokens)

    def without_key(self, text: str) -> str:
        """The text without the key, should the server have sent it back."""
        return text if self._key is None else text.replace(self._key, "***")

    def _shown(self, value: Any) -> str:
        return one_line(self.without_key(str(value) or type(value).__name__), 160)


class _Request(urllib.request.Request):
    """A request that another thread can end, in any phase."""

    connection: http.client.HTTPConnection | None = None
    sock: socket.socket | None = None  # urllib takes it from the connection before the body is read
    is_over = False

    def connect(self, cls: Any, *arguments: Any, **keywords: Any) -> http.client.HTTPConnection:
        """Create the request's connection, as urllib's handlers do."""
        made = cls(*arguments, **keywords)
        made.request_of_ours, self.connection = self, made
        return made

    def close(self) -> None:
        """Send nothing more, and wake the thread that waits for the server."""
        self.is_over = True
        sock = self.sock or (self.connection and self.connection.sock)
        if sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which another reads


class _Closable:
    """A connection that does not begin to send once its `_Request` is over."""

    request_of_ours: _Request

    def connect(self) -> None:
        super().connect()  # pyright: ignore[reportAttributeAccessIssue]
        self.request_of_ours.sock = self.sock  # pyright: ignore[reportAttributeAccessIssue]
        if self.request_of_ours.is_over:
            raise TimeoutError


class _Connection(_Closable, http.client.HTTPConnection):
    pass


class _SecureConnection(_Closable, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(partial(req.connect, _Connection), req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(partial(req.connect, _SecureConnection), req)


def _within(seconds: float, work: Callable[[], Any], end: Callable[[], None]) -> Any:
    """Run `work` with a time limit; past it, call `end` and raise TimeoutError.

    A socket's own time-out covers each wait alone: one address of several, one byte of the headers.
    None covers name resolution.
    """
    results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=run, name=REQUEST, daemon=True).start()
    try:
        found, error = results.get(timeout=seconds)
    except Empty:
        end()
        raise TimeoutError from None
    if error is not None:
        raise error
    return found


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error, as it would carry the key to another address."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


def _read(response: Any) -> bytes:
    """Read a body of bounded size."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > _LARGEST_REPLY:
            raise http.client.HTTPException("the answer is too large")
    expected = response.headers.get("Content-Length", "")
    if expected.isdecimal() and size < int(expected):
        raise http.client.HTTPException("the answer is cut short")
    return b"".join(parts)


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number or a date; None where the header has neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        when = when if when.tzinfo is not None else when.replace(tzinfo=timezone.utc)
        seconds = (when - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None
