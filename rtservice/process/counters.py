"""The counters of a process: keys, meaning, and the counters of the reactor, the process and the hosted factory.

Counters are a flat dict of CounterKey to number. All values are integers, except those of `protocol`. The names, each
with the other fields of its key:

    open                open connections
    ended, aborted      connections that have ended, and those among them that were aborted
    drain_ended, drain_aborted
                        connections that ended by themselves during a graceful shutdown, and that it aborted
    phase               open connections by phase (label) and listener
    opened              accepted connections, by listener: the sum of `phase` and `closed`
    closed              ended connections by reason (label) and listener
    handshake_failed    connections that ended before their PROXY header and TLS handshake were complete, by kind
                        (label) and listener
    refused             clients refused at accept() or once a PROXY header names them, by reason (label) and listener
    in, out             bytes received and sent, by listener, those of open connections included
    duration            ended connections by bucket of their duration (label) and listener
    duration_us         the sum of these durations in microseconds, by listener
    lag, lag_us         the same for the lag of the reactor: the delay of a timed call
    cpu_us              CPU time in microseconds
    memory              resident memory in bytes
    descriptors, descriptor_limit
                        open file descriptors, and their limit; -1 is no limit
    dropped             log records that could not be written in time
    hub                 counters of the hub by name (label), if it is used: HUB_TOTALS and HUB_GAUGES; `up` is 0 or 1
    hub_heartbeat, hub_heartbeat_us
                        as `lag`, for the time from a heartbeat of the hub to its return
    protocol            counters of the hosted factory, by name (label); may have fractions

A total never decreases while the process runs. All counters are totals, except GAUGES, HUB_GAUGES, and those of the
factory whose names do not end in `_total`.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from rtservice.histogram import Histogram
from rtservice.hub.carrier import HEARTBEAT
from rtservice.net.phases import Phase

Name = TypeVar("Name")
Number = TypeVar("Number", int, float)

GAUGES = frozenset(("open", "memory", "phase", "descriptors", "descriptor_limit"))

# Counters of a hub and its carrier: see Hub.counters.
HUB_TOTALS = (
    *("published", "publish_failed", "received", "delivered", "dropped", "gaps"),
    *("reconnects", "refused", "claims_lost"),
)
HUB_GAUGES = ("up", "topics", "subscriptions", "members", "claims", "links", "in_flight")

PHASES = tuple(phase.value for phase in Phase)

# Upper bounds of the buckets, in seconds; the last bucket has none.
DURATIONS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0)
LAGS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)

# Seconds between two measurements of the reactor's lag. Each takes about 30 µs.
_LAG_EVERY = 0.1

# Limit of labels of one name and listener, and the label that counts all further ones. OpenSSL has hundreds of reasons
# for a failed handshake, and the peer influences which of them occur.
MOST_LABELS, OTHER = 50, "other"

# Limits of a hosted factory: counters, and characters of a name. A counter takes memory for each worker until the
# service stops.
MOST_OF_FACTORY, _LONGEST_NAME = 100, 100
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TOTAL = "_total"
LARGEST_OF_FACTORY = 1e300  # the sum over many workers is finite


class CounterKey(NamedTuple):
    """The key of a counter. `label` and `listener` are empty where the name has none."""

    name: str
    label: str = ""
    listener: str = ""

    @property
    def is_total(self) -> bool:
        """Whether the counter never decreases."""
        match self.name:
            case "protocol":
                return self.label.endswith(_TOTAL)
            case "hub":
                return self.label not in HUB_GAUGES
            case _:
                return self.name not in GAUGES


# Keys without label and listener that more than one module uses.
OPEN_CONNECTIONS, ENDED, ABORTED = CounterKey("open"), CounterKey("ended"), CounterKey("aborted")
DRAIN_ENDED, DRAIN_ABORTED = CounterKey("drain_ended"), CounterKey("drain_aborted")
MEMORY, DROPPED = CounterKey("memory"), CounterKey("dropped")
HUB_UP = CounterKey("hub", "up")


def add(totals: dict[Name, Number], counters: Mapping[Name, Number]) -> None:
    """Add counters to totals, in place."""
    for key, count in counters.items():
        totals[key] = totals.get(key, 0) + count


def histogram_counters(name: str, histogram: Histogram, listener: str = "") -> dict[CounterKey, int]:
    """Return the counters `name`, labelled by the number of the bucket, without empty ones, and `name`_us."""
    counts = histogram.counts
    found = {CounterKey(name, str(bucket), listener): count for bucket, count in enumerate(counts) if count}
    found[CounterKey(f"{name}_us", "", listener)] = histogram.sum_us
    return found


class Lag:
    """Measures the delay of the reactor's timed calls."""

    def __init__(self) -> None:
        self.histogram = Histogram(LAGS)
        self._call: Any = None

    def start(self, clock: Any) -> None:
        """Start to measure, with this clock (an IReactorTime)."""
        self._call = clock.callLater(_LAG_EVERY, self._measure, clock, clock.seconds() + _LAG_EVERY)

    def _measure(self, clock: Any, due: float) -> None:
        self.histogram.add(max(0.0, clock.seconds() - due))
        self.start(clock)

    def stop(self) -> None:
        """Stop measuring."""
        if self._call is not None and self._call.active():
            self._call.cancel()

    def counters(self) -> dict[CounterKey, int]:
        """Return the counters `lag` and `lag_us`."""
        return histogram_counters("lag", self.histogram)


