"""The register of open connections: limits, idle timeout, trusted PROXY peers, and a log record at the end of each."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import chain
from operator import itemgetter
from time import monotonic
from typing import Any, Literal

from twisted.internet import error
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IHalfCloseableProtocol, IProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Cooperator, LoopingCall
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import alsoProvides

from rtservice.counted import counted
from rtservice.interfaces import IDrainable
from rtservice.net.address import peer_name
from rtservice.net.connection import LocalClose
from rtservice.net.proxy import ProxyError
from rtservice.process.counters import ListenerStats, add
from rtservice.process.sparse import Sparse

# Why a client may be refused, by the name of the setting, and what the log says of it.
REFUSALS = {
    "max-connections": "--max-connections are open",
    "max-connections-per-peer": "--max-connections-per-peer are open from its address",
    "proxy-from": "its address is not in --proxy-from, so no PROXY header of its is believed",
}

# What `Registry.rows` gives of each, and may be sorted by, with the attribute that the order is of.
COLUMNS = ("peer", "listener", "phase", "age", "idle", "bytes_in", "bytes_out")
_KEYS = {name: "opened" if name == "age" else name for name in COLUMNS}

# Characters of a peer's name in a row: an address and a port of any kind.
_PEER_SHOWN = 64

# Sweeps within an idle timeout, and how often that may be at the least and at the most, in seconds. A sweep of 10,000
# connections takes about 1.5 ms.
_SWEEPS, _SWEEP_LEAST, _SWEEP_MOST = 20, 0.05, 5.0

# Connections that are looked through in one turn of the reactor to count or list them, which takes up to 2 ms, and
# seconds until the next so many, so that this never takes more than about half of the process's time.
SLICE, _SLICE_PAUSE = 1000, 0.002

# Seconds between two log lines about the same kind of refusal.
_REPORT_EVERY = 10.0

# Bad PROXY headers of one listener that are logged in that time.
_BAD_HEADERS = 5


def end_reason(reason: Failure, *, peer_finished: bool, problem: Exception | None) -> str:
    """Why a connection ended, from a small fixed vocabulary.

    `peer_finished` says whether the peer had sent FIN, `problem` is what the kernel said last, or our own reason, if
    there is any.
    """
    if isinstance(problem, LocalClose):
        return str(problem)
    if isinstance(problem, ProxyError):
        return "invalid PROXY header"
    if isinstance(problem, ssl.SSLEOFError):
        return "peer finished without close_notify"
    if isinstance(problem, ssl.SSLError):
        # OpenSSL's word for it, which is none of the peer's bytes: HTTP_REQUEST, NO_SHARED_CIPHER, BAD_RECORD_MAC ...
        return f"TLS failed ({problem.reason or type(problem).__name__})"
    if isinstance(problem, OSError):
        if problem.errno in (errno.ECONNRESET, errno.EPIPE):
            return "reset by peer"
        return "timed out" if problem.errno == errno.ETIMEDOUT else "lost"
    if isinstance(reason.value, error.ConnectionAborted):
        return "aborted"
    if isinstance(reason.value, error.ConnectionDone):
        return "peer finished" if peer_finished else "closed"
    return "lost" if isinstance(reason.value, error.ConnectionLost) else "failed"


def peer_group(address: Any, prefix_v6: int) -> Hashable:
    """What counts as one peer: an IPv4 address, an IPv6 network of `prefix_v6` bits, or None for all UNIX clients.

    An IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2) is the IPv4 address.
    """
    host: str | None = getattr(address, "host", None)
    if host is None or ":" not in host:
        return host
    number = int(IPv6Address(host))
    if number >> 32 == 0xFFFF:
        return str(IPv4Address(number & 0xFFFFFFFF))
    return number >> (128 - prefix_v6)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the register holds connections to. All of it may change while it serves.

    `max_connections` (1 or more) counts every accepted connection, in whatever phase. When so many are open, listeners
    of ours `pause`, so that clients queue in the kernel, or a client is closed at once, with `reject`; a transport that
    is not ours cannot pause. `max_connections_per_peer` (0: no limit) closes at once in either case; `peer_prefix_v6`
    is what groups IPv6 peers, in bits. After `idle_timeout` seconds (0: never) without a byte in either direction, an
    open connection is closed. `proxy_from` are the networks whose PROXY headers are believed; UNIX clients are always.
    """

    max_connections: int
    max_connections_per_peer: int = 0
    peer_prefix_v6: int = 64
    at_limit: Literal["pause", "reject"] = "pause"
    idle_timeout: float = 0.0
    proxy_from: tuple[IPv4Network | IPv6Network, ...] = ()


