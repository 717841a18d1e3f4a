"""An engine in memory that several hubs of one test share, in place of workers or of Redis.

With a latency, each operation takes this many seconds to the engine, and as many back. The test can disconnect the
engine, kill a process, and drop what is on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed

from rtservice.hub.carrier import Claim, Local, Membership
from rtservice.hub.local import Presence
from rtservice.interfaces import HubUnavailable, Members


class Engine:
    """The state that all processes share."""

    def __init__(self, clock: Any, latency: float = 0.0) -> None:
        self.clock = clock
        self.latency = latency
        self.up = True
        self.presence = Presence()
        self.claimed: dict[str, tuple[EngineCarrier, int]] = {}
        self.carriers: list[EngineCarrier] = []
        self.pending: list[tuple[Deferred[Any], Callable[[], Any]]] = []  # operations that the engine has not answered
        self.operations = 0

    def disconnect(self) -> None:
        """End all connections: what is on the way is lost, and operations that cannot wait fail."""
        self.up = False
        pending, self.pending = self.pending, []
        for answer, _ in pending:
            if not answer.called:
                answer.errback(HubUnavailable("disconnected"))

    def connect(self) -> None:
        """Connect all processes again."""
        self.up = True
        for carrier in self.carriers:
            carrier.connected()

    def ask(self, operation: Callable[[], Any]) -> Deferred[Any]:
        """Run an operation in the engine, and return a Deferred of its result."""
        self.operations += 1
        if not self.up:
            return fail(HubUnavailable("disconnected"))
        if not self.latency:
            return succeed(operation())
        answer: Deferred[Any] = Deferred()
        self.pending.append((answer, operation))
        self.clock.callLater(2 * self.latency, self._answer, answer, operation)
        return answer

    def _answer(self, answer: Deferred[Any], operation: Callable[[], Any]) -> None:
        if (answer, operation) in self.pending:
            self.pending.remove((answer, operation))
            result = operation()
            if not answer.called:  # it was cancelled
                answer.callback(result)


class EngineCarrier:
    """A Carrier of one process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._local: Any = None
        self._wanted: set[str] = set()
        self._topics: set[str] = set()  # of these, those whose messages arrive
        self._waiting: list[tuple[Deferred[None], Callable[[], object]]] = []
        engine.carriers.append(self)

    @property
    def up(self) -> bool:
        return self._engine.up

    def start(self, reactor: Any, local: Local) -> None:
        self._local = local

    def stop(self) -> Deferred[None]:
        self.kill()
        return succeed(None)

    def kill(self) -> None:
        """End the process: its members and claims disappear."""
        engine = self._engine
        engine.carriers.remove(self)
        for membership in self._local.memberships():
            engine.presence.remove(self, membership.topic, membership.number)
        engine.claimed = {key: holder for key, holder in engine.claimed.items() if holder[0] is not self}

    def connected(self) -> None:
        """Connect again: operations that have waited are done, and everything may have been missed."""
        waiting, self._waiting = self._waiting, []
        for answer, operation in waiting:
            operation()
            if not answer.called:
                answer.callback(None)
        self._local.gap_everywhere()

    def _when_up(self, operation: Callable[[], object]) -> Deferred[None]:
        answer: Deferred[None] = Deferred()
        if self._engine.up and not self._engine.latency:
            operation()
            answer.callback(None)
        elif self._engine.up:
            self._engine.clock.callLater(2 * self._engine.latency, self._now_or_later, answer, operation)
        else:
            self._waiting.append((answer, operation))
        return answer

    def _now_or_later(self, answer: Deferred[None], operation: Callable[[], object]) -> None:
        if self._engine.up:
            operation()
            if not answer.called:
                answer.callback(None)
        else:
            self._waiting.append((answer, operation))

    def publish(self, topic: str, message: bytes) -> Deferred[None]:
        return self._engine.ask(lambda: self._publish(topic, message))

    def _publish(self, topic: str, message: bytes) -> None:
        for carrier in self._engine.carriers:
            if topic in carrier._topics:
                carrier._local.deliver(topic, message)

    def subscribe(self, topic: str) -> Deferred[None]:
        self._wanted.add(topic)
        return self._when_up(lambda: self._topics.add(topic) if topic in self._wanted else None)

    def unsubscribe(self, topic: str) -> None:
        self._wanted.discard(topic)
        self._topics.discard(topic)

    def join(self, membership: Membership) -> Deferred[None]:
        return self._when_up(lambda: self._join(membership))

    def _join(self, membership: Membership) -> None:
        if membership in self._local.memberships():
            self._engine.presence.add(self, membership)

    def leave(self, membership: Membership) -> None:
        self._engine.presence.remove(self, membership.topic, membership.number)

    def members(self, topic: str) -> Deferred[Members]:
        return self._engine.ask(lambda: self._engine.presence.members(topic))

    def claim(self, claim: Claim) -> Deferred[bool]:
        return self._engine.ask(lambda: self._claim(claim))

    def _claim(self, claim: Claim) -> bool:
        holder = self, claim.number
        return self._engine.claimed.setdefault(claim.key, holder) == holder

    def release(self, claim: Claim) -> None:
        if self._engine.claimed.get(claim.key) == (self, claim.number):
            del self._engine.claimed[claim.key]

    def lose_claims(self) -> None:
        """Report all claims as lost, and release them."""
        for claim in list(self._local.claims()):
            self.release(claim)
            self._local.lose(claim.number)

    def gap(self, topic: str) -> None:
        """Report a gap to this process."""
        self._local.gap(topic)

    def deliver(self, topic: str, message: bytes) -> None:
        """Deliver a message to this process, as if another one had published it."""
        self._local.deliver(topic, message)

    def counters(self) -> Mapping[str, int]:
        return {}
