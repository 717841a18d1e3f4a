"""Deliver messages to the receivers of this process, in slices between which the reactor handles other events.

Each topic has a queue. A message is delivered to all receivers of its topic before the next one is begun, in as many
turns as that takes. Topics with waiting messages take turns after each chunk of deliveries, so a topic with many
receivers does not delay the others.

    deliver ──→ queue of the topic ──→ batch: receivers not yet called ──→ received, gap
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from time import perf_counter
from typing import Any

from twisted.logger import Logger

from rtservice.escaping import escaped
from rtservice.events import HUB_RECEIVER_FAILED
from rtservice.log_rate import LogRateLimit

# Seconds of deliveries in one turn of the reactor; and deliveries between two readings of the clock. A delivery that
# writes 64 bytes to a connection takes 1 µs, and 4 more at the end of the turn for the system call.
TURN_SECONDS, CHUNK = 0.001, 64

# Limits of waiting messages in bytes: of one topic, and of all. A message counts as its length and COST bytes.
TOPIC_LIMIT, TOTAL_LIMIT, COST = 4 * 1024 * 1024, 64 * 1024 * 1024, 100

# Records of failed receivers in ten seconds.
_MOST_FAILURES = 10

_GAP = None  # in a queue, instead of a message


def _ignore(*args: object) -> None:
    """Do nothing: replaces the methods of the receiver when a subscription is cancelled."""


class Subscription:
    """A receiver of a topic. It is active from the messages on that are published after it was added."""

    __slots__ = ("active", "gap", "received", "receiver", "topic")

    def __init__(self, topic: str, receiver: Any) -> None:
        self.topic = topic
        self.receiver = receiver
        # Bound once, since they are called for each message.
        self.received: Callable[[str, bytes], object] = receiver.received
        self.gap: Callable[[str], object] = receiver.gap
        self.active = True

    def end(self) -> None:
        """Call the receiver no more."""
        self.active = False
        self.received = self.gap = _ignore
        self.receiver = None


class _Topic:
    """The receivers of a topic, and what is to be delivered to them."""

    __slots__ = ("batch", "item", "name", "queue", "receivers", "rest", "scheduled", "size", "subscriptions")

    def __init__(self, name: str) -> None:
        self.name = name
        self.subscriptions = 0  # active ones: receivers, and those in the queue
        self.receivers: dict[Subscription, None] = {}
        self.batch: list[Subscription] | None = None  # a copy of them, until they change
        self.queue: deque[bytes | Subscription | None] = deque()  # messages, gaps, and receivers of what follows
        self.size = 0  # of the messages in the queue and of `item`, as limited
        self.item: bytes | None = None  # the message or gap that is being delivered
        self.rest: Iterator[Subscription] | None = None  # the receivers that have not got `item`
        self.scheduled = False


class Fanout:
    """The receivers of this process, by topic."""

    def __init__(self, log: Logger, measure: Callable[[], float] = perf_counter) -> None:
        """`measure` returns the time in seconds, by which turns are limited."""
        self.delivered = self.dropped = self.gaps = 0
        self.subscriptions = 0  # active ones
        self._log = log
        self._measure = measure
        self._reactor: Any = None  # set by `start`
        self._topics: dict[str, _Topic] = {}
        self._scheduled: deque[_Topic] = deque()  # topics with something to deliver
        self._size = 0
        self._turn: Any = None  # the delayed call of the next turn, or of the current one
        self._failures = LogRateLimit(_MOST_FAILURES, 10.0)

    def start(self, reactor: Any) -> None:
        """Begin to deliver."""
        self._reactor = reactor

    def stop(self) -> None:
        """Deliver nothing more."""
        if self._turn is not None and self._turn.active():
            self._turn.cancel()
        for topic in self._topics.values():
            topic.queue.clear()
            topic.rest = None
            for subscription in topic.receivers:
                subscription.end()
        self._topics.clear()
        self._scheduled.clear()
        self._size = self.subscriptions = 0

    # --- receivers ---

    def topics(self) -> Iterable[str]:
        """Return the topics with an active subscription."""
        return [topic.name for topic in self._topics.values() if topic.subscriptions]

    def has(self, name: str) -> bool:
        """Return whether a topic has an active subscription."""
        topic = self._topics.get(name)
        return topic is not None and topic.subscriptions > 0

    def add(self, name: str, receiver: Any) -> Subscription:
        """Add a receiver. It gets the messages and gaps that `deliver` and `gap` queue from now on."""
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics[name] = _Topic(name)
        subscription = Subscription(name, receiver)
        topic.subscriptions += 1
        self.subscriptions += 1
        if topic.queue:
            topic.queue.append(subscription)
        else:
            topic.receivers[subscription] = None
            topic.batch = None
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Remove a receiver. It is not called again."""
        if not subscription.active:
            return
        subscription.end()
        topic = self._topics.get(subscription.topic)
        if topic is None:  # after `stop`
            return
        topic.subscriptions -= 1
        self.subscriptions -= 1
        if subscription in topic.receivers:
            del topic.receivers[subscription]
            topic.batch = None
        self._drop_if_unused(topic)

    def _drop_if_unused(self, topic: _Topic) -> None:
        if not topic.subscriptions:
            self._size -= topic.size
            topic.size = 0
            topic.queue.clear()
            topic.rest = None
            del self._topics[topic.name]

    # --- messages ---

    def is_full(self, name: str, message: bytes) -> bool:
        """Return whether `deliver` would drop this message."""
        topic = self._topics.get(name)
        size = len(message) + COST
        return topic is not None and (topic.size + size > TOPIC_LIMIT or self._size + size > TOTAL_LIMIT)

    def deliver(self, name: str, message: bytes) -> None:
        """Queue a message. It is dropped if the topic has no receiver, or, with a gap, if too many messages wait."""
        topic = self._topics.get(name)
        if topic is None:
            return
        size = len(message) + COST
        if topic.size + size > TOPIC_LIMIT or self._size + size > TOTAL_LIMIT:
            self.dropped += 1
            self._append_gap(topic)
            return
        topic.size += size
        self._size += size
        topic.queue.append(message)
        if not topic.scheduled:
            self._schedule(topic)

    def gap(self, name: str) -> None:
        """Queue a gap. Several gaps without a message between them are one."""
        topic = self._topics.get(name)
        if topic is not None:
            self._append_gap(topic)

    def gap_everywhere(self) -> None:
        """Queue a gap in every topic."""
        for topic in self._topics.values():
            self._append_gap(topic)

    def _append_gap(self, topic: _Topic) -> None:
        if not topic.queue or topic.queue[-1] is not _GAP:
            topic.queue.append(_GAP)
            self._schedule(topic)

    def _schedule(self, topic: _Topic) -> None:
        if not topic.scheduled:
            topic.scheduled = True
            self._scheduled.append(topic)
            if self._turn is None:
                self._turn = self._reactor.callLater(0, self._take_turn)

    # --- turns ---

    def _take_turn(self) -> None:
        # `_turn` is not None meanwhile: a receiver that publishes must not cause a second call.
        scheduled = self._scheduled
        end = self._measure() + TURN_SECONDS
        while scheduled:
            topic = scheduled.popleft()
            try:
                more = self._work(topic)
            except BaseException:  # SystemExit of one receiver must not cost the others their messages
                self._failed(topic)
                more = topic.rest is not None
            if more:
                scheduled.append(topic)
            else:
                topic.scheduled = False
            if self._measure() >= end:
                break
        self._turn = self._reactor.callLater(0, self._take_turn) if scheduled else None

    def _work(self, topic: _Topic) -> bool:
        """Do one chunk of the deliveries of a topic. Return whether more is to be done."""
        rest = topic.rest
        if rest is None:
            if not topic.queue:
                return False
            item = topic.queue.popleft()
            if type(item) is Subscription:
                if item.active:
                    topic.receivers[item] = None
                    topic.batch = None
                return bool(topic.queue)
            batch = topic.batch
            if batch is None:
                batch = topic.batch = list(topic.receivers)
            topic.item = item  # type: ignore[assignment]  # mypy does not narrow by `type(…) is`
            rest = topic.rest = iter(batch)
            if item is _GAP:
                self.gaps += len(batch)
            else:
                self.delivered += len(batch)
        name, item = topic.name, topic.item
        # An iterator continues after the receiver that has raised.
        if item is _GAP:
            for subscription in islice(rest, CHUNK):
                subscription.gap(name)
        else:
            for subscription in islice(rest, CHUNK):
                subscription.received(name, item)
        if topic.rest is None:  # the last receiver has been removed meanwhile
            return False
        if rest.__length_hint__():  # type: ignore[attr-defined]  # an iterator of a list
            return True
        topic.rest = None
        if item is not _GAP:
            size = len(item) + COST
            topic.size -= size
            self._size -= size
        return bool(topic.queue)

    def _failed(self, topic: _Topic) -> None:
        if self._failures.may_log(self._reactor.seconds()):
            suppressed = self._failures.take_suppressed()
            HUB_RECEIVER_FAILED.failure(self._log, topic=escaped(topic.name), suppressed=suppressed)
