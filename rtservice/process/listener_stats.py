"""The counters of one listener's connections."""

from __future__ import annotations

from rtservice.histogram import Histogram
from rtservice.net.phases import PROXY, TLS, Phase
from rtservice.process.counters import DURATIONS, MOST_LABELS, OTHER, CounterKey, histogram_counters


class ListenerStats:
    """Totals of one listener. A connection costs a few additions, and a message none."""

    __slots__ = ("bytes_in", "bytes_out", "closed", "durations", "handshake_failed", "opened", "refused")

    def __init__(self) -> None:
        self.opened = self.bytes_in = self.bytes_out = 0  # bytes of connections that have ended
        self.closed: dict[str, int] = {}  # by reason
        self.handshake_failed: dict[str, int] = {}  # by kind
        self.refused: dict[str, int] = {}  # by reason
        self.durations = Histogram(DURATIONS)

    def add_closed(self, reason: str, phase: Phase, seconds: float, bytes_in: int, bytes_out: int) -> None:
        """Count the end of a connection in this phase.

        `reason` is what `process.endings` returns. Its text in parentheses is the kind of a failed handshake.
        """
        reason, _, details = reason.partition(" (")
        _count(self.closed, reason)
        if phase is TLS or phase is PROXY:
            _count(self.handshake_failed, details.removesuffix(")") or reason)
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out
        self.durations.add(seconds)

    def add_refused(self, reason: str) -> None:
        """Count a client that was refused for this reason."""
        _count(self.refused, reason)

    def counters(self, listener: str) -> dict[CounterKey, int]:
        """Return the counters of this listener, without those of open connections."""
        found = {
            CounterKey("opened", "", listener): self.opened,
            CounterKey("in", "", listener): self.bytes_in,
            CounterKey("out", "", listener): self.bytes_out,
            **histogram_counters("duration", self.durations, listener),
        }
        for name, counts in (
            ("closed", self.closed),
            ("handshake_failed", self.handshake_failed),
            ("refused", self.refused),
        ):
            for label, count in counts.items():
                found[CounterKey(name, label, listener)] = count
        return found


def _count(counts: dict[str, int], label: str) -> None:
    if label not in counts and len(counts) >= MOST_LABELS:
        label = OTHER
    counts[label] = counts.get(label, 0) + 1