def _count_phases(connections: Iterable[Any]) -> dict[str, int]:
    count = dict.fromkeys(("proxy", "tls", "open", "closing"), 0)
    for connection in connections:
        count[connection.phase] += 1
    return count


# Takes what there is to say about a connection at its end: peer, listener, seconds, bytes in, bytes out, why.
Record = Callable[[str, str, float, int, int, str], None]


def first_rows(rows: list[list[Any]], sort: str, count: int) -> list[list[Any]]:
    """The first of many rows, each of which is what `Registry.rows` gives after the number of its worker."""
    place = 1 + COLUMNS.index(sort.removeprefix("-"))
    chosen = nlargest if sort.startswith("-") else nsmallest
    return chosen(count, rows, key=lambda row: 0.0 if row[place] is None else row[place])


class Registry:
    """Every accepted connection of this process, of all transports. Each gets a record in the log, or `record`."""

    def __init__(self, log: Logger, limits: Limits, record: Record | None = None) -> None:
        self._log = log
        self._access = record
        self._seconds = monotonic
        self.limits = limits
        # In the order of their arrival. Their phase says how far they are: see `net.connection.Connection`.
        self.open: dict[Any, ListenerStats] = {}
        self.ports: list[Any] = []  # what pauses at the limit
        self.ended = self.aborted = 0  # all that have ended; those of them that were aborted, by whomever
        self.refused = dict.fromkeys(REFUSALS, 0)
        self._tallies: dict[str, ListenerStats] = {}  # by listener
        self.when_empty: Callable[[], None] | None = None
        self._peers: dict[Hashable, int] = {}
        self._paused = False
        self._told: set[Any] = set()
        self._reported: dict[str, tuple[float, int]] = {}  # when a refusal was last logged, and how many there were
        self._bad_headers: dict[str, Sparse] = {}  # by listener
        self._summaries: dict[str, Any] = {}  # the delayed calls that say how many were not logged
        self._clock: Any = None
        self._sweeping = LoopingCall(self.sweep)
        self._slices: Cooperator | None = None  # once there is a clock
        self._counted: dict[str, int] = {}  # what a whole count came to
        self._phases: dict[str, int] = {}
        self._counting = False
        self._await_count: list[Deferred[None]] = []

    def start(self, clock: Any) -> None:
        """Look for idle connections from now on, by this clock (an IReactorTime)."""
        self._seconds = clock.seconds
        self._clock = clock
        self._sweeping.clock = clock
        self._slices = Cooperator(
            terminationPredicateFactory=lambda: lambda: True,  # one slice for all
            scheduler=lambda step: clock.callLater(_SLICE_PAUSE, step),
        )
        self.apply(self.limits)

    def stop(self) -> None:
        """Look no more."""
        self._stop_sweeping()
        self._clock = None
        for listener, call in list(self._summaries.items()):
            call.cancel()
            self._sum_up_headers(listener)

    def _stop_sweeping(self) -> None:
        if self._sweeping.running:
            self._sweeping.stop()

    def apply(self, limits: Limits) -> None:
        """Hold connections to these from now on. Open ones stay, also above a limit."""
        self.limits = limits
        self._peers = {}
        if limits.max_connections_per_peer:
            for connection in self.open:
                if connection.phase != "proxy":
                    self._count_peer(connection.getPeer())
        self._pause_or_resume()
        self._stop_sweeping()
        if limits.idle_timeout:
            self._sweeping.start(min(max(limits.idle_timeout / _SWEEPS, _SWEEP_LEAST), _SWEEP_MOST), now=False)

    # --- what a Port tells ---

    def opened(self, connection: Any) -> None:
        """A connection of ours (a `net.connection.Connection`) was accepted; it may be refused."""
        why = self._why_not(connection.getPeer(), connection.phase)
        if why:
            self._refuse(connection, why)
        else:
            self._add(connection, connection.port.name)

    def identified(self, connection: Any) -> None:
        """A PROXY header has named the peer; it may be refused."""
        if not self.limits.max_connections_per_peer:
            return
        if self._is_one_too_many(connection.getPeer()):
            self.open.pop(connection).ended(
                "refused", "open", monotonic() - connection.opened, connection.bytes_in, connection.bytes_out
            )
            self._refuse(connection, "max-connections-per-peer")
            self._pause_or_resume()
        else:
            self._count_peer(connection.getPeer())

    def _add(self, connection: Any, listener: str) -> None:
        if connection.phase != "proxy" and self.limits.max_connections_per_peer:
            self._count_peer(connection.getPeer())
        tally = self.open[connection] = self._tally(listener)
        tally.opened += 1
        if len(self.open) >= self.limits.max_connections:
            self._pause_or_resume()

    def closed(self, connection: Any, reason: Failure) -> None:
        """Write the record of a connection of ours, and forget it."""
        if isinstance(connection.error, ProxyError):
            self._log_bad_header(connection, connection.error)
        self._record(
            connection.getPeer(),
            connection.port.name,
            connection.opened,
            connection.bytes_in,
            connection.bytes_out,
            end_reason(reason, peer_finished=connection.peer_finished, problem=connection.error),
            connection.phase,
        )
        self._forget(connection, reason)

    def _log_bad_header(self, connection: Any, problem: ProxyError) -> None:
        """Log what a misconfigured proxy, or a client without one, has sent: some of them, and how many more."""
        listener = connection.port.name
        sparse = self._bad_headers.setdefault(listener, Sparse(_BAD_HEADERS, _REPORT_EVERY))
        if sparse.admit(self._seconds()):
            self._log.info(
                "bad PROXY header from {peer} on {listener}: {problem}; it begins {beginning}",
                peer=peer_name(connection.getPeer()),
                listener=listener,
                problem=str(problem),
                beginning=repr(problem.beginning)[1:],
            )
        elif listener not in self._summaries and self._clock is not None:
            self._summaries[listener] = self._clock.callLater(_REPORT_EVERY, self._sum_up_headers, listener)

    def _sum_up_headers(self, listener: str) -> None:
        self._summaries.pop(listener, None)
        self._log.info(
            "{headers} on {listener}",
            headers=counted(self._bad_headers[listener].take_missed(), "more bad PROXY header"),
            listener=listener,
        )

    def _forget(self, connection: Any, reason: Failure) -> None:
        self.open.pop(connection, None)
        self.ended += 1
        if type(reason.value) is error.ConnectionAborted:
            self.aborted += 1
        if self.limits.max_connections_per_peer and connection.phase != "proxy":
            self._count_peer(connection.getPeer(), -1)
        if self._paused:
            self._pause_or_resume()
        if self.when_empty is not None:
            self._told.discard(connection)
            if not self.open:
                self.when_empty()

    def _pause_or_resume(self) -> None:
        """Have the listeners accept, or not, as the limit says."""
        paused = self.limits.at_limit == "pause" and len(self.open) >= self.limits.max_connections
        if paused != self._paused:
            self._paused = paused
            if paused and self._worth_reporting("pause"):
                self._log.warn(
                    "--max-connections {limit} reached: clients wait until a place is free",
                    limit=self.limits.max_connections,
                )
            for port in self.ports:
                (port.pause if paused else port.resume)()

    # --- whom to refuse ---

    def _why_not(self, peer: Any, phase: str = "open") -> str:
        """Why a client that has come may not stay, of REFUSALS; empty if it may."""
        if len(self.open) >= self.limits.max_connections:
            return "max-connections"
        if phase == "proxy":
            return "" if self._believed(peer) else "proxy-from"
        if self.limits.max_connections_per_peer and self._is_one_too_many(peer):
            return "max-connections-per-peer"
        return ""

    def _is_one_too_many(self, peer: Any) -> bool:
        group = peer_group(peer, self.limits.peer_prefix_v6)
        return self._peers.get(group, 0) >= self.limits.max_connections_per_peer

    def _count_peer(self, peer: Any, change: int = 1) -> None:
        group = peer_group(peer, self.limits.peer_prefix_v6)
        count = self._peers.pop(group, 0) + change
        if group is not None and count > 0:
            self._peers[group] = count

    def _believed(self, peer: Any) -> bool:
        host: str | None = getattr(peer, "host", None)
        if host is None:  # any user who may open the socket file
            return True
        address = ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.limits.proxy_from)

    def _refuse(self, connection: Any, why: str) -> None:
        connection.refuse()
        self._count_refusal(connection.getPeer(), connection.port.name, why)

    def _count_refusal(self, peer: Any, listener: str, why: str) -> None:
        """Count it, and log it: one line in a while for each reason, since a flood must not become one of lines."""
        self.refused[why] += 1
        self._tally(listener).refuse(why)
        before = self._reported.get(why, (0.0, 0))[1]
        if self._worth_reporting(why):
            self._log.warn(
                "refused {peer} on {listener}: {why}{more}",
                peer=peer_name(peer),
                listener=listener,
                why=REFUSALS[why],
                more=f" ({self.refused[why] - before - 1} more since the last such line)" if before else "",
            )

    def _worth_reporting(self, what: str) -> bool:
        now = self._seconds()
        if what in self._reported and now - self._reported[what][0] < _REPORT_EVERY:
            return False
        self._reported[what] = now, self.refused.get(what, 0)
        return True

    # --- deadlines ---

    def sweep(self, timeout: float | None = None) -> None:
        """End the open connections on which no byte has moved for `timeout` seconds; without one, the idle timeout.

        A connection is looked at, and not timed: nothing of this is paid for by a message. It is found no earlier than
        `timeout` after its last byte, and no later than two sweeps after that.
        """
        if timeout is None:
            timeout = self.limits.idle_timeout
        now = self._seconds()
        for connection in list(self.open):
            moved = connection.bytes_in + connection.bytes_out
            if connection.phase != "open":  # it has a deadline of its own, and the idle time begins after that
                connection.seen = -1
            elif moved != connection.seen:
                connection.seen = moved
                connection.still_since = now
            elif now - connection.still_since >= timeout:
                if connection.unsent or connection.disconnecting or connection.error:  # or asked to end before
                    connection.abort("stopped reading")
                else:
                    connection.close("idle")

    def phases(self) -> dict[str, int]:
        """How many connections are in each phase; of many, as `counters` counted last."""
        if not self._are_many():
            self._phases = _count_phases(self.open)
            return dict(self._phases)
        self._start_counting()
        found = _count_phases(()) | self._phases
        found["open"] = max(0, len(self.open) - sum(found.values()) + found["open"])
        return found

    # --- what is counted: see `process.counters` ---

    def _tally(self, listener: str) -> ListenerStats:
        tally = self._tallies.get(listener)
        if tally is None:
            tally = self._tallies[listener] = ListenerStats()
        return tally

    def counters(self) -> dict[str, int]:
        """What was counted, connections that are open included.

        More than `SLICE` open connections are counted over several turns of the reactor, so that their sums are those
        of the last such count, and this call begins the next. See `refresh`.
        """
        if self._are_many():
            self._start_counting()
        else:
            for _ in self._count():
                pass
        return self._counted | {"open": len(self.open), "ended": self.ended, "aborted": self.aborted}

    def refresh(self) -> Deferred[None]:
        """Fires when `counters` has counted what is open now, or was when a count began that is under way."""
        if not self._are_many():
            return succeed(None)
        counted: Deferred[None] = Deferred()
        self._await_count.append(counted)
        self._start_counting()
        return counted

    def _are_many(self) -> bool:
        return self._slices is not None and len(self.open) > SLICE

    def _start_counting(self) -> None:
        if not self._counting and self._slices is not None:
            self._counting = True
            self._slices.coiterate(self._count()).addErrback(self._failed_to_count).addBoth(self._has_counted)

    def _failed_to_count(self, failure: Failure) -> None:
        self._log.failure("counting the connections failed", failure)

    def _has_counted(self, result: object) -> None:
        self._counting = False
        waiting, self._await_count = self._await_count, []
        for one in waiting:
            one.callback(None)

    def _count(self) -> Iterator[None]:
        """Count, a slice at each step.

        The totals are those of the first step. A connection that ends after that is in none of them yet, and is counted
        as open with the bytes that it came to: so no total falls from one count to the next.
        """
        found: dict[str, int] = {}
        for name, tally in self._tallies.items():
            found |= tally.counters(name)
        names = {tally: name for name, tally in self._tallies.items()}
        moved = {tally: [0, 0] for tally in names}
        phases: dict[ListenerStats, dict[str, int]] = {tally: {} for tally in names}
        # Two lists, since a list of many pairs would have the garbage collector look at every object.
        opened, tallies = list(self.open), list(self.open.values())
        for start in range(0, len(opened), SLICE):
            for connection, tally in zip(opened[start : start + SLICE], tallies[start : start + SLICE], strict=True):
                sums = moved[tally]
                sums[0] += connection.bytes_in
                sums[1] += connection.bytes_out
                counts = phases[tally]
                phase = connection.phase
                counts[phase] = counts.get(phase, 0) + 1
            yield
        for tally, (bytes_in, bytes_out) in moved.items():
            add(found, {f"in\t\t{names[tally]}": bytes_in, f"out\t\t{names[tally]}": bytes_out})
        self._phases = {}
        for tally, counts in phases.items():
            found |= {f"phase\t{phase}\t{names[tally]}": count for phase, count in counts.items()}
            add(self._phases, counts)
        self._counted = found

    def rows(self, sort: str, count: int) -> Deferred[list[list[Any]]]:
        """The first `count` open connections in this order, as COLUMNS: `age`, or `-age` for the largest first.

        Ages and idle times are in seconds; the latter is as exact as a sweep, and None where nothing is swept. Many
        connections are looked through over several turns of the reactor, as in `counters`.
        """
        first: list[tuple[Any, Any]] = []
        key = _KEYS[sort.removeprefix("-")]

        def ordered(connection: Any) -> Any:
            if key == "idle":
                return self._idle(connection) or 0.0
            if key == "listener":
                return names[self.open[connection]]
            return peer_name(connection.getPeer()) if key == "peer" else getattr(connection, key)

        # A connection that was opened earlier is older.
        largest = sort.startswith("-") != (key == "opened")
        choose = nlargest if largest else nsmallest
        names = {tally: name for name, tally in self._tallies.items()}

        def look() -> Iterator[None]:
            nonlocal first
            found = list(self.open)
            for start in range(0, len(found), SLICE):
                more = (
                    (ordered(connection), connection)
                    for connection in found[start : start + SLICE]
                    if connection in self.open  # still
                )
                first = choose(count, chain(first, more), key=itemgetter(0))
                yield

        def shown(result: object) -> list[list[Any]]:
            there = [connection for _, connection in first if connection in self.open]
            return [self._row(connection, names[self.open[connection]]) for connection in there]

        if self._slices is not None and self._are_many():
            return self._slices.coiterate(look()).addCallback(shown)
        for _ in look():
            pass
        return succeed(shown(None))

    def _row(self, connection: Any, listener: str) -> list[Any]:
        still = self._idle(connection)
        return [
            # What a row takes is bounded, also as JSON.
            peer_name(connection.getPeer()).encode("ascii", "backslashreplace").decode()[:_PEER_SHOWN],
            listener,
            connection.phase,
            round(monotonic() - connection.opened, 3),
            None if still is None else round(still, 3),
            connection.bytes_in,
            connection.bytes_out,
        ]

    def _idle(self, connection: Any) -> float | None:
        if not self._sweeping.running:
            return None
        moved = connection.bytes_in + connection.bytes_out
        return self._seconds() - connection.still_since if connection.seen == moved else 0.0

    # --- drain ---

    def tell_drain(self) -> None:
        """Tell each protocol that wants to know it that the service is about to end, once."""
        for connection in list(self.open):
            # In a handshake there may be somebody else in the place of the protocol.
            if connection.protocol is None or connection.phase == "tls" or connection in self._told:
                continue
            self._told.add(connection)
            # Twisted's layer of TLS is a protocol too, and wraps the one that may want to know; so do others.
            protocol = connection.protocol
            while isinstance(protocol, ProtocolWrapper) and IDrainable(protocol, None) is None:
                protocol = protocol.wrappedProtocol
            protocol = IDrainable(protocol, None)
            if protocol is not None:
                try:
                    protocol.drain()
                except BaseException:
                    self._log.failure("{protocol} failed in drain", protocol=type(protocol).__name__)
                    connection.abortConnection()

    def close_all(self, why: str) -> None:
        """Flush and close what is open; what has no protocol yet has nothing to flush."""
        now = self._seconds()
        for connection in list(self.open):
            connection.still_since = now
            if connection.phase == "open":
                connection.close(why)
            elif connection.phase != "closing":
                connection.abort(why)

    def abort_all(self, why: str) -> None:
        """Close whatever is there, at once."""
        for connection in list(self.open):
            connection.abort(why)

    # --- records ---

    def _record(
        self, peer: Any, listener: str, opened: float, bytes_in: int, bytes_out: int, reason: str, phase: str
    ) -> None:
        seconds = monotonic() - opened
        self._tally(listener).ended(reason, phase, seconds, bytes_in, bytes_out)
        name = peer_name(peer)
        if self._access is not None:
            self._access(name, listener, seconds, bytes_in, bytes_out, reason)
            return
        # The text is made here: formatting six fields was half of what Twisted's log took for a record. The fields are
        # there for observers of events.
        self._log.info(
            "{record}",
            # Not by `counted`, of which two calls would be 1 % of a short connection.
            record=f"{name} on {listener}: {seconds:.3f} s, {bytes_in} byte{'s' if bytes_in != 1 else ''} in, "
            f"{bytes_out} byte{'s' if bytes_out != 1 else ''} out, {reason}",
            peer=name,
            listener=listener,
            seconds=seconds,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            reason=reason,
        )

    def wrap(self, factory: Any, listener: str) -> CountingFactory:
        """A factory whose connections are in this register, for listeners whose transport is not ours."""
        return CountingFactory(factory, listener, self)

    def wrapped_admitted(self, peer: Any, listener: str) -> bool:
        """Whether a client of a transport that is not ours may stay."""
        why = self._why_not(peer)
        if why:
            self._count_refusal(peer, listener, why)
        return not why

    def failed_to_build(self, factory: Any) -> None:
        """Log what a factory has just raised."""
        self._log.failure("{factory} failed in buildProtocol", factory=type(factory).__name__)

    def wrapped_opened(self, connection: _Counting) -> None:
        """Such a connection was made."""
        self._add(connection, connection.factory.listener)

    def wrapped_closed(self, connection: _Counting, reason: Failure) -> None:
        """The end of such a connection."""
        # A transport of Twisted's does not say who began: the side that did not is the peer.
        finished = connection.peer_finished or not connection.disconnecting
        self._record(
            connection.getPeer(),
            connection.factory.listener,
            connection.opened,
            connection.bytes_in,
            connection.bytes_out,
            end_reason(reason, peer_finished=finished, problem=connection.error),
            connection.phase,
        )
        self._forget(connection, reason)


