"""Health, metrics and the status page over HTTP. Nothing can be changed here, and nothing is sent to another host."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import http

from rtservice.observe.figures import Source

_log = Logger()

# The most connections that are looked through for one answer. A worker's fit into one message of its.
_MOST_ROWS = 500

_TEXT, _JSON = "text/plain; charset=utf-8", "application/json"

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

_TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_NO_METRICS = "there are no metrics without prometheus_client: pip install 'rtservice[metrics]'"


def make_site(source: Source) -> http.HTTPFactory:
    """A factory that serves what `source` gives."""
    try:
        from rtservice.observe import metrics
    except ImportError:
        _log.warn("{problem}", problem=_NO_METRICS)
        exposition = None
    else:
        exposition = metrics.exposition
    return _Site(source, exposition)


class _Site(http.HTTPFactory):
    noisy = False

    def __init__(self, source: Source, exposition: Any) -> None:
        # Its transports have deadlines; Twisted's would be a line in the log for each client that keeps its connection.
        super().__init__(timeout=None)  # type: ignore[arg-type]  # documented as such
        self.source = source
        self.exposition = exposition
        page = files("rtservice.observe").joinpath("page")
        self.pages = {path: (page.joinpath(name).read_bytes(), kind) for path, (name, kind) in _PAGE.items()}

    def buildProtocol(self, addr: Any) -> Any:
        channel: Any = super().buildProtocol(addr)
        channel.requestFactory = _Request
        return channel

    def log(self, request: Any) -> None:
        """Whoever asks each second is not to be a line each second."""


class _Request(http.Request):
    """One request and its answer."""

    channel: Any
    _refused = False

    def gotLength(self, length: int | None) -> None:
        super().gotLength(0)
        if length != 0:  # None: as long as it likes
            self._refused = True
            # It cannot be answered as others are: that takes all of the request.
            self.channel.transport.write(_TOO_LARGE)
            self.channel.loseConnection()

    def process(self) -> None:
        if self._refused:
            return
        if self.method not in (b"GET", b"HEAD"):
            self.setHeader("Allow", "GET, HEAD")
            self._answer(405, "nothing can be changed here")
            return
        site: _Site = self.channel.factory
        answers = {
            b"/healthz": self._health,
            b"/readyz": self._ready,
            b"/metrics": self._metrics,
            b"/status.json": self._status,
        }
        if self.path in site.pages:
            body, kind = site.pages[self.path]
            self._answer(200, body, kind)
        elif self.path in answers:
            answers[self.path](site)
        else:
            self._answer(404, f"there is /, {', '.join(path.decode() for path in answers)}")

    def _answer(self, code: int, body: str | bytes, kind: str = _TEXT) -> None:
        if isinstance(body, str):
            body = f"{body}\n".encode()
        self.setResponseCode(code)
        for name, value in _HEADERS.items():
            self.setHeader(name, value)
        self.setHeader("Date", http.datetimeToString())
        self.setHeader("Content-Type", kind)
        self.setHeader("Content-Length", str(len(body)))
        self.write(body)
        self.finish()

    def _health(self, site: _Site) -> None:
        self._answer(200, "alive")

    def _ready(self, site: _Site) -> None:
        ready, status = site.source.standing()
        self._answer(200 if ready else 503, status)

    def _metrics(self, site: _Site) -> None:
        if site.exposition is None:
            self._answer(501, _NO_METRICS)
        else:
            self._answer(200, *site.exposition(site.source, self.getHeader("Accept") or ""))

    def _status(self, site: _Site) -> None:
        try:
            sort, offset, limit = self._order(site.source.columns)
        except ValueError as problem:
            self._answer(400, str(problem))
            return
        if not limit:
            self._status_with(site, sort, offset, limit, ([], []))
            return
        asked = site.source.rows(sort, offset + limit)
        asked.addCallback(lambda found: self._status_with(site, sort, offset, limit, found))
        asked.addErrback(self._failed)

    def _order(self, columns: tuple[str, ...]) -> tuple[str, int, int]:
        """What the query asks for; raises ValueError."""
        given = parse_qs(self.uri.partition(b"?")[2].decode("ascii", "replace"), max_num_fields=10)
        if unknown := given.keys() - {"sort", "offset", "limit"}:
            raise ValueError(f"{min(unknown)!a} is none of sort, offset, limit")
        sort = given.get("sort", ["-age"])[0]
        if sort.removeprefix("-") not in columns:
            raise ValueError(f"sort {sort!a} is none of {', '.join(columns)}, or one with - before it")
        numbers = []
        for name, default in (("offset", "0"), ("limit", "100")):
            text = given.get(name, [default])[0]
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                raise ValueError(f"{name} {text!a} is not a whole number")
            numbers.append(int(text))
        offset, limit = numbers
        if offset + limit > _MOST_ROWS:
            raise ValueError(f"offset and limit are together {offset + limit}, more than {_MOST_ROWS}: sort otherwise")
        return sort, offset, limit

    def _status_with(
        self, site: _Site, sort: str, offset: int, limit: int, found: tuple[list[list[Any]], list[int]]
    ) -> None:
        if self._disconnected:  # in the meantime
            return
        rows, missing = found
        source = site.source
        columns = ("worker", *source.columns)
        connections = {
            "sort": sort,
            "offset": offset,
            "limit": limit,
            "most": _MOST_ROWS,
            "missing": missing,
            "rows": [dict(zip(columns, row, strict=True)) for row in rows[offset : offset + limit]],
        }
        status = {**source.figures(), "settings": source.settings(), "connections": connections}
        self._answer(200, json.dumps(status).encode(), _JSON)

    def _failed(self, failure: Failure) -> None:
        _log.failure("/status.json failed", failure)
        if not self._disconnected:
            self._answer(500, "it failed, and the log says why")
