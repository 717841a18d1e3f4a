"""The topics of this process, and their subscriptions on the connection to Redis.

For each topic, this keeps what is wanted, what the last command on this connection asked for, and how many commands are
not confirmed. Commands are sent once per turn of the reactor, so a topic that is cancelled and subscribed again in one
turn needs none. A topic is active, and its messages are delivered, while it is wanted and everything is confirmed:

    wanted ──SUBSCRIBE──→ asked, 1 unconfirmed ──confirmed──→ active ──unsubscribe──→ UNSUBSCRIBE ──confirmed──→ removed
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from twisted.internet.defer import Deferred, succeed

from rtservice.hub.carrier import Local
from rtservice.hub.resp import RedisConnection, Refused
from rtservice.interfaces import HubUnavailable

# Channels of one command. Their confirmations take about 1.4 ms, Redis 0.2 ms.
CHANNELS = 250


class _Channel:
    """A topic."""

    __slots__ = ("asked", "known", "name", "topic", "unconfirmed", "waiting", "wanted")

    def __init__(self, topic: str, name: bytes) -> None:
        self.topic = topic
        self.name = name
        self.wanted = True
        self.asked = False  # whether the last command on this connection was SUBSCRIBE
        self.unconfirmed = 0  # commands on this connection
        self.known = False  # it was active before, on this connection or an earlier one
        self.waiting: list[Deferred[None]] = []


class Subscriptions:
    """The topics of this process. `active` has the topic of each channel whose messages are delivered."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode() + b":t:"
        self._channels: dict[str, _Channel] = {}
        self._by_name: dict[bytes, _Channel] = {}
        self._changed: dict[str, _Channel] = {}  # those for which a command may be needed
        self._reactor: Any = None  # set by `start`
        self._local: Any = None
        self._connection: RedisConnection | None = None
        self._open = False  # whether the hub is up
        self._scheduled = False
        self.active: dict[bytes, str] = {}

    def start(self, reactor: Any, local: Local) -> None:
        """Keep the hub, whose receivers get the gaps."""
        self._reactor = reactor
        self._local = local

    def name(self, topic: str) -> bytes:
        """Return the channel of a topic."""
        return self._prefix + topic.encode()

    # --- for the hub ---

    def subscribe(self, topic: str) -> Deferred[None]:
        """Want a topic. Fires when it is active."""
        channel = self._channels.get(topic)
        if channel is None:
            name = self.name(topic)
            channel = self._channels[topic] = self._by_name[name] = _Channel(topic, name)
        channel.wanted = True
        if self._open and channel.asked and not channel.unconfirmed:
            self._activate(channel)
            return succeed(None)
        deferred: Deferred[None] = Deferred()
        channel.waiting.append(deferred)
        self._change(channel)
        return deferred

    def unsubscribe(self, topic: str) -> None:
        """Want a topic no more."""
        channel = self._channels.get(topic)
        if channel is None:
            return
        channel.wanted = channel.known = False
        channel.waiting.clear()
        self.active.pop(channel.name, None)
        if self._connection is None:
            self._forget(channel)
        else:
            self._change(channel)

    def _forget(self, channel: _Channel) -> None:
        del self._channels[channel.topic]
        del self._by_name[channel.name]
        self._changed.pop(channel.topic, None)

    # --- commands ---

    def _change(self, channel: _Channel) -> None:
        self._changed[channel.topic] = channel
        if not self._scheduled and self._connection is not None:
            self._scheduled = True
            self._reactor.callLater(0, self._send_changes)

    def _send_changes(self) -> None:
        self._scheduled = False
        if self._connection is None:
            return
        changed, self._changed = self._changed, {}
        for channel in changed.values():
            if not (channel.wanted or channel.asked or channel.unconfirmed):
                self._forget(channel)
        self._send(b"SUBSCRIBE", [channel for channel in changed.values() if channel.wanted and not channel.asked])
        self._send(b"UNSUBSCRIBE", [channel for channel in changed.values() if channel.asked and not channel.wanted])

    def _send(self, command: bytes, channels: Iterable[_Channel]) -> None:
        assert self._connection is not None
        remaining = iter(channels)
        while batch := list(islice(remaining, CHANNELS)):
            for channel in batch:
                channel.asked = command == b"SUBSCRIBE"
                channel.unconfirmed += 1
            self._connection.change(
                command, [channel.name for channel in batch], self._confirmed, (self._refused, self._connection)
            )

    def _confirmed(self, name: bytes) -> None:
        channel = self._by_name.get(name)
        if channel is None or not channel.unconfirmed:
            return
        channel.unconfirmed -= 1
        if channel.unconfirmed:
            return
        if channel.wanted and channel.asked:
            self._activate(channel)
        elif not channel.wanted and not channel.asked:
            self._forget(channel)
        # Otherwise a change is scheduled.

    def _activate(self, channel: _Channel) -> None:
        if channel.known and channel.name not in self.active:
            self._local.gap(channel.topic)
        channel.known = True
        self.active[channel.name] = channel.topic
        if self._open:
            self._fire(channel)

    def _fire(self, channel: _Channel) -> None:
        waiting, channel.waiting = channel.waiting, []
        for deferred in waiting:
            deferred.callback(None)

    def _refused(self, connection: RedisConnection, reply: Any) -> None:
        if isinstance(reply, Refused):
            connection.abort(f"SUBSCRIBE: {reply.shown}")

    # --- connections ---

    async def restore(self, connection: RedisConnection) -> None:
        """Subscribe all topics on a new connection, in batches, until all are confirmed. Raises ConnectionEnded.

        The next batch is sent when the last one is confirmed, so neither side has much to do at once. Each topic that
        was active before gets a gap when it is confirmed, and its messages after that.
        """
        self._connection = connection
        self._changed = {}
        remaining = iter(list(self._channels.values()))
        while channels := list(islice(remaining, CHANNELS)):
            # Some may have been subscribed, or are not wanted any more, since this began.
            self._send(b"SUBSCRIBE", [channel for channel in channels if channel.wanted and not channel.asked])
            await connection.request(b"PING")  # replied to after the confirmations

    def open(self) -> None:
        """Fire the Deferreds of active topics: the hub is up, so their subscribers can publish, too."""
        self._open = True
        for channel in list(self._channels.values()):
            if channel.waiting and channel.name in self.active:
                self._fire(channel)

    def end(self) -> None:
        """Forget the subscriptions of a connection that has ended."""
        self._connection = None
        self._open = False
        self.active.clear()
        for channel in list(self._channels.values()):
            channel.asked = False
            channel.unconfirmed = 0
            if not channel.wanted:
                self._forget(channel)

    def fail_waiting(self) -> None:
        """Fail the Deferreds of topics that are not active."""
        for channel in list(self._channels.values()):
            waiting, channel.waiting = channel.waiting, []
            for deferred in waiting:
                deferred.errback(HubUnavailable("the hub has stopped"))
