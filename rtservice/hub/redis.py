"""The hub of processes on several machines, carried by Redis.

One connection in RESP3 carries commands, replies and messages. In order, a connection

    connects → HELLO, ROLE … (redis_greeting) → SUBSCRIBE of all topics, with gaps (redis_subscriptions)
             → lease, memberships, claims (redis_presence) → up: publishes, heartbeats
             → ended: all in flight fails → back-off → connects …

Redis delivers all messages of a channel to a connection in one order, and drops none: it ends the connection when its
output buffer is full. So within a connection nothing is lost or repeated, and each new connection begins with a gap in
each topic. A heartbeat is published and awaited back, which finds a server that is stopped, a network that drops
everything, and a subscription that is deaf.

A published message may be lost in one more case: this process was connected to a server that was no longer the one of
the others, such as the old master during a failover. When it has reconnected to another server, it tells the others
when a message was accepted last. Those that reconnected before that report a gap to their receivers.

A user of Redis needs these permissions, with the prefix `rtservice`:

    ~rtservice:* &rtservice:* +hello +select +ping +role +info +client|kill +publish +subscribe +unsubscribe +eval +time
    +zadd +zscore +zrem +zrangebyscore +hset +hdel +hlen +hrandfield +get +set +del +sadd +srem +spop

This is not a `twisted.application.internet.ClientService`, although it does the same: that logs each attempt, and a
connection that ends while it is prepared is an error in it.
"""

from __future__ import annotations

import contextlib
import random
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from rtservice.events import (
    HUB_CONNECTED,
    HUB_CONNECTION_LOST,
    HUB_EVICTION,
    HUB_EXCEPTION,
    HUB_REFUSED,
    HUB_STOP_INCOMPLETE,
    HUB_UNAVAILABLE,
    HUB_UNVERIFIED,
)
from rtservice.histogram import Histogram
from rtservice.hub.carrier import HEARTBEATS, Claim, Local, Membership, heartbeat_counters
from rtservice.hub.connect_errors import ConnectFailed, reason_of
from rtservice.hub.redis_endpoints import RedisEndpoints
from rtservice.hub.redis_greeting import Greeting, check_role, greet
from rtservice.hub.redis_presence import RedisPresence
from rtservice.hub.redis_subscriptions import Subscriptions
from rtservice.hub.redis_url import HubURL
from rtservice.hub.resp import ConnectionEnded, RedisConnection, Refused, load_hiredis
from rtservice.hub.tls_client import client_context
from rtservice.interfaces import HubFull, HubUnavailable, Members
from rtservice.log_rate import LogRateLimit

# Limits of publishes that Redis has not confirmed: number, and bytes. A message counts as its length and COST bytes.
MOST_IN_FLIGHT, MOST_BYTES_IN_FLIGHT, COST = 20_000, 16 << 20, 100

# Seconds between heartbeats, and after which one that is not back ends the connection.
BEAT_SECONDS, BEAT_TIMEOUT = 2.0, 4.0

# Seconds without a reply after which a connection that is being prepared is ended.
PREPARE_SECONDS = 3.0

# Seconds before the first attempt to reconnect, and the most before one; half of it is random.
FIRST_DELAY, LONGEST_DELAY = 0.1, 2.0

# Seconds for what is in flight, and for removing members and claims, when the hub stops.
STOP_SECONDS = 5.0

# Publishes in flight that fail in one turn of the reactor when the connection ends: about 1 ms.
_FAILED_PER_TURN = 200

# Records of one outage, and records of refused commands in a minute.
_MOST_PROBLEMS, _MOST_REFUSALS = 3, 3

# Seconds by which a heartbeat is late if this process was blocked or stopped.
_LATE = 1.0

_COUNTERS = ("reconnects", "refused")


