"""The hub of a service of one process: nothing is carried."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from twisted.internet.defer import Deferred, succeed

from rtservice.hub.carrier import MOST_MEMBERS, Claim, Local, Membership
from rtservice.interfaces import Members


class Presence:
    """The memberships of one or more processes: by topic, then by the process and the number of the membership."""

    def __init__(self) -> None:
        self._topics: dict[str, dict[tuple[object, int], bytes]] = {}

    def add(self, process: object, membership: Membership) -> None:
        """Add a membership of a process."""
        self._topics.setdefault(membership.topic, {})[process, membership.number] = membership.member

    def remove(self, process: object, topic: str, number: int) -> None:
        """Remove a membership, if it is there."""
        members = self._topics.get(topic)
        if members is not None and members.pop((process, number), None) is not None and not members:
            del self._topics[topic]

    def members(self, topic: str) -> Members:
        """Return the members of a topic."""
        members = self._topics.get(topic, {})
        return Members(tuple(islice(members.values(), MOST_MEMBERS)), len(members))

    def __len__(self) -> int:
        return sum(map(len, self._topics.values()))


class LocalCarrier:
    """A carrier for one process."""

    up = True

    def __init__(self) -> None:
        self._presence = Presence()
        self._claimed: set[str] = set()
        self._local: Any = None  # set by `start`

    def start(self, reactor: Any, local: Local) -> None:
        """Keep the hub."""
        self._local = local

    def stop(self) -> Deferred[None]:
        """Do nothing: everything accepted is delivered already."""
        return succeed(None)

    def publish(self, topic: str, message: bytes) -> Deferred[None]:
        """Deliver the message."""
        self._local.deliver(topic, message)
        return succeed(None)

    def subscribe(self, topic: str) -> Deferred[None]:
        """Do nothing: every message is delivered."""
        return succeed(None)

    def unsubscribe(self, topic: str) -> None:
        """Do nothing: the hub ignores messages without receivers."""

    def join(self, membership: Membership) -> Deferred[None]:
        """Add a member."""
        self._presence.add(None, membership)
        return succeed(None)

    def leave(self, membership: Membership) -> None:
        """Remove a member."""
        self._presence.remove(None, membership.topic, membership.number)

    def members(self, topic: str) -> Deferred[Members]:
        """Return the members of a topic."""
        return succeed(self._presence.members(topic))

    def claim(self, claim: Claim) -> Deferred[bool]:
        """Claim a key, unless it is held."""
        free = claim.key not in self._claimed
        self._claimed.add(claim.key)
        return succeed(free)

    def release(self, claim: Claim) -> None:
        """End a claim."""
        self._claimed.discard(claim.key)

    def counters(self) -> Mapping[str, int]:
        """Return nothing: there is no connection to count."""
        return {}
