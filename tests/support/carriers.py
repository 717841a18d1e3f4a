"""A carrier whose operations the test completes."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.internet.defer import Deferred, succeed

from rtservice.hub.carrier import Claim, Local, Membership
from rtservice.interfaces import HubUnavailable, Members


class HeldCarrier:
    """Records the calls of a hub in `calls`. Each Deferred waits in `waiting` until the test fires it."""

    def __init__(self) -> None:
        self.up = False
        self.calls: list[tuple[Any, ...]] = []
        self.waiting: deque[Deferred[Any]] = deque()
        self.local: Any = None
        self.counts: dict[str, int] = {}

    def _hold(self, *call: Any) -> Deferred[Any]:
        self.calls.append(call)
        held: Deferred[Any] = Deferred()
        self.waiting.append(held)
        return held

    def start(self, reactor: Any, local: Local) -> None:
        self.local = local

    def stop(self) -> Deferred[None]:
        self.calls.append(("stop",))
        while self.waiting:
            self.waiting.popleft().errback(HubUnavailable("the carrier has stopped"))
        return succeed(None)

    def publish(self, topic: str, message: bytes) -> Deferred[None]:
        return self._hold("publish", topic, message)

    def subscribe(self, topic: str) -> Deferred[None]:
        return self._hold("subscribe", topic)

    def unsubscribe(self, topic: str) -> None:
        self.calls.append(("unsubscribe", topic))

    def join(self, membership: Membership) -> Deferred[None]:
        return self._hold("join", *membership)

    def leave(self, membership: Membership) -> None:
        self.calls.append(("leave", *membership))

    def members(self, topic: str) -> Deferred[Members]:
        return self._hold("members", topic)

    def claim(self, claim: Claim) -> Deferred[bool]:
        return self._hold("claim", *claim)

    def release(self, claim: Claim) -> None:
        self.calls.append(("release", *claim))

    def counters(self) -> dict[str, int]:
        return self.counts
