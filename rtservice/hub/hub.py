"""The hub of a process: checks arguments, keeps what this process uses, and gives the rest to a carrier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.hub.carrier import Carrier, Claim, Membership
from rtservice.hub.fanout import Fanout, Subscription
from rtservice.interfaces import (
    HubFull,
    HubUnavailable,
    IClaim,
    IHub,
    IMembership,
    IReceiver,
    ISubscription,
    Members,
)

# Limits in bytes: of a topic or key in UTF-8, of a message, and of a member or holder.
LONGEST_TOPIC, LONGEST_MESSAGE, LONGEST_MEMBER = 200, 1024 * 1024, 1024


def _check_text(what: str, text: object) -> None:
    """Raise TypeError or ValueError if a topic or key is invalid."""
    if not isinstance(text, str):
        raise TypeError(f"{what} of type {type(text).__name__}; it must be str")
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} {text[:20]!a}: not valid Unicode") from None
    if not 0 < size <= LONGEST_TOPIC:
        raise ValueError(f"{what} of {size} bytes; it must have 1 to {LONGEST_TOPIC} bytes in UTF-8")


def _check_bytes(what: str, value: object, longest: int) -> None:
    """Raise TypeError or ValueError if a message, member or holder is invalid."""
    if not isinstance(value, bytes):
        raise TypeError(f"{what} of type {type(value).__name__}; it must be bytes")
    if len(value) > longest:
        raise ValueError(f"{what} of {len(value)} bytes; it must have at most {longest}")


@implementer(ISubscription)
class _Subscription:
    """The handle of a subscription for its subscriber."""

    __slots__ = ("_hub", "_subscription")

    def __init__(self, hub: Hub, subscription: Subscription) -> None:
        self._hub = hub
        self._subscription = subscription

    def cancel(self) -> None:
        self._hub._unsubscribe(self._subscription)


@implementer(IMembership)
class _Membership:
    """The handle of a membership for its owner."""

    __slots__ = ("_hub", "_number")

    def __init__(self, hub: Hub, number: int) -> None:
        self._hub = hub
        self._number = number

    def leave(self) -> None:
        self._hub._leave(self._number)


@implementer(IClaim)
class _Claim:
    """The handle of a claim for its holder."""

    __slots__ = ("_hub", "_number", "lost")

    def __init__(self, hub: Hub, number: int) -> None:
        self._hub = hub
        self._number = number
        self.lost: Deferred[None] = Deferred()

    def release(self) -> None:
        self._hub._release(self._number)


@implementer(IHub)
class Hub:
    """See IHub, and `Local` in `carrier.py`. `start` is called before everything else, and `stop` last."""

    def __init__(self, carrier: Carrier, log: Logger) -> None:
        self._carrier = carrier
        self._fanout = Fanout(log)
        # Subscribed topics. One that is not active yet has its subscriptions, and the functions that finish them then.
        self._active: dict[str, dict[Subscription, Callable[[object], None]] | None] = {}
        self._memberships: dict[int, Membership] = {}
        self._claims: dict[int, tuple[Claim, _Claim]] = {}  # held ones
        self._number = 0  # the last one of a membership or claim
        self._published = self._failed = 0
        self._state = "new"
        self._waiting: set[Deferred[Any]] = set()  # operations that `stop` must end

    # --- life ---

    @property
    def up(self) -> bool:
        """Whether the hub works now."""
        return self._state == "started" and self._carrier.up

    @property
    def started(self) -> bool:
        """Whether the hub is in use in this process."""
        return self._state == "started"

    @property
    def used(self) -> bool:
        """Whether the hub is in use in this process, or was."""
        return self._state != "new"

    def start(self, reactor: Any) -> None:
        """Begin to work."""
        self._state = "started"
        self._fanout.start(reactor)
        self._carrier.start(reactor, self)

    def stop(self) -> Deferred[None]:
        """Stop delivering, and send what was accepted. Fires when that is done."""
        self._state = "stopped"
        self._fanout.stop()
        self._active.clear()
        self._memberships.clear()
        self._claims.clear()
        stopped = self._carrier.stop()
        for waiting in list(self._waiting):  # a subscription that waits for the engine, for example
            _fail_quietly(waiting, HubUnavailable("the hub has stopped"))
        self._waiting.clear()
        return stopped

    def counters(self) -> dict[str, int]:
        """Return the counters of this process.

        `published` and `publish_failed` messages; `delivered` messages and `gaps`, counted for each receiver; messages
        `dropped` by this process; `topics`, `subscriptions`, `members` and `claims` of this process; `up`, 0 or 1; and
        those of the carrier. A counter of the same name in both is added.
        """
        fanout = self._fanout
        counters = {
            "up": int(self.up),
            "published": self._published,
            "publish_failed": self._failed,
            "delivered": fanout.delivered,
            "dropped": fanout.dropped,
            "gaps": fanout.gaps,
            "topics": len(self._active),
            "subscriptions": fanout.subscriptions,
            "members": len(self._memberships),
            "claims": len(self._claims),
        }
        for name, count in self._carrier.counters().items():
            counters[name] = counters.get(name, 0) + count
        return counters

    # --- for protocols: see IHub ---

    def publish(self, topic: str, message: bytes) -> Deferred[None]:
        _check_text("topic", topic)
        _check_bytes("message", message, LONGEST_MESSAGE)
        if self._state != "started":
            return fail(HubUnavailable(f"the hub is {self._state}"))
        if self._fanout.is_full(topic, message):
            self._failed += 1
            return fail(HubFull(f"too many messages of the topic {topic} wait for receivers"))
        published = self._carrier.publish(topic, message)
        if published.called and not isinstance(published.result, Failure):  # the usual case without a callback
            self._published += 1
        else:
            published.addCallbacks(self._count_published, self._count_failed)
        return published

    def _count_published(self, result: None) -> None:
        self._published += 1

    def _count_failed(self, failure: Failure) -> Failure:
        self._failed += 1
        return failure

    def subscribe(self, topic: str, receiver: Any) -> Deferred[ISubscription]:
        _check_text("topic", topic)
        if not IReceiver.providedBy(receiver) and not (hasattr(receiver, "received") and hasattr(receiver, "gap")):
            raise TypeError(f"receiver of type {type(receiver).__name__}; it must provide IReceiver")
        if self._state != "started":
            return fail(HubUnavailable(f"the hub is {self._state}"))
        subscription = self._fanout.add(topic, receiver)
        done: Deferred[ISubscription] = self._operation(lambda: self._unsubscribe(subscription))

        def finish(outcome: object) -> None:
            if isinstance(outcome, Failure):
                self._fanout.remove(subscription)
            self._pass(outcome, done, _Subscription(self, subscription))

        if topic not in self._active:
            waiting = self._active[topic] = {subscription: finish}
            self._carrier.subscribe(topic).addBoth(self._activated, topic, waiting)
        elif (others := self._active[topic]) is not None:
            others[subscription] = finish
        else:
            finish(None)
        return done

    def _activated(self, outcome: object, topic: str, waiting: dict[Subscription, Callable[[object], None]]) -> None:
        if self._active.get(topic) is waiting:  # it was not unsubscribed meanwhile
            if isinstance(outcome, Failure):
                del self._active[topic]
            else:
                self._active[topic] = None
        for finish in list(waiting.values()):
            finish(outcome)

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._fanout.remove(subscription)
        topic = subscription.topic
        waiting = self._active.get(topic)
        if waiting is not None:
            waiting.pop(subscription, None)
        if self._state == "started" and topic in self._active and not self._fanout.has(topic):
            del self._active[topic]
            self._carrier.unsubscribe(topic)

    def join(self, topic: str, member: bytes) -> Deferred[IMembership]:
        _check_text("topic", topic)
        _check_bytes("member", member, LONGEST_MEMBER)
        if self._state != "started":
            return fail(HubUnavailable(f"the hub is {self._state}"))
        number = self._next_number()
        membership = self._memberships[number] = Membership(number, topic, member)
        done: Deferred[IMembership] = self._operation(lambda: self._leave(number))
        joined = self._carrier.join(membership)
        joined.addErrback(self._not_joined, number).addBoth(self._pass, done, _Membership(self, number))
        return done

    def _not_joined(self, failure: Failure, number: int) -> Failure:
        self._memberships.pop(number, None)
        return failure

    def _leave(self, number: int) -> None:
        membership = self._memberships.pop(number, None)
        if membership is not None:
            self._carrier.leave(membership)

    def members(self, topic: str) -> Deferred[Members]:
        _check_text("topic", topic)
        if self._state != "started":
            return fail(HubUnavailable(f"the hub is {self._state}"))
        return self._carrier.members(topic)

    def claim(self, key: str, holder: bytes) -> Deferred[IClaim | None]:
        _check_text("key", key)
        _check_bytes("holder", holder, LONGEST_MEMBER)
        if self._state != "started":
            return fail(HubUnavailable(f"the hub is {self._state}"))
        claim = Claim(self._next_number(), key, holder)
        done: Deferred[IClaim | None] = Deferred(_cancel)
        self._carrier.claim(claim).addCallback(self._claimed, claim).addBoth(self._pass_claim, claim, done)
        return done

    def _claimed(self, granted: bool, claim: Claim) -> _Claim | None:
        if not granted:
            return None
        held = _Claim(self, claim.number)
        self._claims[claim.number] = claim, held
        return held

    def _pass_claim(self, result: Any, claim: Claim, done: Deferred[IClaim | None]) -> None:
        if done.called:  # it was cancelled, so its caller never gets the claim
            self._release(claim.number)
        else:
            done.callback(result)

    def _release(self, number: int) -> None:
        claim, _ = self._claims.pop(number, (None, None))
        if claim is not None:
            self._carrier.release(claim)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    # --- operations that can wait ---

    def _operation(self, cancel: Callable[[], None]) -> Deferred[Any]:
        """Return a Deferred that `stop` fails, and whose cancellation calls `cancel`."""

        def cancelled(deferred: Deferred[Any]) -> None:
            self._waiting.discard(deferred)
            cancel()
            _cancel(deferred)

        deferred: Deferred[Any] = Deferred(cancelled)
        self._waiting.add(deferred)
        return deferred

    def _finish(self, deferred: Deferred[Any], result: object) -> None:
        if deferred in self._waiting:
            self._waiting.discard(deferred)
            deferred.callback(result)

    def _pass(self, outcome: object, deferred: Deferred[Any], result: object) -> object:
        """Fire `deferred` with the result, or with the failure that is the outcome."""
        self._finish(deferred, outcome if isinstance(outcome, Failure) else result)
        return None

    # --- for the carrier: see Local ---

    def deliver(self, topic: str, message: bytes) -> None:
        self._fanout.deliver(topic, message)

    def gap(self, topic: str) -> None:
        self._fanout.gap(topic)

    def gap_everywhere(self) -> None:
        self._fanout.gap_everywhere()

    def topics(self) -> Iterable[str]:
        return list(self._active)

    def memberships(self) -> Iterable[Membership]:
        return list(self._memberships.values())

    def claims(self) -> Iterable[Claim]:
        return [claim for claim, _ in self._claims.values()]

    def lose(self, number: int) -> None:
        _, held = self._claims.pop(number, (None, None))
        if held is not None:
            held.lost.callback(None)


def _cancel(deferred: Deferred[Any]) -> None:
    """Fail a Deferred that its caller has cancelled."""
    _fail_quietly(deferred, CancelledError())


def _fail_quietly(deferred: Deferred[Any], error: Exception) -> None:
    """Fail a Deferred. If its callbacks do not handle this error, Twisted does not log it.

    Most callers that cancel an operation, or that are there when the hub stops, do not wait for its outcome.
    """
    deferred.errback(error)
    deferred.addErrback(lambda failure: failure.trap(type(error)) and None)
