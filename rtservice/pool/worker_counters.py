"""The counters that a worker reports: their encoding in a heartbeat, the valid ones, and those that are shown.

A heartbeat is a JSON object. In it, CounterKey(name, label, listener) is the text `name` if the other two are empty, or
else `name`, `label` and `listener` with a tab between them. Names and labels contain no tab.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rtservice.hub.carrier import HEARTBEATS
from rtservice.process.counters import (
    DURATIONS,
    HUB_GAUGES,
    HUB_TOTALS,
    LAGS,
    LARGEST_OF_FACTORY,
    MOST_LABELS,
    MOST_OF_FACTORY,
    OTHER,
    PHASES,
    CounterKey,
    is_factory_name,
)

_PLAIN = (
    *("open", "ended", "aborted", "drain_ended", "drain_aborted"),
    *("cpu_us", "memory", "descriptors", "descriptor_limit", "dropped", "lag_us"),
    "hub_heartbeat_us",
)
_OPEN_LABELS = frozenset(("closed", "handshake_failed", "refused"))  # names whose labels are not a fixed set
_LONGEST_LABEL = 64

# Limits of a slot over all its workers: labels, and names of a hosted factory. A worker has up to MOST_LABELS and
# MOST_OF_FACTORY; after a reload they may differ.
_SLOT_LABELS, _SLOT_NAMES = 2 * MOST_LABELS, 3 * MOST_OF_FACTORY

_LARGEST_COUNT = 2**63 - 1


def encode_key(key: CounterKey) -> str:
    """Return the key of a counter as in a heartbeat."""
    name, label, listener = key
    return f"{name}\t{label}\t{listener}" if label or listener else name


def encode_counters(counters: Mapping[CounterKey, float]) -> dict[str, float]:
    """Return counters as in a heartbeat."""
    return {encode_key(key): count for key, count in counters.items()}


class CounterDecoder:
    """Decodes the counters of one worker. `listeners` are the names of its listeners. New labels are limited."""

    def __init__(self, listeners: Collection[str]) -> None:
        self._listeners = frozenset(listeners)
        keys = [CounterKey(name) for name in _PLAIN]
        keys += [CounterKey("lag", str(bucket)) for bucket in range(len(LAGS) + 1)]
        keys += [CounterKey("hub", name) for name in (*HUB_TOTALS, *HUB_GAUGES)]
        keys += [CounterKey("hub_heartbeat", str(bucket)) for bucket in range(len(HEARTBEATS) + 1)]
        for listener in self._listeners:
            keys += [CounterKey(name, "", listener) for name in ("opened", "in", "out", "duration_us")]
            keys += [CounterKey("duration", str(bucket), listener) for bucket in range(len(DURATIONS) + 1)]
            keys += [CounterKey("phase", phase, listener) for phase in PHASES]
        self._known = {encode_key(key): key for key in keys}
        self._labels: dict[tuple[str, str], int] = {}  # the number of labels by name and listener

    def decode(self, counters: Mapping[str, Any]) -> dict[CounterKey, float]:
        """Return the counters of a heartbeat. Raises ValueError with a short text if a key or value is invalid."""
        found: dict[CounterKey, float] = {}
        for text, count in counters.items():
            key = self._known.get(text)
            if key is None:
                key = self._decode_key(text)
            if not _is_valid_count(key, count):
                raise ValueError(f"an invalid count of {text[:40]!a}")
            found[key] = count
        return found

    def _decode_key(self, text: str) -> CounterKey:
        key = CounterKey(*text.split("\t", 2))
        if key.name == "protocol":
            most, valid = MOST_OF_FACTORY, not key.listener and is_factory_name(key.label)
        else:
            most, valid = MOST_LABELS + 1, key.name in _OPEN_LABELS and key.listener in self._listeners
            valid = valid and 0 < len(key.label) <= _LONGEST_LABEL and key.label.isprintable()
        if not valid or encode_key(key) != text:
            raise ValueError(f"an unknown counter {text[:40]!a}")
        place = key.name, key.listener
        count = self._labels[place] = self._labels.get(place, 0) + 1
        if count > most:
            raise ValueError(f"more than {most} labels of {key.name!r}")
        self._known[text] = key
        return key


def _is_valid_count(key: CounterKey, count: Any) -> bool:
    if key.name == "protocol":
        return type(count) in (int, float) and abs(count) <= LARGEST_OF_FACTORY  # NaN is not
    least = -1 if key.name == "descriptor_limit" else 0
    return type(count) is int and least <= count <= _LARGEST_COUNT


class SlotCounters:
    """Bounds the counters that are shown for a slot, over all its workers.

    Each worker may have different labels. The first ones of a slot are shown under their own keys. Later labels are
    counted as `other`, and later names of a hosted factory are not shown.
    """

    def __init__(self) -> None:
        self._shown: set[CounterKey] = set()  # without those whose number is fixed
        self._labels: dict[tuple[str, str], int] = {}

    def shown(self, key: CounterKey) -> CounterKey | None:
        """Return the key under which a valid counter is shown, or None if it is not shown."""
        if key in self._shown:
            return key
        instead: CounterKey | None
        if key.name == "protocol":
            most, instead = _SLOT_NAMES, None
        elif key.name in _OPEN_LABELS and key.label != OTHER:
            most, instead = _SLOT_LABELS, key._replace(label=OTHER)
        else:
            return key
        place = key.name, key.listener
        if self._labels.get(place, 0) >= most:
            return instead
        self._labels[place] = self._labels.get(place, 0) + 1
        self._shown.add(key)
        return key

    def reserve(self, keys: Iterable[CounterKey]) -> None:
        """Reserve a place for each of these keys, as long as places are free."""
        for key in keys:
            self.shown(key)

    def add(self, totals: dict[CounterKey, float], counters: Mapping[CounterKey, float]) -> None:
        """Add a worker's counters to totals, in place, under the keys that are shown."""
        for key, count in counters.items():
            shown = self.shown(key)
            if shown is not None:
                totals[shown] = totals.get(shown, 0) + count
