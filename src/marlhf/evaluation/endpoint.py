"""A client of OpenAI-compatible chat endpoints: patient, frugal, and silent about its key."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from marlhf.config import JudgeSettings
from marlhf.errors import UserError, one_line

Messages = Sequence[Mapping[str, str]]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 300.0  # seconds between tries
_LARGEST_REPLY = 2**20  # bytes
_MOST_TOKENS = 2**32  # of one request; a server that counts more cannot count
_RETRIED = {408, 409, 429}
_HOPELESS = {401, 403, 404, 405}  # no other request will fare better
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class RequestError(Exception):
    """A question got no answer, whatever was tried.

    hopeless   no other question will get one either
    """

    def __init__(self, message: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class StoppedError(Exception):
    """Nothing more is sent: a cap is reached, or somebody called `stop`."""


class _RetryError(Exception):
    """One try failed; the server may have said how long to wait, seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """An answer, and the tokens that it cost: as the server counts, or else our estimate."""

    text: str
    tokens_in: int
    tokens_out: int


def api_key(settings: JudgeSettings) -> str | None:
    """The key from the environment. Raises UserError, which never shows it."""
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"judge.api_key_env: the environment variable {settings.api_key_env} is not set; set "
            "it to the key, or give null for a server that wants none"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"judge.api_key_env: the key in {settings.api_key_env} holds blanks or characters "
            "that no key has"
        )
    return key


def token_estimate(messages: Messages) -> int:
    """Tokens in messages, roughly: four bytes a token and a few for each message's frame."""
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
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)
        self._lock, self._stop = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """Send nothing more; whoever waits to try again gives up."""
        self._stop.set()

    def body(self, messages: Messages) -> dict[str, Any]:
        """A request's body: with the address it is all that an answer depends on."""
        settings = self.settings
        body: dict[str, Any] = {"model": settings.model, "messages": list(messages)}
        body["max_tokens"] = settings.max_tokens
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        # null takes a key away: some servers want max_completion_tokens instead of max_tokens
        return {k: v for k, v in (body | settings.extra).items() if v is not None}

    @property
    def longest_answer(self) -> int:
        """The limit on an answer, in tokens, by the key of the body that has it."""
        limits = map(self.body([]).get, ("max_tokens", "max_completion_tokens"))
        given = [limit for limit in limits if isinstance(limit, int)]
        return max(given, default=self.settings.max_tokens)

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """Of so many tokens; 0 without prices."""
        prices = self.settings.price_in or 0.0, self.settings.price_out or 0.0
        return (prices[0] * tokens_in + prices[1] * tokens_out) / 1e6

    def ask(self, messages: Messages) -> Reply:
        """The answer, after as many tries as it takes. Raises RequestError and StoppedError."""
        pause, tries = FIRST_PAUSE, 0
        while True:
            try:
                return self._try(messages)
            except _RetryError as fault:
                tries += 1
                if tries > self.settings.retries:
                    raise RequestError(f"{fault} (tried {tries} times)") from fault
                # random, or else all that failed together would come back together
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
        """The body of a successful answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._address, data, headers, method="POST")
        timeout = self.settings.timeout_seconds
        deadline = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, deadline) from None
        except TimeoutError:
            raise _RetryError(f"no answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _RetryError(f"no answer within {timeout:g} s") from None
            raise _RetryError(f"connection failed: {self._shown(reason)}") from None

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """What a status other than 2xx means."""
        try:
            said = _read(error, deadline).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError):
            said = ""
        message = f"status {error.code} {self._shown(said or error.reason)}"
        if error.code in _RETRIED or error.code >= 500:
            return _RetryError(message, _retry_after(error.headers.get("Retry-After")))
        return RequestError(message, hopeless=error.code in _HOPELESS or error.code < 400)

    def _parsed(self, data: bytes, estimate: int) -> Reply:
        """What the server answered. A body that is no answer may be one the next time."""
        try:
            body = json.loads(data)
            message = body["choices"][0]["message"]
            text = message["content"]
            if text is None:  # and what is said instead is an answer, if no verdict
                text = message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text, body = None, None
        if not isinstance(text, str) or not isinstance(body, dict):
            raise _RetryError(
                f"no chat completion: {self._shown(data[:500].decode(errors='replace'))}"
            )
        text = text.encode("utf-8", "replace").decode()  # JSON can say half of a character
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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address; it is an error instead."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


def _read(response: Any, deadline: float) -> bytes:
    """A body of bounded size, within the time left: a time-out of the socket is for each read."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > _LARGEST_REPLY:
            raise http.client.HTTPException("the answer is too large")
        if time.monotonic() > deadline:
            raise TimeoutError
    expected = response.headers.get("Content-Length", "")
    if expected.isdecimal() and size < int(expected):
        raise http.client.HTTPException("the answer is cut short")
    return b"".join(parts)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date; None where the header says neither."""
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
