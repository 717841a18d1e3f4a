r"""The counters of a process, as a flat dict of names to numbers. All numbers but one are integers.

A name is a word, or `word\tlabel\tlistener` where there is one number for each. The words:

    open                how many connections are open; of workers, what the supervisor's STATUS line adds up
    ended, aborted      connections that have ended, and those of them that were cut
    drain_ended, …      the same within a drain
    phase               connections in each phase now (label), by listener
    opened              accepted, by listener
    closed              by reason (label) and listener: together with those in a phase these are `opened`
    handshake_failed    ended before a PROXY header and a TLS handshake were done, by kind (label) and listener
    refused             closed as soon as accepted, by reason (label) and listener
    in, out             bytes, by listener, those of connections that are open too
    duration            connections by the bucket (label) of their duration, by listener
    duration_us         the sum of durations, in microseconds, by listener
    lag, lag_us         the same of how late the reactor calls what is due
    cpu_us              processor time, in microseconds
    memory              resident bytes
    descriptors, descriptor_limit
    dropped             log records that nobody took
    protocol            what the hosted factory counts, by its own names (label); may have fractions

All but GAUGES, and those of the factory's whose names do not end in `_total`, are totals, which never fall while the
process lives.
"""

from __future__ import annotations

import os
import re
import resource
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

Name = TypeVar("Name")
Number = TypeVar("Number", int, float)

GAUGES = frozenset(("open", "memory", "phase", "descriptors", "descriptor_limit"))

# Upper bounds of the buckets, in seconds; the last bucket has none.
DURATIONS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0)
LAGS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)

# Seconds between two looks at the reactor's lag. One takes some 30 µs.
_LAG_EVERY = 0.1

# Different reasons, and kinds of failed handshakes, that are told apart: OpenSSL has hundreds of words, and a peer has
# a say in which of them it gets.
_WORDS = 50

# Of a factory's own counters: each is a number for each worker, which is kept for as long as the service runs.
_MOST_OF_FACTORY, _LONGEST_NAME = 100, 100
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TOTAL = "_total"
_LARGEST = 1e300  # so that a sum of them is a number too


# --- what a worker may report ---

PHASES = ("proxy", "tls", "open", "closing")

_PLAIN = (
    *("open", "ended", "aborted", "drain_ended", "drain_aborted"),
    *("cpu_us", "memory", "descriptors", "descriptor_limit", "dropped"),
)
_FREE = frozenset(("closed", "handshake_failed", "refused"))  # whose labels are words that are not known before
_OTHER = "other"
_LONGEST_LABEL = 64

# A slot's labels, over all the workers that it ever had. Each worker has up to _WORDS, and of the factory's names
# _MOST_OF_FACTORY; a reload may bring other ones.
_SLOT_WORDS, _SLOT_NAMES = 2 * _WORDS, 3 * _MOST_OF_FACTORY

_LARGEST_COUNT = 2**63 - 1


class CounterNames:
    """The names of counters that one worker may report, of these listeners. It has few labels of its own choice."""

    def __init__(self, listeners: Collection[str]) -> None:
        self._listeners = frozenset(listeners)
        self._known = {*_PLAIN, "lag_us\t\t", *(f"lag\t{bucket}\t" for bucket in range(len(LAGS) + 1))}
        for listener in self._listeners:
            self._known.update(f"{word}\t\t{listener}" for word in ("opened", "in", "out", "duration_us"))
            self._known.update(f"duration\t{bucket}\t{listener}" for bucket in range(len(DURATIONS) + 1))
            self._known.update(f"phase\t{phase}\t{listener}" for phase in PHASES)
        self._labels: dict[tuple[str, str], int] = {}  # how many there are, by word and listener

    def check(self, name: str) -> None:
        """Raise ValueError, with a short text, for a name that is none of these."""
        if name in self._known:
            return
        word, label, listener = (*name.split("\t", 2), "", "")[:3]
        if word == "protocol" and not listener:
            most, valid = _MOST_OF_FACTORY, len(label) <= _LONGEST_NAME and _NAME.fullmatch(label) is not None
        else:
            most, valid = _WORDS + 1, word in _FREE and listener in self._listeners
            valid = valid and 0 < len(label) <= _LONGEST_LABEL and label.isprintable()
        if not valid:
            raise ValueError(f"an unknown counter {name[:40]!a}")
        place = word, listener
        count = self._labels[place] = self._labels.get(place, 0) + 1
        if count > most:
            raise ValueError(f"more than {most} labels of {word!r}")
        self._known.add(name)


def check_count(name: str, count: Any) -> None:
    """Raise ValueError for the value of a counter that cannot be."""
    if name.startswith("protocol\t"):
        valid = type(count) in (int, float) and abs(count) <= _LARGEST  # NaN is not
    else:  # an unlimited number of descriptors is -1
        valid = type(count) is int and (-1 if name in GAUGES else 0) <= count <= _LARGEST_COUNT
    if not valid:
        raise ValueError(f"an impossible count of {name[:40]!a}")


