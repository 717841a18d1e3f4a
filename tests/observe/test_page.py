"""The status page in a real browser: what it shows while clients connect and disconnect, and what it requests."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.deadline import DEADLINE
from tests.support.repository import ROOT

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium (Debian: chromium) is not installed")


class Browser:
    """A headless Chromium with one page, driven through a pair of pipes (--remote-debugging-pipe)."""

    def __init__(self, directory: Path) -> None:
        assert CHROMIUM is not None
        to_read, self._to = os.pipe()
        self._from, from_written = os.pipe()
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
            *("--hide-scrollbars", f"--user-data-dir={directory}", "--remote-debugging-pipe"),
        ]
        # Chromium reads from descriptor 3 and writes to descriptor 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_written}', "bash", CHROMIUM, *options, "about:blank"],
            pass_fds=(to_read, from_written),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_written)
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.requested: list[str] = []
        self.problems: list[str] = []  # messages of the console
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            if answer["method"] == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            elif answer["method"] == "Log.entryAdded":
                self.problems.append(answer["params"]["entry"]["text"])
            elif answer["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(answer["params"]["exceptionDetails"]))
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, *, width: int = 1200, height: int = 1000, dark: bool = False) -> None:
        """Open a page in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + DEADLINE
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression} is {value!r} on:\n{self.value('document.body.innerText')}"
            self.value("new Promise((then) => setTimeout(then, 100))")
        return value

    def screenshot(self, path: Path) -> None:
        """Write a screenshot of the window as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE)
        os.close(self._to)
        os.close(self._from)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    running = Browser(tmp_path / "browser")
    yield running
    running.close()


def page_of(service: Any) -> str:
    """Return the URL of the status page of a service."""
    return f"http://{service.wait_event('status.listening')['listener'].rpartition('tcp:')[2]}/"


# The large number of a graph, and the rows of a table.
FIGURE = "document.querySelector('figure[data-graph=\"{}\"] strong')?.textContent"
ROWS = "document.querySelectorAll('#connections tbody tr td:nth-child(3)').length"


def test_counters_of_the_protocol_are_updated(service: Callable[..., Any], browser: Browser) -> None:
    running = service("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0", "--protocol", "chat")
    browser.open(page_of(running))
    shown = (
        "[...document.querySelectorAll('#protocol tbody tr')].map((row) => row.innerText.replace(/\\s+/, ' ')).join()"
    )
    browser.wait(f"{shown} === 'members 0,messages_total 0,rooms 0,skipped_total 0,too_slow_total 0'")
    with running.connect() as client:
        client.sendall(b"ann\n/join here\nhello\n")
        browser.wait(f"{shown} === 'members 1,messages_total 1,rooms 1,skipped_total 0,too_slow_total 0'")
    assert not browser.value("document.querySelector('#counting').hidden")
    assert browser.problems == []


def test_the_hub_is_shown_if_the_protocol_uses_it(service: Callable[..., Any], browser: Browser) -> None:
    running = service(
        *("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0"),
        "--protocol=tests.hosted.broadcast:Broadcast",
        PYTHONPATH=str(ROOT),
    )
    browser.open(page_of(running))
    shown = "[...document.querySelectorAll('#hub tbody td')].map((cell) => cell.innerText).slice(0, 4).join()"
    browser.wait(f"{shown} === '0,up,0,0'")
    with running.connect():
        browser.wait(f"{shown} === '0,up,1,1'")
    assert not browser.value("document.querySelector('#connecting').hidden")
    assert browser.problems == []


def test_the_page_updates_when_clients_connect_and_disconnect(service: Callable[..., Any], browser: Browser) -> None:
    running = service("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0")
    browser.open(page_of(running))
    browser.wait(f"{FIGURE.format('connections')} === '0'")
    assert "no connections" in browser.value("document.querySelector('#connections').innerText")
    with ExitStack() as clients:
        sockets = [clients.enter_context(running.connect()) for _ in range(7)]
        assert {client.recv(100) for client in sockets} == {b"Hello from the server!"}
        browser.wait(f"{FIGURE.format('connections')} === '7' && {ROWS} === 7")
        browser.wait("GRAPHS[1].title === 'new connections / s' && series(GRAPHS[1], 0).some(([, value]) => value > 1)")
        host, port = sockets[3].getsockname()
        assert f"{host}:{port}" in browser.value("document.querySelector('#connections').innerText")
        sockets[3].sendall(b"x" * 5000)
        browser.wait("document.querySelector('#connections').innerText.includes('4.9 KiB')")
    browser.wait(f"{FIGURE.format('connections')} === '0'")
    browser.wait("document.querySelector('#listeners').innerText.includes('6 peer finished, 1 reset by peer')")
    assert browser.value("document.querySelector('#state').textContent") == "serving"
    assert browser.problems == []


def test_the_page_sends_requests_only_to_its_server(service: Callable[..., Any], browser: Browser) -> None:
    running = service("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0")
    browser.open(page_of(running))
    browser.wait(f"{FIGURE.format('connections')} === '0'")
    paths = {url.partition("?")[0].removeprefix(page_of(running)) for url in browser.requested if url[:5] != "data:"}
    assert paths == {"", "page.js", "page.css", "status.json"}
    assert browser.problems == []


def test_connections_can_be_sorted_and_paged(service: Callable[..., Any], browser: Browser) -> None:
    running = service("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0")
    with ExitStack() as clients:
        sockets = [clients.enter_context(running.connect()) for _ in range(60)]
        sockets[42].sendall(b"x" * 3000)
        browser.open(page_of(running))
        browser.wait(f"{ROWS} === 25")
        browser.value("document.querySelector('button[data-key=bytes_in]').click()")
        browser.wait("document.querySelector('#connections tbody tr').innerText.includes('2.9 KiB')")
        assert browser.value("document.querySelector('th[aria-sort]').innerText").startswith("received")
        browser.value("document.querySelector('#later').click()")
        browser.wait("document.querySelector('#shown').textContent === '26 to 50 of 60'")
        browser.value("document.querySelector('#later').click()")
        browser.wait("document.querySelector('#shown').textContent === '51 to 60 of 60'")
        assert browser.value(ROWS) == 10
        assert browser.value("document.querySelector('#later').disabled") is True
        assert browser.value("document.querySelector('#earlier').disabled") is False


def test_the_page_shows_a_draining_and_a_stopped_server(service: Callable[..., Any], browser: Browser) -> None:
    running = service("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0", "--drain-timeout", "60")
    with running.connect() as client:
        client.recv(100)
        browser.open(page_of(running))
        browser.wait("document.querySelector('#state').textContent === 'serving'")
        assert browser.value("document.querySelector('#broken').hidden") is True
        running.process.terminate()
        browser.wait("document.querySelector('#state').textContent === 'draining'")
    running.process.wait(DEADLINE)
    browser.wait("!document.querySelector('#broken').hidden")
    assert browser.value("document.querySelector('#broken').textContent").startswith("No answer from the server for ")


def test_a_peer_address_is_not_interpreted_as_html(
    service: Callable[..., Any], browser: Browser, tmp_path: Path
) -> None:
    running = service("--listen", f"unix:{tmp_path}/s", "--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0")
    with socket.socket(socket.AF_UNIX) as client:
        client.bind(f"{tmp_path}/<b id=bold>&amp;")
        client.connect(f"{tmp_path}/s")
        browser.open(page_of(running))
        shown = browser.wait("document.querySelector('#connections tbody tr td:nth-child(2)')?.parentNode.innerText")
        assert "unix:" in shown
        assert browser.value("document.querySelector('#bold')") is None
        assert browser.problems == []


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_the_page_fits_the_width_of_the_window(
    service: Callable[..., Any], browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    running = service("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0", "--workers", "2")
    with running.connect():
        browser.open(page_of(running), width=width, dark=dark)
        browser.wait(f"{FIGURE.format('connections')} === '1'")
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("getComputedStyle(document.body).backgroundColor") == (
            "rgb(18, 22, 28)" if dark else "rgb(246, 247, 249)"
        )
        browser.screenshot(tmp_path / f"{'dark' if dark else 'light'}-{width}.png")
