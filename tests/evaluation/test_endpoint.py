"""The client of chat endpoints, against a server that is late, broken, or rude."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest
from support.judge_server import Answer, completion, judge_server, says

from marlhf.common.errors import UserError
from marlhf.config import EvaluateConfig, JudgeSettings
from marlhf.config.loading import config_from_dict
from marlhf.evaluation import endpoint as module
from marlhf.evaluation.endpoint import (
    Endpoint,
    RequestError,
    StoppedError,
    api_key,
    token_estimate,
)

ASK = [{"role": "user", "content": "which?"}]
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for a server on this machine


def client(url: str, **changes: Any) -> Endpoint:
    values = {"model": "m", "api_key_env": "JUDGE_KEY", "timeout_seconds": 2.0} | changes
    return Endpoint(JudgeSettings(url=url, **values))


def test_a_request_and_its_answer():
    answer = says("Verdict: A", prompt_tokens=11, completion_tokens=3)
    with judge_server(lambda body, count: answer) as server:
        endpoint = client(server.url, extra={"seed": 7}, max_tokens=99)
        reply = endpoint.ask(ASK)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("Verdict: A", 11, 3)
    (body,) = server.bodies
    assert body.pop("path") == "/v1/chat/completions"
    assert body.pop("messages") == ASK
    assert body == {"model": "m", "max_tokens": 99, "temperature": 0.0, "seed": 7}
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions"])
def test_addresses(tail):
    with judge_server(lambda body, count: says("x")) as server:
        client(server.url + tail, api_key_env=None, temperature=None).ask(ASK)
    assert server.bodies[0]["path"] == "/v1/chat/completions"
    assert "temperature" not in server.bodies[0]
    assert "Authorization" not in server.headers[0]


def test_keys_can_be_taken_out_of_the_body():
    with judge_server(lambda body, count: says("x")) as server:
        client(server.url, extra={"max_tokens": None, "max_completion_tokens": 5}).ask(ASK)
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 5


FAULTS = {
    "overloaded": Answer({"error": "busy"}, status=503),
    "too many": Answer({"error": "slow down"}, status=429, headers={"Retry-After": "0"}),
    "late": Answer(completion("late"), delay=1.0),
    "drop by drop": Answer(completion("late"), drops=0.05),
    "no answer": Answer(hangs_up=True),
    "half an answer": Answer(completion("half"), cut=5),
    "truncated JSON": Answer(json.dumps(completion("half"))[:-9].encode()),
    "no JSON": Answer(b"<html>gateway</html>"),
    "other JSON": Answer([1, 2]),
    "no choices": Answer({"choices": []}),
    "no text": says(None),
    "not UTF-8": Answer(b'{"choices": "\xff\xfe'),
    "length of no number": Answer(b"{}", headers={"Content-Length": "\xb2"}),
    "nested": Answer(b"[" * 100_000),
    "no end": Answer(b"x" * 2**21),
    "no gzip": Answer(b"x" * 99, headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_be_better_next_time_is_asked_again(name):
    def answer(body, count):
        return FAULTS[name] if count < 2 else says("Verdict: B")

    with judge_server(answer) as server:
        slow = name in ("late", "drop by drop")
        endpoint = client(server.url, timeout_seconds=0.3 if slow else 5.0)
        assert endpoint.ask(ASK).text == "Verdict: B"
        assert len(server.bodies) == endpoint.requests == 3


ZEROS = gzip.compress(bytes(2**26))


@pytest.mark.parametrize(
    ("body", "encoding", "says_why"),
    [
        (ZEROS, "gzip", "the answer is too large"),
        (gzip.compress(ZEROS), "gzip, gzip", "the answer is encoded as 'gzip, gzip'"),
    ],
)
def test_a_small_answer_does_not_fill_the_memory(body, encoding, says_why):
    answer = Answer(body, headers={"Content-Encoding": encoding})
    tracemalloc.start()
    try:
        with judge_server(lambda *_: answer) as server, pytest.raises(RequestError, match=says_why):
            client(server.url, retries=0).ask(ASK)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_compressed_answer_is_read():
    body = gzip.compress(json.dumps(completion("Verdict: A")).encode())
    with judge_server(lambda *_: Answer(body, headers={"Content-Encoding": "gzip"})) as server:
        assert client(server.url).ask(ASK).text == "Verdict: A"
    assert server.headers[0]["Accept-Encoding"] == "gzip"


@contextmanager
def dripping(
    first: bytes, drop: bytes, seconds: float = 8.0
) -> Iterator[tuple[int, threading.Event]]:
    """A server that sends `first` and then `drop` again and again, for so many seconds.

    Yields its port, and an event that is set when a client hangs up before that.
    """
    hung_up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=drip, args=(connection,), daemon=True).start()

        def drip(connection: socket.socket) -> None:
            end = time.monotonic() + seconds
            try:
                with connection:
                    connection.sendall(first)
                    while time.monotonic() < end:
                        connection.sendall(drop)
                        time.sleep(0.05)
            except OSError:
                hung_up.set()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], hung_up


OK = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "a header": (OK + b"X: ", b"y"),
    "headers": (OK, b"X: y\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (OK + b"Content-Length: 9999\r\n\r\n", b"{"),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "length of a chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "trailer": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
    "refusal": (b"HTTP/1.1 500 Oh\r\nContent-Length: 9999\r\n\r\n", b"x"),
}


@pytest.mark.parametrize("what", DRIPS)
def test_the_time_is_for_every_phase_of_a_request(what):
    with dripping(*DRIPS[what]) as (port, hung_up):
        began = time.monotonic()
        with pytest.raises(RequestError, match=r"no answer within 0\.4 s"):
            client(f"http://127.0.0.1:{port}", timeout_seconds=0.4, retries=0).ask(ASK)
        assert time.monotonic() - began < 3
        assert hung_up.wait(4), "the request continues without us"


@pytest.mark.parametrize("drop", [b"", b"\x16\x03\x03\x00\x40" + b"x" * 5])
def test_a_handshake_takes_no_longer(drop):
    with dripping(b"", drop) as (port, _):
        began = time.monotonic()
        with pytest.raises(RequestError):
            client(f"https://127.0.0.1:{port}", timeout_seconds=0.4, retries=0).ask(ASK)
        assert time.monotonic() - began < 3


def test_a_name_that_nobody_resolves(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(6))
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"no answer within 0\.4 s"):
        client("http://localhost:1", timeout_seconds=0.4, retries=0).ask(ASK)
    assert time.monotonic() - began < 3


ADDRESSES = ["http://h:99999/v1", "http://h h/v1", "http://h/v1\n", "http://h:x/v1", "http://[::1/v1",
             "http://a..b/v1", "http://h:0/v1", "http://h/v\x1b1", "http://:80/v1"]  # fmt: skip


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_that_cannot_be_is_refused_at_once(url):
    judge = {"url": url, "model": "m"}
    with pytest.raises(UserError, match=r"url: must|url: its host or port") as end:
        config_from_dict(EvaluateConfig, {"policies": ["a", "b"], "judge": judge})
    assert "\n" not in str(end.value)


def given_key(judge: dict[str, Any]) -> str | None:
    config = config_from_dict(EvaluateConfig, {"policies": ["a", "b"], "judge": judge})
    assert config.judge is not None
    return api_key(config.judge)


@pytest.mark.parametrize("key", ["sk_live_4eC39Hq", "hf_abcDEF123", "sk-proj-1/2", "a b", 7])
def test_a_key_where_its_name_belongs_is_never_shown(key):
    judge = {"url": "http://h/v1", "model": "m", "api_key_env": key}
    with pytest.raises(UserError, match=r"judge.*api_key_env") as end:
        given_key(judge)
    assert isinstance(key, int) or key not in str(end.value)


def test_it_gives_up_after_as_many_tries_as_it_is_told():
    with judge_server(lambda body, count: FAULTS["overloaded"]) as server:
        with pytest.raises(RequestError, match=r"status 503 .*busy.*tried 4 times") as end:
            client(server.url, retries=3).ask(ASK)
        assert len(server.bodies) == 4
        assert not end.value.hopeless


def test_a_refused_connection_is_tried_again():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(RequestError, match=r"connection failed: .*refused.*tried 3 times"):
            client(url, retries=2).ask(ASK)


@pytest.mark.parametrize(
    ("status", "hopeless"), [(401, True), (404, True), (302, True), (400, False)]
)
def test_what_will_not_get_better_is_not_asked_again(status, hopeless):
    elsewhere = {"Location": "http://127.0.0.1:1/elsewhere"}
    refusal = Answer({"error": f"bad key {KEY}"}, status=status, headers=elsewhere)
    with judge_server(lambda body, count: refusal) as server:
        with pytest.raises(RequestError, match=f"status {status}") as end:
            client(server.url).ask(ASK)
        assert len(server.bodies) == 1
    assert end.value.hopeless == hopeless
    assert KEY not in str(end.value)


def test_pauses_double_and_differ(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(module, "FIRST_PAUSE", 1.0)
    with judge_server(lambda body, count: FAULTS["overloaded"]) as server:
        endpoint = client(server.url, retries=6)
        monkeypatch.setattr(endpoint._stop, "wait", waits.append)
        with pytest.raises(RequestError):
            endpoint.ask(ASK)
    assert len(waits) == 6
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits))
    assert len({wait / 2**i for i, wait in enumerate(waits)}) > 1


def in_the_future(seconds: float) -> str:
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        (lambda: "0.4", 0.4, 0.4),
        (lambda: in_the_future(5), 3.5, 5.0),
        (lambda: in_the_future(-60), 0, 0),
        (lambda: "-3", 0, 0),
        (lambda: "soon", 0.005, 0.01),
        (lambda: "nan", 0.005, 0.01),
        (lambda: f"Mon, 1 Jan {10**30} 00:00:00 GMT", 0.005, 0.01),
    ],
)
def test_a_server_says_how_long_to_wait(header, low, high, monkeypatch):
    waits: list[float] = []
    refusal = Answer(status=429, headers={"Retry-After": header()})
    with judge_server(lambda body, count: says("x") if count else refusal) as server:
        endpoint = client(server.url)
        monkeypatch.setattr(endpoint._stop, "wait", waits.append)
        endpoint.ask(ASK)
    (wait,) = waits
    assert low <= wait <= high


def test_nobody_waits_for_a_day():
    refusal = Answer(status=429, headers={"Retry-After": "86400"})
    with (
        judge_server(lambda body, count: refusal) as server,
        pytest.raises(RequestError, match="asks to wait 86400 s"),
    ):
        client(server.url).ask(ASK)


def test_stop_wakes_who_waits():
    refusal = Answer(status=429, headers={"Retry-After": "60"})
    with judge_server(lambda body, count: refusal) as server:
        endpoint = client(server.url)
        threading.Timer(0.3, endpoint.stop).start()
        began = time.monotonic()
        with pytest.raises(StoppedError):
            endpoint.ask(ASK)
        assert time.monotonic() - began < 5


def test_caps():
    answer = says("x", prompt_tokens=1000, completion_tokens=100)
    with judge_server(lambda body, count: answer) as server:
        endpoint = client(server.url, max_requests=2)
        assert [endpoint.ask(ASK).text for _ in range(2)] == ["x", "x"]
        with pytest.raises(StoppedError, match=r"judge\.max_requests=2"):
            endpoint.ask(ASK)
        # each costs (1000 x 2 + 100 x 10) / 1e6; before it, there must be room for 512 tokens
        endpoint = client(server.url, price_in=2.0, price_out=10.0, max_cost=0.012)
        for count in (1, 2, 3):
            endpoint.ask(ASK)
            assert endpoint.cost == pytest.approx(0.003 * count)
        with pytest.raises(StoppedError, match=r"judge\.max_cost=0\.012"):
            endpoint.ask(ASK)


def test_failed_requests_cost_nothing_and_tokens_are_guessed_where_not_counted():
    with judge_server(
        lambda body, count: says("x" * 400) if count else FAULTS["no JSON"]
    ) as server:
        endpoint = client(server.url, price_in=1.0, price_out=1.0)
        reply = endpoint.ask(ASK)
    assert reply.tokens_in == token_estimate(ASK)
    assert 90 < reply.tokens_out < 120
    with judge_server(lambda body, count: says("x", prompt_tokens=10**400)) as server:
        assert client(server.url, price_in=1.0, price_out=1.0).ask(ASK).tokens_in < 1000
    assert endpoint.cost == pytest.approx((reply.tokens_in + reply.tokens_out) / 1e6)


@pytest.mark.parametrize("key", [None, "", "  ", "two words", "line\nbreak", "schlüssel"])
def test_a_missing_or_broken_key_is_named_and_never_shown(key, monkeypatch):
    if key is None:
        monkeypatch.delenv("JUDGE_KEY")
    else:
        monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match=r"judge.api_key_env: the .*environment variable") as end:
        client("http://127.0.0.1:1")
    assert not (key and key.strip()) or key not in str(end.value)


def test_a_key_that_comes_back_is_taken_out():
    with judge_server(lambda body, count: says(f"your key is {KEY}")) as server:
        assert client(server.url).ask(ASK).text == "your key is ***"
