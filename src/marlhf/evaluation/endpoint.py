"""A client of OpenAI-compatible chat endpoints: retries, cost caps, and a hidden key."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from marlhf.common.errors import UserError, one_line
from marlhf.common.http import event_loop, root_cause
from marlhf.config import JudgeSettings

Messages = Sequence[Mapping[str, str]]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 300.0  # seconds between tries
_LARGEST_REPLY = 2**20  # bytes
_MOST_TOKENS = 2**32  # per request; a server's larger count is ignored
_RETRIED = {408, 409, 429}
_HOPELESS = {401, 403, 404, 405}  # other requests would fail too
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
        self._local = urlsplit(address).hostname in _LOOPBACK  # without a proxy
        self._lock, self._stop = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """Send nothing more; pending retries give up."""
        self._stop.set()

    def body(self, messages: Messages) -> dict[str, Any]:
        """Body of a request; with the address it determines the answer."""
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
        set_limits = [limit for limit in limits if isinstance(limit, int)]
        return max(set_limits, default=self.settings.max_tokens)

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
            max_cost, max_requests = self.settings.max_cost, self.settings.max_requests
            if self._stop.is_set():
                raise StoppedError("stopped")
            if max_requests is not None and self.requests >= max_requests:
                raise StoppedError(f"judge.max_requests={max_requests} is reached")
            if max_cost is not None and self.cost + reserved > max_cost:
                raise StoppedError(f"judge.max_cost={max_cost:g} is reached")
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
        timeout = self.settings.timeout_seconds
        exchange = asyncio.wait_for(self._exchange(json.dumps(body).encode()), timeout)
        try:
            answer = asyncio.run_coroutine_threadsafe(exchange, event_loop()).result()
        except (asyncio.TimeoutError, TimeoutError):
            raise _RetryError(f"no answer within {timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise _RetryError(f"connection failed: {self._one_line(root_cause(error))}") from None
        if answer.status < 300:
            return answer.body
        reason = answer.body.decode("utf-8", "replace") or answer.reason
        message = f"status {answer.status} {self._one_line(reason)}"
        if answer.status in _RETRIED or answer.status >= 500:
            raise _RetryError(message, _retry_after(answer.retry_after))
        raise RequestError(message, hopeless=answer.status in _HOPELESS or answer.status < 400)

    async def _exchange(self, data: bytes) -> _Answer:
        """Send a request; return the answer of any status, its body bounded."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers["Accept-Encoding"] = "gzip"  # others cannot be bounded
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        parts, size = [], 0
        # a redirect would carry the key to another address; `_post` bounds the time of all phases
        async with (
            httpx.AsyncClient(
                follow_redirects=False, timeout=None, trust_env=not self._local
            ) as client,
            client.stream("POST", self._address, content=data, headers=headers) as response,
        ):
            async for part in response.aiter_raw(65536):
                parts.append(part)
                size += len(part)
                if size > _LARGEST_REPLY:
                    raise httpx.DecodingError("the answer is too large")
            headers = response.headers
            content = _unpacked(b"".join(parts), headers.get("Content-Encoding", "identity"))
            return _Answer(
                response.status_code, response.reason_phrase, headers.get("Retry-After"), content
            )

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
                f"no chat completion: {self._one_line(data[:500].decode(errors='replace'))}"
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

    def _one_line(self, value: Any) -> str:
        return one_line(self.without_key(str(value) or type(value).__name__), 160)


@dataclass(frozen=True)
class _Answer:
    status: int
    reason: str
    retry_after: str | None
    body: bytes


def _unpacked(body: bytes, encoding: str) -> bytes:
    """A body as it was before its encoding. Raises httpx.DecodingError.

    httpx would decode whatever a server sends, in memory without bound.
    """
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise httpx.DecodingError(f"the answer is encoded as {encoding!r}")
    decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        content = decoder.decompress(body, _LARGEST_REPLY)
    except zlib.error as error:
        raise httpx.DecodingError(str(error)) from error
    if decoder.unconsumed_tail:
        raise httpx.DecodingError("the answer is too large")
    return content


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number or a date; None where the header has neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        date = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None
