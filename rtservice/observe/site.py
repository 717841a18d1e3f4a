"""Health checks, metrics and the status page over HTTP: read-only, and without resources of other hosts."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from traceback import extract_tb
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import http

from rtservice.events import STATUS_ANSWER_FAILED, STATUS_NO_METRICS
from rtservice.observe.channel import Channel, Turns
from rtservice.observe.renderings import Renderings, Slices
from rtservice.observe.status_source import StatusSource
from rtservice.observe.target import BadRequestError, is_served, read_target

_log = Logger()

# Connections that can be shown in each order. One message of a worker has room for them.
_MOST_ROWS = 500

# Seconds between two log records of failed answers: clients must not be able to fill the log.
_REPORT_EVERY = 10.0

_TEXT, _JSON = "text/plain; charset=utf-8", "application/json"

_ALLOW = "GET, HEAD, OPTIONS"

_PAGE = {
    b"/": ("index.html", "text/html; charset=utf-8"),
    b"/page.js": ("page.js", "text/javascript; charset=utf-8"),
    b"/page.css": ("page.css", "text/css; charset=utf-8"),
}

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_site(source: StatusSource, clock: Any) -> Site:
    """Return a factory that serves the data of `source`. `clock` is an IReactorTime."""
    try:
        from rtservice.observe import metrics
    except ImportError:
        STATUS_NO_METRICS.log(_log)
        return Site(source, clock, None)
    return Site(source, clock, metrics)


class _Status(NamedTuple):
    """The common parts of all answers of /status.json with one order, as JSON. `figures` lacks its closing brace."""

    figures: str
    rows: list[str]
    missing: list[int]


class Site(Factory):
    """Creates a Channel for each connection, and keeps the common parts of answers."""

    noisy = False

    def __init__(self, source: StatusSource, clock: Any, metrics: Any) -> None:
        self.source = source
        self.clock = clock
        self.metrics = metrics
        self.turns = Turns(clock)
        page = files("rtservice.observe").joinpath("page")
        self.pages = {path: (page.joinpath(name).read_bytes(), kind) for path, (name, kind) in _PAGE.items()}
        # Separate, since a status may have to wait for a worker.
        self._expositions = Renderings(clock, self.report)
        self._statuses = Renderings(clock, self.report)
        self._reported: float | None = None
        self._unreported = 0

    def buildProtocol(self, addr: Any) -> Channel:
        channel = Channel(_Request)
        channel.factory = self
        return channel

    def log(self, request: Any) -> None:
        """Log nothing for a request: clients that poll each second would fill the log. Called by Twisted."""

    def report(self, problem: BaseException | None) -> None:
        """Log that an answer failed, in one line without a traceback, at most once in `_REPORT_EVERY` seconds."""
        now = self.clock.seconds()
        if self._reported is not None and 0 <= now - self._reported < _REPORT_EVERY:
            self._unreported += 1
            return
        unreported, self._reported, self._unreported = self._unreported, now, 0
        frames = extract_tb(getattr(problem, "__traceback__", None))
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        STATUS_ANSWER_FAILED.log(_log, problem=f"{problem!a:.200}{where}", suppressed=unreported)

    def exposition(self, kind: Any) -> Deferred[bytes | None]:
        """Return the metrics in a format (metrics.ExpositionFormat); None if that failed."""

        async def make() -> bytes:
            await self.source.refresh()
            slices = Slices(self.clock)
            families: list[bytes] = []
            for family in self.metrics.families(self.source):
                families.append(kind.encode(family))
                await slices.pause()
            return b"".join((*families, kind.end))

        return self._expositions.get(kind, make)

    def status(self, sort: str | None) -> Deferred[_Status | None]:
        """Return the state of the service, with the first connections in this order, or without connections."""

        async def make() -> _Status:
            rows, missing = ([], []) if sort is None else await self.source.rows(sort, _MOST_ROWS)
            columns = ("worker", *self.source.columns)
            slices = Slices(self.clock)
            encoded = []
            for row in rows:
                encoded.append(json.dumps(dict(zip(columns, row, strict=True))))
                await slices.pause()
            await self.source.refresh()
            figures = json.dumps({**self.source.figures(), "settings": self.source.settings()})
            return _Status(figures.removesuffix("}"), encoded, missing)

        return self._statuses.get(sort, make)


class _Request(http.Request):
    """One request and its answer."""

    channel: Any

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Handle a request. Called by the channel. Twisted's method would also parse queries and forms."""
        self.method, self.uri, self.clientproto = command, path, version
        self.process()

    def process(self) -> None:
        site: Site = self.channel.factory
        hosts = list(self.requestHeaders.getRawHeaders(b"Host", []))
        try:
            target = read_target(self.method, self.uri, self.clientproto, hosts)
        except BadRequestError as problem:
            self._close_after()
            self._answer(400, str(problem))
            return
        # UNIX sockets need no check: their clients are not browsers, which DNS rebinding could direct here.
        if target.host is not None and self._is_network() and not is_served(target.host, site.source.hosts()):
            self._answer(421, "host not accepted; use an IP address, localhost or a name of --status-host")
            return
        if self.method == b"OPTIONS":
            self.setHeader("Allow", _ALLOW)
            self._answer(204, b"")
        elif self.method in (b"GET", b"HEAD"):
            self._get(site, target.path, target.query)
        else:
            self.setHeader("Allow", _ALLOW)
            self._answer(405, f"method not allowed; accepted are {_ALLOW}")

    def _get(self, site: Site, path: bytes, query: bytes) -> None:
        answers: dict[bytes, Callable[[Site, bytes], None]] = {
            b"/healthz": self._health,
            b"/readyz": self._ready,
            b"/metrics": self._metrics,
            b"/status.json": self._status,
        }
        if path in site.pages:
            body, kind = site.pages[path]
            self._answer(200, body, kind)
        elif path in answers:
            answers[path](site, query)
        else:
            self._answer(404, f"not found; the paths are /, {', '.join(path.decode() for path in answers)}")

    def _is_network(self) -> bool:
        return hasattr(self.getHost(), "host")

    def _close_after(self) -> None:
        """Close the connection after this answer: the start of the next request is not reliable."""
        self.setHeader("Connection", "close")
        self.channel.persistent = False

    def _answer(self, code: int, body: str | bytes, kind: str = _TEXT) -> None:
        if isinstance(body, str):
            body = f"{body}\n".encode()
        self.setResponseCode(code)
        for name, value in _HEADERS.items():
            self.setHeader(name, value)
        self.setHeader("Date", http.datetimeToString())
        if code != 204:
            self.setHeader("Content-Type", kind)
            self.setHeader("Content-Length", str(len(body)))
        self.write(body)
        self.finish()

    def _answer_later(self, result: Deferred[Any], answer: Callable[[Any], None]) -> None:
        """Call `answer` with the result once it is ready. None means a failure that was reported."""

        def send(result: Any) -> None:
            if self.channel is None:  # the client has disconnected meanwhile
                return
            if result is None:
                self._answer(500, "internal error; the log has the reason")
            else:
                answer(result)

        def failed(failure: Failure) -> None:
            if self.channel is not None:
                self.channel.failed(failure.value)

        result.addCallback(send).addErrback(failed)

    def _health(self, site: Site, query: bytes) -> None:
        self._answer(200, "alive")

    def _ready(self, site: Site, query: bytes) -> None:
        ready, status = site.source.standing()
        self._answer(200 if ready else 503, status)

    def _metrics(self, site: Site, query: bytes) -> None:
        if site.metrics is None:
            self._answer(501, STATUS_NO_METRICS.text)
            return
        kind = site.metrics.choose_format(b",".join(self.requestHeaders.getRawHeaders(b"Accept", [])))
        self._answer_later(site.exposition(kind), lambda body: self._answer(200, body, kind.content_type))

    def _status(self, site: Site, query: bytes) -> None:
        try:
            sort, offset, limit = _order(query, site.source.columns)
        except ValueError as problem:
            self._answer(400, str(problem))
            return

        def answer(status: _Status) -> None:
            connections = {
                "sort": sort,
                "offset": offset,
                "limit": limit,
                "most": _MOST_ROWS,
                "missing": status.missing,
            }
            # Each client may request other rows. Encoding 500 rows for each request would take 1.5 ms.
            rows = ", ".join(status.rows[offset : offset + limit])
            found = f'{json.dumps(connections).removesuffix("}")}, "rows": [{rows}]}}'
            self._answer(200, f'{status.figures}, "connections": {found}}}'.encode(), _JSON)

        self._answer_later(site.status(sort if limit else None), answer)


def _order(query: bytes, columns: tuple[str, ...]) -> tuple[str, int, int]:
    """Return the order, offset and limit in a query. Raises ValueError."""
    given = parse_qs(query.decode("ascii", "replace"), max_num_fields=10)
    if unknown := given.keys() - {"sort", "offset", "limit"}:
        raise ValueError(f"unknown parameter {min(unknown)!a}; accepted are sort, offset, limit")
    sort = given.get("sort", ["-age"])[0]
    if sort.removeprefix("-") not in columns:
        raise ValueError(f"sort {sort!a} is unknown; accepted are {', '.join(columns)}, each also with the prefix -")
    numbers = []
    for name, default in (("offset", "0"), ("limit", "100")):
        text = given.get(name, [default])[0]
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ValueError(f"{name} {text!a} is not a whole number")
        numbers.append(int(text))
    offset, limit = numbers
    if offset + limit > _MOST_ROWS:
        raise ValueError(f"offset + limit is {offset + limit}, above the maximum of {_MOST_ROWS}; use another sort")
    return sort, offset, limit
