"""The two interfaces between the hub of a process and what carries it to other processes.

factory ──→ Hub ──→ Carrier: LocalCarrier   this process only
             ↑         │     MeshCarrier    workers of one machine
             └─ Local ←┘     RedisCarrier   processes on several machines

The Hub checks arguments, keeps the state of this process, and delivers to receivers. A carrier has no state of the
hub's user: when it connects again, it reads the subscribed topics, memberships and claims from its `Local`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from twisted.internet.defer import Deferred

from rtservice.histogram import Histogram
from rtservice.interfaces import Members

# The maximum number of members in the answer of `members`.
MOST_MEMBERS = 1000

# Upper bounds of the buckets of the heartbeat's time, in seconds; the last bucket has none. And how the names of their
# counters begin.
HEARTBEATS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
HEARTBEAT = "heartbeat_"


class Membership(NamedTuple):
    """A member of a topic. `number` identifies it in its process."""

    number: int
    topic: str
    member: bytes


class Claim(NamedTuple):
    """A claim of a key. `number` identifies it in its process."""

    number: int
    key: str
    holder: bytes


class Local(Protocol):
    """The hub of this process, as a carrier sees it."""

    def deliver(self, topic: str, message: bytes) -> None:
        """Deliver a message to the receivers of this process. Without a receiver it is ignored.

        Never calls a receiver before it returns. If too many messages wait, the message is dropped, and the receivers
        get a gap.
        """

    def gap(self, topic: str) -> None:
        """Report a gap, between the messages delivered so far and later ones, to the receivers of a topic."""

    def gap_everywhere(self) -> None:
        """Report a gap to every receiver."""

    def topics(self) -> Iterable[str]:
        """Return the topics that have receivers in this process: those for which `subscribe` was called last."""

    def memberships(self) -> Iterable[Membership]:
        """Return the memberships of this process, including those whose `join` is not accepted yet."""

    def claims(self) -> Iterable[Claim]:
        """Return the claims that this process holds, without requests in progress."""

    def lose(self, number: int) -> None:
        """Report that a claim of this process is lost."""


class Carrier(Protocol):
    """Carries messages, presence and claims between processes.

    Called in the thread of the reactor. No method raises. Deferreds fail with HubUnavailable or HubFull only, and may
    have fired when they are returned.
    """

    @property
    def up(self) -> bool:
        """Whether the carrier works now. It is False before `start` has connected it."""

    def start(self, reactor: Any, local: Local) -> None:
        """Connect, and stay connected. Called once, before all other methods."""

    def stop(self) -> Deferred[None]:
        """Send what was accepted, for some seconds at most, and disconnect.

        Deferreds that have not fired fail with HubUnavailable. Fires when that is done. No other method is called
        after it.
        """

    def publish(self, topic: str, message: bytes) -> Deferred[None]:
        """Accept a message for all processes. The carrier calls `Local.deliver` for those of this process, too."""

    def subscribe(self, topic: str) -> Deferred[None]:
        """Begin to deliver a topic to this process. Fires when that is active; waits while the carrier is not up."""

    def unsubscribe(self, topic: str) -> None:
        """End a `subscribe`. The Deferred of that, if it has not fired, need not fire any more."""

    def join(self, membership: Membership) -> Deferred[None]:
        """Add a member. Fires when all processes show it; waits while the carrier is not up."""

    def leave(self, membership: Membership) -> None:
        """Remove a member. The Deferred of `join`, if it has not fired, need not fire any more."""

    def members(self, topic: str) -> Deferred[Members]:
        """Return the members of a topic, at most MOST_MEMBERS and their total number."""

    def claim(self, claim: Claim) -> Deferred[bool]:
        """Claim a key. Fires with whether this process holds it now: another claim of this process counts, too.

        If the Deferred fails, the carrier releases the key in case the claim was granted.
        """

    def release(self, claim: Claim) -> None:
        """End a claim."""

    def counters(self) -> Mapping[str, int]:
        """Return counters of this carrier by name, such as `reconnects`. See `Hub.counters`.

        The accepted names are HUB_TOTALS and HUB_GAUGES of `process/counters.py`, and those of `heartbeat_counters`.
        """


def heartbeat_counters(heartbeats: Histogram) -> dict[str, int]:
    """Return a histogram with the bounds HEARTBEATS as counters of a carrier.

    These are `heartbeat_0` to `heartbeat_11`, the numbers of heartbeats by bucket, without empty ones; and
    `heartbeat_us`, the sum of their times in microseconds.
    """
    found = {f"{HEARTBEAT}{bucket}": count for bucket, count in enumerate(heartbeats.counts) if count}
    found[f"{HEARTBEAT}us"] = heartbeats.sum_us
    return found