def is_factory_name(name: object) -> bool:
    """Return whether a hosted factory may give a counter this name."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None


def factory_counters(metrics: Mapping[str, float]) -> tuple[dict[CounterKey, float], str]:
    """Return the valid counters in `metrics`, the result of a factory's `IMetrics.metrics`, and a problem.

    The problem is that of the last invalid counter, or empty if all are valid.
    """
    found: dict[CounterKey, float] = {}
    problem = ""
    for name, value in metrics.items():
        if not is_factory_name(name):
            problem = (
                f"name {name!a:.100}: not valid; accepted are a letter, then letters, digits and underscores, "
                f"at most {_LONGEST_NAME}"
            )
        elif name + _TOTAL in metrics:
            problem = f"names {name!r} and {name + _TOTAL!r}: the same to Prometheus; rename one of them"
        elif not isinstance(value, int | float) or not abs(value) <= LARGEST_OF_FACTORY:
            problem = f"{name} {value!a:.100}: not a number from -{LARGEST_OF_FACTORY:g} to {LARGEST_OF_FACTORY:g}"
        elif len(found) == MOST_OF_FACTORY:
            problem = f"more than {MOST_OF_FACTORY} values; the others are ignored"
        else:
            found[CounterKey("protocol", name)] = +value  # True becomes 1
    return found, problem


def hub_counters(counters: Mapping[str, int]) -> dict[CounterKey, int]:
    """Return the counters in the result of `Hub.counters`."""
    found: dict[CounterKey, int] = {}
    for name, count in counters.items():
        if name.startswith(HEARTBEAT):
            bucket = name.removeprefix(HEARTBEAT)
            key = CounterKey("hub_heartbeat_us") if bucket == "us" else CounterKey("hub_heartbeat", bucket)
        else:
            key = CounterKey("hub", name)
        found[key] = count
    return found


def process_counters() -> dict[CounterKey, int]:
    """Return CPU time, memory and descriptors of this process. Without /proc, memory and descriptors are 0."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        CounterKey("cpu_us"): int((used.ru_utime + used.ru_stime) * 1e6),
        MEMORY: _memory(),
        CounterKey("descriptors"): _descriptors(),
        CounterKey("descriptor_limit"): limit,
    }


def _memory() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _descriptors() -> int:
    try:
        # Since Linux 6.2 the size of this directory is the number of descriptors, proc(5). Listing 2,000 takes 1 ms.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return 0
