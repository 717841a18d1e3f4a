"""Receivers that record, and a load of numbered messages whose delivery is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet import reactor
from twisted.python.failure import Failure

from rtservice.hub.hub import Hub
from rtservice.interfaces import HubFull, HubUnavailable

GAP = "gap"


class Receiver:
    """Records messages, and GAP for gaps."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def received(self, topic: str, message: bytes) -> None:
        self.got.append(message)

    def gap(self, topic: str) -> None:
        self.got.append(GAP)

    @property
    def messages(self) -> list[bytes]:
        return [each for each in self.got if each is not GAP]

    @property
    def gaps(self) -> int:
        return self.got.count(GAP)


class Load:
    """Publishes numbered messages to topics through each hub, about 500 each second and topic, until `stop`."""

    def __init__(self, hubs: Sequence[Hub], topics: Sequence[str]) -> None:
        self.hubs, self.topics = hubs, topics
        self.number = 0
        self.accepted = 0
        self.failed: set[tuple[int, int]] = set()  # hub and number, in any topic
        self.receivers = {(at, topic): Receiver() for at in range(len(hubs)) for topic in topics}
        self.call: Any = None

    async def start(self) -> None:
        for (at, topic), receiver in self.receivers.items():
            await self.hubs[at].subscribe(topic, receiver)
        self._publish()

    def _publish(self) -> None:
        self.number += 1
        for at, hub in enumerate(self.hubs):
            for topic in self.topics:
                published = hub.publish(topic, b"%d %d" % (at, self.number))
                published.addCallbacks(self._accepted, self._failed, errbackArgs=(at, self.number))
        self.call = reactor.callLater(0.002, self._publish)

    def _accepted(self, _: None) -> None:
        self.accepted += 1

    def _failed(self, failure: Failure, at: int, number: int) -> None:
        failure.trap(HubUnavailable, HubFull)
        self.failed.add((at, number))

    def stop(self) -> None:
        """Publish no more."""
        if self.call is not None:
            self.call.cancel()
            self.call = None

    def complete(self) -> bool:
        """Return whether each receiver has got the last message of each hub."""
        last = {b"%d %d" % (at, self.number) for at in range(len(self.hubs))}
        most = 20 * len(self.hubs)
        return all(last <= set(receiver.got[-most:]) for receiver in self.receivers.values())

    def check(self) -> None:
        """Check each receiver: in order, no message twice, and each loss announced by a gap or a failed publish."""
        for key, receiver in self.receivers.items():
            last = [0] * len(self.hubs)
            excused = [False] * len(self.hubs)
            for got in receiver.got:
                if got is GAP:
                    excused = [True] * len(self.hubs)
                    continue
                at, number = map(int, got.split())
                assert number > last[at], f"{key}: {number} of {at} after {last[at]}"
                if not excused[at]:
                    missing = [each for each in range(last[at] + 1, number) if (at, each) not in self.failed]
                    assert not missing, f"{key}: {missing[:5]} of {at} are missing without a gap"
                last[at], excused[at] = number, False
