"""The state of the service as plain data: flat counters in, nested data for the status page and the metrics out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred

PHASES = ("proxy", "tls", "open", "closing")


@dataclass(frozen=True, kw_only=True)
class StatusSource:
    """Where a site has from what it shows.

    `standing` gives whether the service is a place to send clients to, and one line on how it stands; `overview` gives
    all of that. `rows` takes one of `columns`, with `-` before it for the largest first, and a number of connections;
    it gives those, each after the number of its worker, and workers that did not answer. `settings` gives those in
    force. `durations` and `lags` are the upper bounds of buckets, in seconds. `refresh` has `overview` count anew what
    takes more than one turn of the reactor to count, and fires when it has. `hosts` gives the host names, in lower
    case, that requests may name beside localhost and IP addresses; `*` among them is any.
    """

    version: str
    standing: Callable[[], tuple[bool, str]]
    overview: Callable[[], dict[str, Any]]
    rows: Callable[[str, int], Deferred[tuple[list[list[Any]], list[int]]]]
    settings: Callable[[], dict[str, str]]
    refresh: Callable[[], Deferred[None]]
    hosts: Callable[[], frozenset[str]]
    columns: tuple[str, ...]
    durations: tuple[float, ...]
    lags: tuple[float, ...]

    def figures(self) -> dict[str, Any]:
        """The overview, with each worker's counters as `grouped` has them."""
        overview = self.overview()
        names = overview["listeners"]
        workers = [
            {**worker, "counters": self.grouped(worker["counters"], names)} for worker in overview.pop("workers")
        ]
        supervisor = overview.pop("supervisor")
        return {
            "version": self.version,
            **overview,
            "workers": workers,
            "supervisor": None if supervisor is None else self.grouped(supervisor, ()),
        }

    def grouped(self, counters: Mapping[str, float], listeners: list[str] | tuple[str, ...]) -> dict[str, Any]:
        r"""Counters (`word\tlabel\tlistener`) as a tree, in seconds and bytes; what is not counted yet is 0."""
        found: dict[str, Any] = {
            "lag": {"buckets": [0] * (len(self.lags) + 1), "seconds": 0.0},
            "listeners": {name: self._listener() for name in listeners},
            "protocol": {},
        }
        for key, count in counters.items():
            # What a worker that has gone mad calls a counter harms nobody else.
            word, label, listener = (*key.split("\t", 2), "", "")[:3]
            with suppress(LookupError, TypeError, ValueError):
                self._place(found, word, label, listener, count)
        return found

    def _place(self, found: dict[str, Any], word: str, label: str, listener: str, count: float) -> None:
        place = found["listeners"].setdefault(listener, self._listener()) if listener else found
        if word == "cpu_us":
            found["cpu_seconds"] = count / 1e6
        elif word in ("lag", "duration"):
            place[word]["buckets"][int(label)] = count
        elif word in ("lag_us", "duration_us"):
            place[word.removesuffix("_us")]["seconds"] = count / 1e6
        elif label:
            place[word][label] = count
        elif type(place.get(word, 0)) is int:
            place[word] = count

    def _listener(self) -> dict[str, Any]:
        return {
            "phase": dict.fromkeys(PHASES, 0),
            "opened": 0,
            "closed": {},
            "refused": {},
            "handshake_failed": {},
            "in": 0,
            "out": 0,
            "duration": {"buckets": [0] * (len(self.durations) + 1), "seconds": 0.0},
        }
