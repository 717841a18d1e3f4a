"""The hub between the workers of one machine: each worker has a link with each other one.

The supervisor makes the links when a worker joins: see roster.py. A link ends with the process at its other end.

- A message is delivered in this process at once, and sent once to each worker that wants its topic.
- Each worker tells the others which topics it wants, and its members. So a worker knows all members of a topic.
- A new worker exchanges these with each other worker before it is up. Until then all operations wait.
- If a worker dies, messages that it had accepted may be lost: every receiver of the others gets a gap. A worker that
  stops sends everything first, and then BYE.
- If a worker reads too slowly, messages to it are dropped, and it gets a gap: see outbox.py.
- A worker that does not answer for two seconds does not delay the others. If it answers later, there is a gap.
- One of the workers decides about claims: see claims.py.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Protocol

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger

from rtservice.escaping import escaped
from rtservice.events import HUB_LINK_FULL
from rtservice.hub.carrier import MOST_MEMBERS, Claim, Local, Membership
from rtservice.hub.claims import Claims
from rtservice.hub.confirmations import CONFIRM_SECONDS, Confirmations
from rtservice.hub.frames import Frame, FrameKind, encode_frame
from rtservice.hub.link import Link
from rtservice.hub.local import Presence
from rtservice.hub.roster import Gone, NewLink, RosterReader, Welcome
from rtservice.interfaces import HubFull, HubUnavailable, Members
from rtservice.log_rate import LogRateLimit

# Seconds until a claim without an answer fails: the process that decides may be stopped.
CLAIM_SECONDS = 10.0

# Seconds for which `stop` sends what was accepted.
STOP_SECONDS = 2.0

# The maximum number and bytes of messages that are published before the carrier is up.
_MOST_EARLY, _MOST_EARLY_BYTES = 10_000, 4 * 1024 * 1024

# Records of dropped messages in ten seconds.
_MOST_RECORDS = 3


class MeshHost(Protocol):
    """What the carrier asks of the worker process."""

    def join_mesh(self) -> None:
        """Ask the supervisor for links to the other workers."""

    def report_peer(self, incarnation: int, problem: str) -> None:
        """Report to the supervisor that a peer violates the protocol or does not read."""

    def failed(self, problem: str) -> None:
        """End this process: it cannot be linked with another worker."""


class _Peer:
    """Another worker, as this one knows it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.topics: set[str] = set()  # which it wants
        self.presence = Presence()
        self.heard = False  # its snapshot is complete
        self.read = False  # it has handled this worker's snapshot
        self.late = False  # this worker was up before that


