"""The state of the service as plain data: flat counters become nested data for the status page and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred

PHASES = ("proxy", "tls", "open", "closing")

# Counters of a hub, beside `up` and `heartbeat`.
HUB_COUNTERS = (
    *("published", "publish_failed", "received", "delivered", "dropped", "gaps"),
    *("reconnects", "refused", "claims_lost", "topics", "subscriptions", "members", "claims", "links", "in_flight"),
)


@dataclass(frozen=True, kw_only=True)
class StatusSource:
    """The callables from which the status server has what it shows.

    `standing` returns whether the service is ready for traffic, and one line of status. `overview` returns the whole
    state; the `counters` of a worker there are keyed by name, label and listener. `rows` takes one of `columns`, with
    `-` before it for descending order, and a number of connections. It returns these connections, each after the
    number of its worker, and the numbers of the workers that did not answer. `settings` returns the current settings as
    text. `refresh` fires when `overview` has a new count of what takes more than one turn of the reactor to count.
    `hosts` returns the host names, in lower case, that requests may name in addition to localhost and IP addresses;
    `*` among them allows any. `durations`, `lags` and `heartbeats` are the upper bounds of buckets, in
    seconds.
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
    heartbeats: tuple[float, ...]

    def figures(self) -> dict[str, Any]:
        """Return the overview, with the counters of each worker as `grouped` returns them."""
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

    def grouped(
        self, counters: Mapping[tuple[str, str, str], float], listeners: list[str] | tuple[str, ...]
    ) -> dict[str, Any]:
        """Return counters, keyed by name, label and listener, as a tree, in seconds and bytes.

        Each of `listeners` has all its counters there, and so has the hub. Those that are missing are 0. `hub` is None
        without counters of a hub, and its `up` is None without a process that serves.
        """
        found: dict[str, Any] = {
            "lag": {"buckets": [0] * (len(self.lags) + 1), "seconds": 0.0},
            "listeners": {name: self._listener() for name in listeners},
            "hub": None,
            "protocol": {},
        }
        for (name, label, listener), count in counters.items():
            # An invalid counter of a worker is left out, and all others are shown.
            with suppress(LookupError, TypeError, ValueError):
                self._insert(found, name, label, listener, count)
        return found

    def _insert(self, found: dict[str, Any], name: str, label: str, listener: str, count: float) -> None:
        group = found["listeners"].setdefault(listener, self._listener()) if listener else found
        if name == "cpu_us":
            found["cpu_seconds"] = count / 1e6
        elif name in ("hub", "hub_heartbeat", "hub_heartbeat_us"):
            hub = found["hub"] = found["hub"] or self._hub()
            if name == "hub_heartbeat":
                hub["heartbeat"]["buckets"][int(label)] = count
            elif name == "hub_heartbeat_us":
                hub["heartbeat"]["seconds"] = count / 1e6
            elif label == "up" or label in HUB_COUNTERS:
                hub[label] = count
        elif name in ("lag", "duration"):
            group[name]["buckets"][int(label)] = count
        elif name in ("lag_us", "duration_us"):
            group[name.removesuffix("_us")]["seconds"] = count / 1e6
        elif label:
            group[name][label] = count
        elif type(group.get(name, 0)) is int:
            group[name] = count

    def _hub(self) -> dict[str, Any]:
        return {
            "up": None,
            **dict.fromkeys(HUB_COUNTERS, 0),
            "heartbeat": {"buckets": [0] * (len(self.heartbeats) + 1), "seconds": 0.0},
        }

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
