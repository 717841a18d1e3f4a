"""Convert flat counters to nested plain data for the status page and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred

PHASES = ("proxy", "tls", "open", "closing")


@dataclass(frozen=True, kw_only=True)
class StatusSource:
    """The data of a site.

    - `standing` returns whether the service is ready for traffic, and its state in one line.
    - `overview` returns the complete state.
    - `rows` takes one of `columns` to sort by, with the prefix `-` for descending order, and a number of connections.
      It returns these connections, each with the number of its worker as first value, and the workers that did not
      answer.
    - `settings` returns the current settings.
    - `durations` and `lags` are the upper bounds of histogram buckets, in seconds.
    - `refresh` updates counts of `overview` that take more than one turn of the reactor, and fires when this is done.
    - `hosts` returns the accepted host names, in lower case, beside localhost and IP addresses; `*` accepts any.
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
        """Return the overview, with the counters of each worker in the form of `grouped`."""
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
        r"""Return flat counters (`word\tlabel\tlistener`) as a tree, in seconds and bytes. Missing counters are 0."""
        found: dict[str, Any] = {
            "lag": {"buckets": [0] * (len(self.lags) + 1), "seconds": 0.0},
            "listeners": {name: self._listener() for name in listeners},
            "protocol": {},
        }
        for key, count in counters.items():
            # Skips counters with invalid names, which a faulty worker may send.
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