class _Counting(ProtocolWrapper):
    """Counts what passes between a transport of Twisted's and a protocol, and is to the register as a Connection is.

    It sees what is handed to the transport, not what the kernel took: of a connection that is reset, `bytes_out` is the
    most that can have been sent.
    """

    factory: CountingFactory
    transport: Any
    wrappedProtocol: Any
    phase = "open"
    unsent = 0  # not known

    def __init__(self, factory: CountingFactory, protocol: IProtocol) -> None:
        super().__init__(factory, protocol)  # type: ignore[arg-type]  # Twisted ties the two classes
        self.opened = monotonic()
        self.bytes_in = self.bytes_out = 0
        self.seen, self.still_since = -1, 0.0
        self.peer_finished = False
        self.error: Exception | None = None

    @property
    def protocol(self) -> Any:
        return self.wrappedProtocol

    @property
    def log_fields(self) -> dict[str, object]:
        return {"peer": peer_name(self.getPeer()), "listener": self.factory.listener}

    def makeConnection(self, transport: Any) -> None:
        super().makeConnection(transport)
        if IHalfCloseableProtocol.providedBy(self.wrappedProtocol):
            alsoProvides(self, IHalfCloseableProtocol)

    def write(self, data: bytes) -> None:
        self.bytes_out += len(data)
        self.transport.write(data)

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def dataReceived(self, data: bytes) -> None:
        self.bytes_in += len(data)
        self.wrappedProtocol.dataReceived(data)

    def readConnectionLost(self) -> None:
        self.peer_finished = True
        self.wrappedProtocol.readConnectionLost()

    def writeConnectionLost(self) -> None:
        self.wrappedProtocol.writeConnectionLost()

    def close(self, reason: str) -> None:
        """Close, with this reason for the record."""
        self.error = LocalClose(reason)
        self.loseConnection()

    def abort(self, reason: str) -> None:
        """Close at once, with this reason for the record."""
        self.error = LocalClose(reason)
        self.abortConnection()

    def abortConnection(self) -> None:
        """Close at once, as well as the transport can."""
        self.disconnecting = 1
        _abort(self.transport)

    def connectionLost(self, reason: Any = connectionDone) -> None:
        try:
            super().connectionLost(reason)
        finally:  # the last of them ends the factory
            self.factory.connections.wrapped_closed(self, reason)


def _abort(transport: Any) -> None:
    getattr(transport, "abortConnection", transport.loseConnection)()


class _Refused(Protocol):
    """Closes at once."""

    def makeConnection(self, transport: Any) -> None:
        _abort(transport)


class CountingFactory(WrappingFactory):
    """Wraps each protocol of a factory in one that counts and is registered."""

    noisy = False

    def __init__(self, factory: Any, listener: str, connections: Registry) -> None:
        super().__init__(factory)
        self.listener = listener
        self.connections = connections

    def buildProtocol(self, addr: IAddress | None) -> Any:
        if not self.connections.wrapped_admitted(addr, self.listener):
            return _Refused()
        try:
            protocol = self.wrappedFactory.buildProtocol(addr)
        except Exception:
            self.connections.failed_to_build(self.wrappedFactory)
            return _Refused()
        # None would do for some transports, and leave the client of others connected and in silence.
        return _Refused() if protocol is None else _Counting(self, protocol)

    def registerProtocol(self, p: Any) -> None:
        self.connections.wrapped_opened(p)

    def unregisterProtocol(self, p: Any) -> None:
        """The register knows, with the reason."""