class SlotNames:
    """The names under which the counters of a slot are shown, of all workers that it ever had.

    The first labels are shown as they are. Later ones are counted as `other`, and a factory's later names not at all:
    otherwise each worker that is replaced could add more.
    """

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._labels: dict[tuple[str, str], int] = {}

    def shown(self, name: str) -> str:
        """Return the name under which a valid counter is shown; empty for one that is not. It never changes."""
        found = self._shown.get(name)
        if found is not None:
            return found
        word, label, listener = (*name.split("\t", 2), "", "")[:3]
        if word == "protocol":
            most, instead = _SLOT_NAMES, ""
        elif word in _FREE and label != _OTHER:
            most, instead = _SLOT_WORDS, f"{word}\t{_OTHER}\t{listener}"
        else:
            return name
        place = word, listener
        if self._labels.get(place, 0) >= most:
            return instead
        self._labels[place] = self._labels.get(place, 0) + 1
        self._shown[name] = name
        return name

    def admit(self, names: Iterable[str]) -> None:
        """Have these names be shown as soon as they are reported, if there are not too many."""
        for name in names:
            self.shown(name)

    def add(self, to: dict[str, float], counters: Mapping[str, float]) -> None:
        """Add a worker's counters to others, under the names that are shown."""
        for name, count in counters.items():
            if name := self.shown(name):
                to[name] = to.get(name, 0) + count


# --- what is counted ---


def is_total(name: str) -> bool:
    """Whether a counter is one that never falls."""
    word, _, label = name.partition("\t")
    return label.partition("\t")[0].endswith(_TOTAL) if word == "protocol" else word not in GAUGES


def add(to: dict[Name, Number], more: Mapping[Name, Number]) -> None:
    """Add counters to others."""
    for name, count in more.items():
        to[name] = to.get(name, 0) + count


def _count(counts: dict[str, int], word: str) -> None:
    if word not in counts and len(counts) >= _WORDS:
        word = _OTHER
    counts[word] = counts.get(word, 0) + 1


class Histogram:
    """How many values were in each bucket, and their sum."""

    __slots__ = ("_bounds", "counts", "sum_us")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum_us = 0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.sum_us += int(seconds * 1e6)

    def counters(self, word: str, listener: str = "") -> dict[str, int]:
        """As said above; buckets that are empty are left out."""
        found = {f"{word}\t{place}\t{listener}": count for place, count in enumerate(self.counts) if count}
        found[f"{word}_us\t\t{listener}"] = self.sum_us
        return found


class ListenerStats:
    """What one listener's connections came to: a few additions for each connection, none for a message."""

    __slots__ = ("bytes_in", "bytes_out", "closed", "durations", "handshake_failed", "opened", "refused")

    def __init__(self) -> None:
        self.opened = self.bytes_in = self.bytes_out = 0
        self.closed: dict[str, int] = {}
        self.handshake_failed: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.durations = Histogram(DURATIONS)

    def ended(self, reason: str, phase: str, seconds: float, bytes_in: int, bytes_out: int) -> None:
        """A connection has ended, in this phase; `reason` may have more of it in parentheses."""
        reason, _, more = reason.partition(" (")
        _count(self.closed, reason)
        if phase in ("proxy", "tls"):
            _count(self.handshake_failed, more.removesuffix(")") or reason)
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out
        self.durations.add(seconds)

    def refuse(self, why: str) -> None:
        """One was refused."""
        _count(self.refused, why)

    def counters(self, listener: str) -> dict[str, int]:
        """As said above."""
        found = {
            f"opened\t\t{listener}": self.opened,
            f"in\t\t{listener}": self.bytes_in,
            f"out\t\t{listener}": self.bytes_out,
            **self.durations.counters("duration", listener),
        }
        for word, counts in (
            ("closed", self.closed),
            ("handshake_failed", self.handshake_failed),
            ("refused", self.refused),
        ):
            for label, count in counts.items():
                found[f"{word}\t{label}\t{listener}"] = count
        return found


class Lag:
    """How late the reactor calls what is due."""

    def __init__(self) -> None:
        self.histogram = Histogram(LAGS)
        self._call: Any = None

    def start(self, clock: Any) -> None:
        """Look from now on, by this clock (an IReactorTime)."""
        self._call = clock.callLater(_LAG_EVERY, self._look, clock, clock.seconds() + _LAG_EVERY)

    def _look(self, clock: Any, due: float) -> None:
        self.histogram.add(max(0.0, clock.seconds() - due))
        self.start(clock)

    def stop(self) -> None:
        """Look no more."""
        if self._call is not None and self._call.active():
            self._call.cancel()

    def counters(self) -> dict[str, int]:
        """As said above."""
        return self.histogram.counters("lag")


def factory_counters(counted: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """What a factory's `IMetrics.metrics` gave, as said above, and what is wrong with what is left out of it."""
    found: dict[str, float] = {}
    problem = ""
    for name, value in counted.items():
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
            problem = f"{name!a:.100} is no name of letters, digits and underscores, {_LONGEST_NAME} at the most"
        elif name + _TOTAL in counted:
            problem = f"{name!r} and {name + _TOTAL!r} are one name to Prometheus"
        elif not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            problem = f"{name!r} is {value!a:.100}, and not a number"
        elif len(found) == _MOST_OF_FACTORY:
            problem = f"there are more than {_MOST_OF_FACTORY}"
        else:
            found[f"protocol\t{name}\t"] = +value  # of True, 1
    return found, problem


def process_counters() -> dict[str, int]:
    """Those of this process; without /proc the memory is 0, and so are the descriptors."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "cpu_us": int((used.ru_utime + used.ru_stime) * 1e6),
        "memory": _memory(),
        "descriptors": _descriptors(),
        "descriptor_limit": limit,
    }


def _memory() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _descriptors() -> int:
    try:
        # Linux 6.2 has it as the size of the directory, proc(5); to list it takes 1 ms for 2,000.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return 0