class RedisCarrier:
    """Carries the hub over Redis: see Carrier.

    `jitter` returns a random number from 0 to 1. Raises BadHubURL if `hiredis` is missing, or if
    a file that the URL names cannot be used.
    """

    def __init__(self, url: HubURL, log: Logger, *, jitter: Callable[[], float] = random.random) -> None:
        self._url = url
        self._log = log
        self._jitter = jitter
        self._hiredis = load_hiredis()
        self._context = None if url.tls is None else client_context(url.tls)
        incarnation = secrets.token_hex(8)
        self._subscriptions = Subscriptions(url.prefix)
        self._name, self._active = self._subscriptions.name, self._subscriptions.active
        self._presence = RedisPresence(url.prefix, incarnation, self._refused)
        self._beat_channel = f"{url.prefix}:h:{incarnation}".encode()
        self._split_channel = f"{url.prefix}:s".encode()
        self._refusals = LogRateLimit(_MOST_REFUSALS, 60.0)
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._heartbeats = Histogram(HEARTBEATS)
        # Set by `start`.
        self._reactor: Any = None
        self._local: Any = None
        self._endpoints: Any = None
        self._running: Deferred[None] = succeed(None)
        self._stopping = False
        # Of the connection.
        self._connection: RedisConnection | None = None  # while it is up
        self._greeting = Greeting(0, "", False)
        self._used_run: str | None = None  # the run of the server of the last connection that was up
        self._preparing = False  # its topics are being subscribed
        self._members_waiting: list[tuple[str, Deferred[Members]]] = []
        self._prepared_at = 0.0  # when it began to subscribe
        self._attempts = 0  # since a heartbeat came back
        self._problems: list[str] = []  # logged in this outage
        # Publishes that are not confirmed.
        self._publishing: deque[tuple[Deferred[None], int]] = deque()
        self._bytes = 0
        self._accepted_at = 0.0  # when one was confirmed last
        self._split_at = 0.0  # when one was confirmed last by another server, until that is published
        self._published_waiting = (self._published, None)
        # The last heartbeat.
        self._beat = 0
        self._beat_due = 0.0
        self._beat_at = 0.0
        self._beat_returned = True
        self._beat_call: Any = None

    # --- life ---

    @property
    def up(self) -> bool:
        """Whether there is a connection that is prepared."""
        return self._connection is not None

    def start(self, reactor: Any, local: Local) -> None:
        """Connect, and stay connected."""
        self._reactor = reactor
        self._local = local
        self._subscriptions.start(reactor, local)
        self._presence.start(reactor, local)
        self._endpoints = RedisEndpoints(self._url, self._hiredis, self._context, reactor)
        if self._url.tls is not None and not self._url.tls.verify:
            HUB_UNVERIFIED.log(self._log, engine=self._url.shown)
        self._running = Deferred.fromCoroutine(self._run())

    def stop(self) -> Deferred[None]:
        """Send what was accepted, remove members and claims, and disconnect."""
        self._stopping = True
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        connection = self._connection
        if connection is not None:
            finishing = Deferred.fromCoroutine(self._finish(connection))
            try:
                await finishing.addTimeout(STOP_SECONDS, self._reactor)
            except Exception as error:
                HUB_STOP_INCOMPLETE.log(self._log, engine=self._endpoints.shown, problem=reason_of(error))
        self._endpoints.close()
        if connection is not None:
            connection.abort("the hub has stopped")
        else:
            self._running.cancel()
        await self._running
        self._subscriptions.fail_waiting()
        self._presence.fail_waiting()

    async def _finish(self, connection: RedisConnection) -> None:
        await connection.request(b"PING")  # replied to after the publishes
        await self._presence.remove_own(connection)

    async def _run(self) -> None:
        """Connect repeatedly, until the hub stops."""
        while not self._stopping:
            try:
                await self._serve()
            except CancelledError:
                return
            except (ConnectFailed, ConnectionEnded, ConnectError, ConnectionClosed, OSError) as error:
                self._report(reason_of(error))
            except Exception as error:
                HUB_EXCEPTION.failure(self._log, level=LogLevel.debug if self._problems else None)
                self._report(reason_of(error))
            if self._stopping:
                return
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self._attempts, 10))
            self._attempts += 1
            try:
                await deferLater(self._reactor, delay * (1 + self._jitter()) / 2)
            except CancelledError:
                return

    async def _serve(self) -> None:
        """Connect, and wait until the connection ends. Raises why it could not be used."""
        connection = await self._endpoints.connect(self._received)
        watch = LoopingCall(self._check_progress, connection)
        watch.clock = self._reactor
        watch.start(PREPARE_SECONDS, now=False)
        try:
            await self._prepare(connection)
            watch.stop()
            self._begin(connection)
            problem = await connection.ended
            if not self._stopping:
                HUB_CONNECTION_LOST.log(self._log, engine=self._endpoints.shown, problem=problem)
        finally:
            if watch.running:
                watch.stop()
            connection.abort("it could not be used")
            self._end()

    def _check_progress(self, connection: RedisConnection) -> None:
        if self._reactor.seconds() - connection.received >= PREPARE_SECONDS:
            connection.abort(f"no reply within {PREPARE_SECONDS:g} s")

    async def _prepare(self, connection: RedisConnection) -> None:
        """Make a new connection usable."""
        previous, greeting = self._greeting, await greet(connection, self._url)
        if greeting.run and greeting.run == previous.run:
            # Redis may still have commands of the previous connection to execute, for example after a SIGSTOP. Refused
            # if that connection has ended, or if the user has no permission.
            with contextlib.suppress(Refused):
                await connection.request(b"CLIENT", b"KILL", b"ID", previous.client)
        if greeting.evicts and not previous.evicts:
            HUB_EVICTION.log(self._log, engine=self._endpoints.shown)
        self._greeting = greeting
        self._prepared_at = self._reactor.seconds()
        self._preparing = True
        own = (self._beat_channel, self._split_channel)
        connection.change(b"SUBSCRIBE", own, _ignore, (self._not_subscribed, connection))
        await self._subscriptions.restore(connection)
        self._presence.begin(connection)
        await self._renew()

    def _not_subscribed(self, connection: RedisConnection, reply: Any) -> None:
        if isinstance(reply, Refused):
            connection.abort(f"SUBSCRIBE: {reply.shown}")

    def _begin(self, connection: RedisConnection) -> None:
        """Use a prepared connection."""
        self._connection = connection
        self._problems.clear()
        HUB_CONNECTED.log(self._log, engine=self._endpoints.shown)
        previous, self._used_run = self._used_run, self._greeting.run
        if previous is not None:
            self._counters["reconnects"] += 1
            if self._accepted_at and (not previous or previous != self._used_run):
                self._split_at = self._accepted_at
        if self._split_at:
            age = self._reactor.seconds() - self._split_at
            connection.send((b"PUBLISH", self._split_channel, int(age * 1000)), (self._split_sent, None))
        self._beat_returned = True
        self._beat_due = self._reactor.seconds()
        self._take_beat()
        self._preparing = False
        waiting, self._members_waiting = self._members_waiting, []
        for topic, deferred in waiting:
            self._presence.members(topic).chainDeferred(deferred)
        self._subscriptions.open()
        self._presence.open()

    def _end(self) -> None:
        """Stop using a connection that has ended, or that could not be prepared."""
        self._connection = None
        self._preparing = False
        waiting, self._members_waiting = self._members_waiting, []
        for _, deferred in waiting:
            deferred.errback(HubUnavailable("the hub has no connection to Redis"))
        if self._beat_call is not None:
            self._beat_call.cancel()
            self._beat_call = None
        self._subscriptions.end()
        self._presence.end()
        publishing, self._publishing = self._publishing, deque()
        self._bytes = 0
        self._fail(publishing)

    def _fail(self, publishing: deque[tuple[Deferred[None], int]]) -> None:
        for _ in range(min(len(publishing), _FAILED_PER_TURN)):
            failed, _size = publishing.popleft()
            failed.errback(HubUnavailable("the connection to Redis ended before it confirmed the message"))
        if publishing:
            self._reactor.callLater(0, self._fail, publishing)

    def _report(self, problem: str) -> None:
        """Log why there is no connection: each reason once for an outage, and at most three."""
        if not self._stopping and problem not in self._problems and len(self._problems) < _MOST_PROBLEMS:
            self._problems.append(problem)
            HUB_UNAVAILABLE.log(self._log, engine=self._endpoints.shown, problem=problem)

    # --- heartbeats ---

    def _take_beat(self) -> None:
        """Send a heartbeat; or, if the last one is not back, wait longer, or end the connection."""
        connection, now = self._connection, self._reactor.seconds()
        assert connection is not None
        due, delay = self._beat_due, BEAT_SECONDS
        if self._beat_returned:
            self._beat += 1
            self._beat_at = now
            self._beat_returned = False
            connection.send((b"PUBLISH", self._beat_channel, self._beat), (_ignore_reply, None))
            connection.send((b"ROLE",), (self._check_role, connection))
            for check in (self._renew, self._check_sentinels):
                Deferred.fromCoroutine(check()).addErrback(self._failed)
        elif now - self._beat_at >= BEAT_TIMEOUT and now - due < _LATE:
            connection.abort(f"no heartbeat came back within {BEAT_TIMEOUT:g} s")
        elif now - due >= _LATE:
            delay = _LATE  # this process was blocked or stopped: what it has received is not read yet
        self._beat_due = now + delay
        self._beat_call = self._reactor.callLater(delay, self._take_beat)

    def _check_role(self, connection: RedisConnection, reply: Any) -> None:
        if isinstance(reply, list):
            try:
                check_role(reply)
            except ConnectFailed as problem:
                connection.abort(str(problem))

    async def _renew(self) -> None:
        """Renew the lease of this process. If Redis refuses, subscriptions and publishes still work."""
        try:
            await self._presence.renew()
        except Refused as refusal:
            self._refused(refusal.shown)

    async def _check_sentinels(self) -> None:
        connection = self._connection
        if not await self._endpoints.still_named() and connection is self._connection and connection is not None:
            connection.abort("the sentinels name another master")

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError, ConnectionEnded):
            HUB_EXCEPTION.failure(self._log, failure)

    def _refused(self, problem: str) -> None:
        """Log that Redis refused a command of presence or a publish."""
        self._counters["refused"] += 1
        if self._refusals.may_log(self._reactor.seconds()):
            HUB_REFUSED.log(
                self._log,
                engine=self._endpoints.shown,
                problem=problem,
                suppressed=self._refusals.take_suppressed(),
            )

    # --- messages ---

    def _received(self, channel: bytes, message: bytes) -> None:
        topic = self._active.get(channel)
        if topic is not None:
            self._local.deliver(topic, message)
        elif channel == self._beat_channel:
            if message == b"%d" % self._beat and not self._beat_returned:
                self._count_beat()
        elif channel == self._split_channel:
            with contextlib.suppress(ValueError, OverflowError):  # not from rtservice
                self._check_split(int(message))

    def _count_beat(self) -> None:
        self._beat_returned = True
        self._attempts = 0
        self._heartbeats.add(self._reactor.seconds() - self._beat_at)

    def _split_sent(self, _: None, reply: Any) -> None:
        if type(reply) is int:
            self._split_at = 0.0

    def _check_split(self, age: int) -> None:
        """A process had published to another server, the last time before `age` milliseconds.

        What it published before this process subscribed is in the gap that this process has reported.
        """
        if self._reactor.seconds() - age / 1000 > self._prepared_at:
            self._local.gap_everywhere()

    def publish(self, topic: str, message: bytes) -> Deferred[None]:
        """Publish. Fires when Redis has confirmed it."""
        connection = self._connection
        if connection is None:
            return fail(HubUnavailable("the hub has no connection to Redis"))
        size = len(message) + COST
        if len(self._publishing) >= MOST_IN_FLIGHT or self._bytes + size > MOST_BYTES_IN_FLIGHT:
            return fail(HubFull("too many messages wait for the confirmation of Redis"))
        deferred: Deferred[None] = Deferred()
        self._publishing.append((deferred, size))
        self._bytes += size
        connection.send((b"PUBLISH", self._name(topic), message), self._published_waiting)
        return deferred

    def _published(self, _: None, reply: Any) -> None:
        if type(reply) is ConnectionEnded:
            return  # `_end` fails them
        deferred, size = self._publishing.popleft()
        self._bytes -= size
        if type(reply) is int:
            assert self._connection is not None
            self._accepted_at = self._connection.received
            deferred.callback(None)
        else:
            problem = reply.shown if isinstance(reply, Refused) else "an unexpected reply"
            self._refused(problem)
            deferred.errback(HubUnavailable(f"Redis refused the message: {problem}"))

    def subscribe(self, topic: str) -> Deferred[None]:
        """Subscribe to a topic. Fires when Redis has confirmed it."""
        return self._subscriptions.subscribe(topic)

    def unsubscribe(self, topic: str) -> None:
        """End a `subscribe`."""
        self._subscriptions.unsubscribe(topic)

    # --- presence and claims ---

    def join(self, membership: Membership) -> Deferred[None]:
        """Add a member."""
        return self._presence.join(membership)

    def leave(self, membership: Membership) -> None:
        """Remove a member."""
        self._presence.leave(membership)

    def members(self, topic: str) -> Deferred[Members]:
        """Return the members of a topic.

        Waits while a connection is being prepared: receivers have their gap already, and reload the members.
        """
        if self._connection is not None:
            return self._presence.members(topic)
        if not self._preparing:
            return fail(HubUnavailable("the hub has no connection to Redis"))
        waiting: Deferred[Members] = Deferred()
        self._members_waiting.append((topic, waiting))
        return waiting

    def claim(self, claim: Claim) -> Deferred[bool]:
        """Claim a key."""
        if self._connection is None:
            return fail(HubUnavailable("the hub has no connection to Redis"))
        return self._presence.claim(claim)

    def release(self, claim: Claim) -> None:
        """End a claim."""
        self._presence.release(claim)

    def counters(self) -> Mapping[str, int]:
        """Return the counters of this process.

        `reconnects`; `refused` commands; `claims_lost`; `in_flight` messages; and those of `heartbeat_counters`, of the
        heartbeats that came back.
        """
        return {
            **self._counters,
            "claims_lost": self._presence.lost,
            "in_flight": len(self._publishing),
            **heartbeat_counters(self._heartbeats),
        }


def _ignore(channel: bytes) -> None:
    """Do nothing when a channel is confirmed."""


def _ignore_reply(_: None, reply: object) -> None:
    """Do nothing with a reply."""