class _Early:
    """Messages that are published before the carrier is up."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes, Deferred[None]]] = []
        self._size = 0

    def add(self, topic: str, message: bytes) -> Deferred[None]:
        """Keep a message, or return a failure if there are too many."""
        if len(self.messages) >= _MOST_EARLY or self._size + len(message) > _MOST_EARLY_BYTES:
            return fail(HubFull("too many messages wait for the start of the hub"))
        self._size += len(message)
        published: Deferred[None] = Deferred()
        self.messages.append((topic, message, published))
        return published


class MeshCarrier:
    """A carrier between the workers of one machine. `channel` is the descriptor of this worker's link channel."""

    def __init__(self, channel: int, host: MeshHost, log: Logger) -> None:
        self._channel = channel
        self._host = host
        self._log = log
        self._reactor: Any = None  # these four are set by `start`
        self._local: Any = None
        self._roster: Any = None
        self._confirmations: Any = None
        self._claims: Claims | None = None  # once this worker has its incarnation
        self._peers: dict[int, _Peer] = {}
        self._presence = Presence()  # of this process
        self._missing_links = 0  # of those with which it joined
        self._awaited: set[int] = set()  # peers among these that have not exchanged snapshots
        self._exchange_timer: Any = None
        self._up = False
        self._early = _Early()
        self._when_up: list[tuple[Callable[[], Deferred[Any]], Deferred[Any]]] = []  # operations that wait
        self._early_claims: dict[int, Claim] = {}  # before this worker has its incarnation
        self._claiming: dict[int, tuple[Deferred[bool], Any]] = {}  # what fires, and the timer, by number
        self._stopped: Deferred[None] | None = None
        self._stop_timer: Any = None
        self._records = LogRateLimit(_MOST_RECORDS, 10.0)
        self._dropped = self._received = 0

    # --- life ---

    @property
    def up(self) -> bool:
        return self._up

    def start(self, reactor: Any, local: Local) -> None:
        self._reactor = reactor
        self._local = local
        self._confirmations = Confirmations(reactor, sync=self._sync, missed=local.gap)
        self._roster = RosterReader(
            reactor, socket.socket(fileno=self._channel), take=self._changed, fail=self._host.failed
        )
        self._host.join_mesh()

    def stop(self) -> Deferred[None]:
        self._up = False
        stopped = self._stopped = Deferred()
        self._roster.close()  # another worker that joins now is not linked with this one
        self._cancel(self._exchange_timer)
        self._exchange_timer = None
        waiting = [done for _, done in self._when_up] + [done for _, _, done in self._early.messages]
        for done, timer in self._claiming.values():
            self._cancel(timer)
            waiting.append(done)
        self._when_up.clear()
        self._early.messages.clear()
        self._claiming.clear()
        for link in [peer.link for peer in self._peers.values()]:
            link.outbox.add_gaps()
            link.send(encode_frame(FrameKind.BYE))
            link.notify_flushed()
        self._stop_timer = self._reactor.callLater(STOP_SECONDS, self._close)
        self._confirmations.stop()
        for done in waiting:
            done.errback(HubUnavailable("the hub has stopped"))
        if not self._peers:
            self._close()
        return stopped

    def link_flushed(self, link: Link) -> None:
        """Close a link whose BYE is sent."""
        link.close()
        del self._peers[link.peer]
        if not self._peers:
            self._close()

    def _close(self) -> None:
        self._cancel(self._stop_timer)
        for peer in self._peers.values():
            peer.link.close()
        self._peers.clear()
        assert self._stopped is not None
        self._stopped.callback(None)

    @staticmethod
    def _cancel(timer: Any) -> None:
        if timer is not None and timer.active():
            timer.cancel()

    def counters(self) -> Mapping[str, int]:
        """Return `links`; messages `received` from other workers; and messages `dropped` that were for them."""
        return {"links": len(self._peers), "received": self._received, "dropped": self._dropped}

    # --- other workers come and go ---

    def _changed(self, change: Welcome | NewLink | Gone) -> None:
        match change:
            case Welcome():
                self._missing_links = change.links
                self._claims = Claims(change.incarnation, send=self._send, answer=self._claim_answered)
                for number, claim in self._early_claims.items():
                    self._claims.request(number, claim.key)
                self._early_claims.clear()
                self._exchange_timer = self._reactor.callLater(CONFIRM_SECONDS, self._come_up_late)
                self._check_exchange()
            case NewLink():
                self._add_peer(change)
            case Gone():
                peer = self._peers.get(change.peer)
                if peer is not None:
                    peer.link.process_ended()

    def _add_peer(self, change: NewLink) -> None:
        assert self._claims is not None
        link = Link(self._reactor, change.socket, peer=change.peer, user=self, snapshot=self._snapshot())
        self._peers[change.peer] = _Peer(link)
        self._claims.add_peer(change.peer)
        if self._missing_links:
            self._missing_links -= 1
            self._awaited.add(change.peer)

    def _snapshot(self) -> Iterator[bytes]:
        """Return the frames with the topics and members at this time."""
        topics, memberships = list(self._local.topics()), list(self._local.memberships())
        return chain(
            (encode_frame(FrameKind.SUBSCRIBE, text=topic) for topic in topics),
            (encode_frame(FrameKind.JOIN, *membership) for membership in memberships),
            (encode_frame(FrameKind.SNAPSHOT),),
        )

    def _check_exchange(self) -> None:
        """Come up if the snapshots are exchanged with all workers that joined before."""
        if not self._missing_links and not self._awaited and self._exchange_timer is not None:
            self._cancel(self._exchange_timer)
            self._exchange_timer = None
            assert self._claims is not None
            self._claims.begin()
            self._come_up()

    def _come_up_late(self) -> None:
        """Come up without the workers that do not answer."""
        if self._missing_links:  # the supervisor is late, not a worker
            self._exchange_timer = self._reactor.callLater(CONFIRM_SECONDS, self._come_up_late)
            return
        for number in self._awaited:
            self._peers[number].late = True
        self._come_up()

    def _come_up(self) -> None:
        if self._up:
            return
        self._up = True
        messages, self._early.messages = self._early.messages, []
        for topic, message, _ in messages:
            self._publish(topic, message)
        for _, _, published in messages:
            published.callback(None)
        waiting, self._when_up = self._when_up, []
        for operation, done in waiting:
            if self._stopped is None:
                operation().chainDeferred(done)
            else:  # stopped by a callback
                done.errback(HubUnavailable("the hub has stopped"))

    def _exchanged(self, peer: _Peer) -> None:
        """Handle a part of the exchange: it may be complete."""
        if not (peer.heard and peer.read):
            return
        if peer.late:
            peer.late = False
            self._local.gap_everywhere()
            peer.link.send(encode_frame(FrameKind.GAP))
        self._awaited.discard(peer.link.peer)
        self._check_exchange()

    def link_failed(self, link: Link, problem: str) -> None:
        """Report a peer that violates the protocol or does not read; the supervisor kills it."""
        self._confirmations.remove_peer(link.peer, missed=False)
        if self._stopped is None:
            self._host.report_peer(link.peer, problem)

    def link_ended(self, link: Link) -> None:
        """Handle the end of a process without BYE: messages that it had accepted may be lost."""
        self._remove_peer(link, clean=False)

    def _remove_peer(self, link: Link, *, clean: bool) -> None:
        peer = self._peers.pop(link.peer)
        if self._stopped is not None:
            if not self._peers:
                self._close()
            return
        assert self._claims is not None
        if peer.late or (self._up and not clean):
            self._local.gap_everywhere()
        self._awaited.discard(link.peer)
        self._claims.remove_peer(link.peer)
        self._confirmations.remove_peer(link.peer, missed=clean)
        self._check_exchange()

    # --- frames ---

    def frames_received(self, link: Link, frames: list[Frame]) -> None:
        """Handle frames of a link."""
        if self._stopped is not None:
            return
        peer = self._peers[link.peer]
        deliver = self._local.deliver
        message = FrameKind.MESSAGE
        for frame in frames:
            if frame[0] is message:
                self._received += 1
                deliver(frame[2], frame[3])
            else:
                self._handle(peer, frame)
                if link.ended or self._stopped is not None:
                    return

    def _handle(self, peer: _Peer, frame: Frame) -> None:
        kind, number, text, payload = frame
        link = peer.link
        match kind:
            case FrameKind.GAP:
                if text:
                    self._local.gap(text)
                else:
                    self._local.gap_everywhere()
            case FrameKind.SUBSCRIBE:
                peer.topics.add(text)
            case FrameKind.UNSUBSCRIBE:
                peer.topics.discard(text)
            case FrameKind.JOIN:
                peer.presence.add(None, Membership(number, text, payload))
            case FrameKind.LEAVE:
                peer.presence.remove(None, text, number)
            case FrameKind.SNAPSHOT:
                link.send(encode_frame(FrameKind.SNAPSHOT_READ))
                peer.heard = True
                self._exchanged(peer)
            case FrameKind.SNAPSHOT_READ:
                peer.read = True
                self._exchanged(peer)
            case FrameKind.SYNC:
                link.send(encode_frame(FrameKind.SYNCED, number))
            case FrameKind.SYNCED:
                self._confirmations.confirmed(link.peer, number)
            case FrameKind.BYE:
                link.close()
                self._remove_peer(link, clean=True)
            case _:
                assert self._claims is not None
                self._claims.received(link.peer, frame)

    def _send(self, peer: int, kind: FrameKind, number: int, key: str) -> None:
        if peer in self._peers:  # an answer to a claim may have stopped this carrier
            self._peers[peer].link.send(encode_frame(kind, number, key))

    def _broadcast(self, frame: bytes) -> None:
        for peer in self._peers.values():
            peer.link.send(frame)

    def _sync(self, number: int) -> Iterable[int]:
        self._broadcast(encode_frame(FrameKind.SYNC, number))
        return [number for number, peer in self._peers.items() if not peer.link.failed]

    def _confirm(self, topic: str | None = None) -> Deferred[None]:
        """Return what fires when all workers have handled the frames that were sent up to now."""
        if not self._up:
            return self._wait(lambda: self._confirmations.add(topic))
        if not self._peers:
            return succeed(None)
        confirmed: Deferred[None] = self._confirmations.add(topic)
        return confirmed

    def _wait(self, operation: Callable[[], Deferred[Any]]) -> Deferred[Any]:
        """Return the result of an operation that is begun when the carrier is up."""
        done: Deferred[Any] = Deferred()
        self._when_up.append((operation, done))
        return done

    # --- messages ---

    def publish(self, topic: str, message: bytes) -> Deferred[None]:
        if not self._up:
            return self._early.add(topic, message)
        self._publish(topic, message)
        return succeed(None)

    def _publish(self, topic: str, message: bytes) -> None:
        self._local.deliver(topic, message)
        frame = b""
        for peer in self._peers.values():
            if topic in peer.topics:
                frame = frame or encode_frame(FrameKind.MESSAGE, text=topic, payload=message)
                if not peer.link.send_message(topic, frame):
                    self._dropped += 1
                    if self._records.may_log(self._reactor.seconds()):
                        suppressed = self._records.take_suppressed()
                        HUB_LINK_FULL.log(self._log, topic=escaped(topic), suppressed=suppressed)

    def subscribe(self, topic: str) -> Deferred[None]:
        self._broadcast(encode_frame(FrameKind.SUBSCRIBE, text=topic))
        return self._confirm(topic)

    def unsubscribe(self, topic: str) -> None:
        self._broadcast(encode_frame(FrameKind.UNSUBSCRIBE, text=topic))

    # --- members ---

    def join(self, membership: Membership) -> Deferred[None]:
        self._presence.add(None, membership)
        self._broadcast(encode_frame(FrameKind.JOIN, *membership))
        return self._confirm()

    def leave(self, membership: Membership) -> None:
        self._presence.remove(None, membership.topic, membership.number)
        self._broadcast(encode_frame(FrameKind.LEAVE, membership.number, membership.topic))

    def members(self, topic: str) -> Deferred[Members]:
        if not self._up:
            return self._wait(lambda: self.members(topic))
        found: list[bytes] = []
        total = 0
        for presence in (self._presence, *(peer.presence for peer in self._peers.values())):
            some = presence.members(topic)
            total += some.total
            found += some.members[: MOST_MEMBERS - len(found)]
        return succeed(Members(tuple(found), total))

    # --- claims ---

    def claim(self, claim: Claim) -> Deferred[bool]:
        done: Deferred[bool] = Deferred()
        timer = self._reactor.callLater(CLAIM_SECONDS, self._claim_timed_out, claim)
        self._claiming[claim.number] = done, timer
        if self._claims is None:
            self._early_claims[claim.number] = claim
        else:
            self._claims.request(claim.number, claim.key)
        return done

    def _claim_answered(self, number: int, granted: bool) -> None:
        done, timer = self._claiming.pop(number)
        timer.cancel()
        done.callback(granted)

    def _claim_timed_out(self, claim: Claim) -> None:
        done, _ = self._claiming.pop(claim.number)
        self.release(claim)
        done.errback(HubUnavailable("the worker that decides about claims does not answer"))

    def release(self, claim: Claim) -> None:
        self._early_claims.pop(claim.number, None)
        if self._claims is not None:
            self._claims.release(claim.number)
