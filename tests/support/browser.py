"""A headless Chromium, driven through its DevTools pipe; tests skip where there is none."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "about:blank",
)
_MEASURE = """(() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (e) => e.closest(".wide") !== null;
  const beyond = [...document.body.querySelectorAll("*")].filter(
    (e) => !scrolls(e) && e.getBoundingClientRect().right > width + 1);
  return {
    overflow: document.documentElement.scrollWidth - width,
    beyond: beyond.slice(0, 5).map((e) => e.outerHTML.slice(0, 120)),
    background: getComputedStyle(document.body).backgroundColor,
  };
})()"""


class Browser:
    """One page of a browser; `messages` are the errors and warnings of its console."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        targets = self("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def open(self, path: Path, width: int, dark: bool = False, height: int = 900) -> None:
        """Show a file in a window of some width, in a light or dark theme."""
        self.messages, self.requests = [], []
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[theme])
        self("Page.navigate", url=path.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def measure(self) -> dict[str, Any]:
        """How far the page is wider than the window, what sticks out, and its background."""
        return self.evaluate(_MEASURE)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        image = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def __call__(self, method: str, **params: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser has gone"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.messages.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.messages.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.messages.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
        return message


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh browser; skips the test where no Chromium is installed."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    browser_reads, we_write = os.pipe()
    we_read, browser_writes = os.pipe()

    def pipes() -> None:  # the browser reads from file 3 and writes to file 4
        reads, writes = os.dup(browser_reads), os.dup(browser_writes)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [path, f"--user-data-dir={profile}", *FLAGS],
            preexec_fn=pipes,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_reads)
        os.close(browser_writes)
        try:
            yield Browser(we_write, we_read)
        finally:
            os.close(we_write)
            os.close(we_read)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def faults(page: Browser, path: Path) -> list[str]:
    """What is wrong with a page at 390 and 1280 pixels, light and dark."""
    found = []
    backgrounds = set()
    for width in (390, 1280):
        for dark in (False, True):
            page.open(path, width, dark)
            size = page.measure()
            where = f"{width} px, {'dark' if dark else 'light'}"
            found += [f"{where}: console: {message}" for message in page.messages]
            if size["overflow"] > 0 or size["beyond"]:
                found.append(f"{where}: too wide by {size['overflow']}: {size['beyond']}")
            others = [url for url in page.requests if not url.startswith(("file:", "data:"))]
            found += [f"{where}: asks for {url}" for url in others]
            backgrounds.add((dark, size["background"]))
    if len(backgrounds) != 2 or len({colour for _, colour in backgrounds}) != 2:
        found.append(f"light and dark do not differ as they should: {backgrounds}")
    return found
