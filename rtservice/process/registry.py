"""The registry of open connections: accounting, idle timeout, shutdown, and a record of each connection's end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from heapq import nlargest, nsmallest
from itertools import chain
from operator import itemgetter
from time import monotonic
from typing import Any

from twisted.internet import error
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Cooperator, LoopingCall
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure

from rtservice.events import CONNECTION_CLOSED, CONNECTION_COUNT_FAILED, PROTOCOL_FAILED
from rtservice.interfaces import IDrainable
from rtservice.net.address import peer_name
from rtservice.net.phases import CLOSING, OPEN, PROXY, TLS, Phase
from rtservice.net.proxy import ProxyError
from rtservice.process.admission import Admission, Limits, RefusalLog
from rtservice.process.bad_headers import BadHeaderLog
from rtservice.process.counters import ABORTED, ENDED, OPEN_CONNECTIONS, CounterKey, add
from rtservice.process.endings import end_reason
from rtservice.process.listener_stats import ListenerStats

# The columns of `Registry.rows`, by which rows may be sorted, and the attribute of a connection behind each.
COLUMNS = ("peer", "listener", "phase", "age", "idle", "bytes_in", "bytes_out")
_ATTRIBUTES = {name: "opened" if name == "age" else name for name in COLUMNS}

# Characters of a peer's name in a row: an IP address of either family and its port fit.
_PEER_LENGTH = 64

# Sweeps within an idle timeout, and the minimum and maximum seconds between two sweeps. A sweep of 10,000 connections
# takes about 1.5 ms.
_SWEEPS, _SWEEP_LEAST, _SWEEP_MOST = 20, 0.05, 5.0

# Connections that are counted or listed in one turn of the reactor, which takes up to 2 ms; and seconds until the next
# turn. So this work takes at most about half of the process's time.
SLICE, _SLICE_PAUSE = 1000, 0.002

# Called at the end of each connection with peer, listener, seconds, bytes in, bytes out, and the reason.
ConnectionRecorder = Callable[[str, str, float, int, int, str], None]


def first_rows(rows: list[list[Any]], sort: str, count: int) -> list[list[Any]]:
    """Return the first `count` rows in the order `sort`. A row is the number of a worker and a row of its registry."""
    column = 1 + COLUMNS.index(sort.removeprefix("-"))
    choose = nlargest if sort.startswith("-") else nsmallest
    return choose(count, rows, key=lambda row: 0.0 if row[column] is None else row[column])


def _count_phases(connections: Iterable[Any]) -> dict[Phase, int]:
    count = dict.fromkeys(Phase, 0)
    for connection in connections:
        count[connection.phase] += 1
    return count


class Registry:
    """The accepted connections of a process, on all transports.

    At the end of each connection `record` is called; without it, a record is logged.
    """

    def __init__(self, log: Logger, limits: Limits, record: ConnectionRecorder | None = None) -> None:
        self._log = log
        self._recorder = record
        self._seconds = monotonic
        self._admission = Admission(limits)
        self._refusals = RefusalLog(log)
        self._bad_headers = BadHeaderLog(log)
        self.open: dict[Any, ListenerStats] = {}  # each connection in its order of arrival, with its listener's stats
        self.ports: list[Any] = []  # paused at the limit
        self.ended = self.aborted = 0  # ended connections, and those among them that this side aborted
        self.when_empty: Callable[[], None] | None = None
        self._stats: defaultdict[str, ListenerStats] = defaultdict(ListenerStats)  # by listener
        self._paused = False
        self._notified: set[Any] = set()  # connections whose protocol was notified of the drain
        self._sweeping = LoopingCall(self.sweep)
        self._slices: Cooperator | None = None  # once there is a clock
        self._counted: dict[CounterKey, int] = {}  # the result of the last complete count
        self._phases: dict[Phase, int] = {}
        self._counting = False
        self._await_count: list[Deferred[None]] = []

    def start(self, clock: Any) -> None:
        """Start to close idle connections, with this clock (an IReactorTime)."""
        self._seconds = clock.seconds
        self._bad_headers.start(clock)
        self._sweeping.clock = clock
        self._slices = Cooperator(
            terminationPredicateFactory=lambda: lambda: True,  # one slice in a turn, for all tasks together
            scheduler=lambda step: clock.callLater(_SLICE_PAUSE, step),
        )
        self.apply(self._admission.limits)

    def stop(self) -> None:
        """Stop closing idle connections, and log pending summaries."""
        self._stop_sweeping()
        self._bad_headers.stop()

    def _stop_sweeping(self) -> None:
        if self._sweeping.running:
            self._sweeping.stop()

    def apply(self, limits: Limits) -> None:
        """Replace the limits. Open connections stay open, also above a limit."""
        identified = (connection for connection in self.open if connection.phase is not PROXY)
        self._admission.apply(limits, (connection.getPeer() for connection in identified))
        self._pause_or_resume()
        self._stop_sweeping()
        if limits.idle_timeout:
            self._sweeping.start(min(max(limits.idle_timeout / _SWEEPS, _SWEEP_LEAST), _SWEEP_MOST), now=False)

    # --- called by a Port ---

    def opened(self, connection: Any) -> None:
        """Register an accepted `net.connection.Connection`, or refuse it."""
        refusal = self._admission.refusal(connection.getPeer(), len(self.open), connection.phase)
        if refusal:
            self._refuse(connection, refusal)
        else:
            self.add(connection)

    def identified(self, connection: Any) -> None:
        """Check the limit per peer, now that the PROXY header has named the peer. The connection may be refused."""
        admission = self._admission
        if not admission.limits.max_connections_per_peer:
            return
        peer = connection.getPeer()
        if admission.is_peer_full(peer):
            self.open.pop(connection).add_closed(
                "refused", OPEN, monotonic() - connection.opened, connection.bytes_in, connection.bytes_out
            )
            self._refuse(connection, "max-connections-per-peer")
            self._pause_or_resume()
        else:
            admission.add_peer(peer)

    def closed(self, connection: Any, reason: Failure) -> None:
        """Write the record of a connection that has ended, and remove it. `reason` is as for `connectionLost`."""
        problem = connection.error
        if isinstance(problem, ProxyError):
            self._bad_headers.add(connection.getPeer(), connection.port.name, problem, self._seconds())
        self._record(connection, end_reason(reason, peer_finished=connection.peer_finished, problem=problem))
        self.open.pop(connection, None)
        self.ended += 1
        if type(reason.value) is error.ConnectionAborted:
            self.aborted += 1
        admission = self._admission
        if admission.limits.max_connections_per_peer and connection.phase is not PROXY:
            admission.remove_peer(connection.getPeer())
        if self._paused:
            self._pause_or_resume()
        if self.when_empty is not None:
            self._notified.discard(connection)
            if not self.open:
                self.when_empty()

    # --- limits ---

    def add(self, connection: Any) -> None:
        """Register a connection that is not refused."""
        limits = self._admission.limits
        if limits.max_connections_per_peer and connection.phase is not PROXY:
            self._admission.add_peer(connection.getPeer())
        stats = self.open[connection] = self._stats[connection.port.name]
        stats.opened += 1
        if len(self.open) >= limits.max_connections:
            self._pause_or_resume()

    def admits(self, peer: Any, listener: str) -> bool:
        """Return whether to serve a client of a Twisted endpoint. A refused client is counted and logged."""
        refusal = self._admission.refusal(peer, len(self.open))
        if refusal:
            self._count_refusal(peer, listener, refusal)
        return not refusal

    def _refuse(self, connection: Any, refusal: str) -> None:
        connection.refuse()
        self._count_refusal(connection.getPeer(), connection.port.name, refusal)

    def _count_refusal(self, peer: Any, listener: str, refusal: str) -> None:
        self._stats[listener].add_refused(refusal)
        self._refusals.refused(peer, listener, refusal, self._seconds())

    def _pause_or_resume(self) -> None:
        """Pause or resume accepting, according to the limit."""
        paused = self._admission.is_full(len(self.open))
        if paused != self._paused:
            self._paused = paused
            if paused:
                self._refusals.paused(self._admission.limits.max_connections, self._seconds())
            for port in self.ports:
                (port.pause if paused else port.resume)()

    # --- idle timeout ---

    def sweep(self, timeout: float | None = None) -> None:
        """Close connections in the phase OPEN without a byte for `timeout` seconds; None is the idle timeout.

        Each sweep compares the byte counts of each connection with those of the previous sweep, so that a message costs
        nothing. A connection is closed at least `timeout` after its last byte, and at most two sweeps later.
        """
        if timeout is None:
            timeout = self._admission.limits.idle_timeout
        now = self._seconds()
        for connection in list(self.open):
            moved = connection.bytes_in + connection.bytes_out
            if connection.phase is not OPEN:  # other phases have their own timeouts; the idle time begins after them
                connection.seen = -1
            elif moved != connection.seen:
                connection.seen = moved
                connection.still_since = now
            elif now - connection.still_since >= timeout:
                # `close` waits for the peer to read. This peer does not read, or `close` was called before.
                if connection.unsent or connection.disconnecting or connection.error:
                    connection.abort("stopped reading")
                else:
                    connection.close("idle")

    # --- counters ---

    def counters(self) -> dict[CounterKey, int]:
        """Return the counters of connections: see `process.counters`.

        More than `SLICE` open connections are counted over several turns of the reactor. Then this returns the result
        of the last count, and starts the next. See `refresh`.
        """
        if self._are_many():
            self._start_counting()
        else:
            for _ in self._count():
                pass
        return self._counted | {
            OPEN_CONNECTIONS: len(self.open),
            ENDED: self.ended,
            ABORTED: self.aborted,
        }

    def refresh(self) -> Deferred[None]:
        """Return a Deferred that fires when the open connections are counted.

        A count in progress is not restarted. It counts the connections that were open at its start.
        """
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
        CONNECTION_COUNT_FAILED.failure(self._log, failure)

    def _has_counted(self, result: object) -> None:
        self._counting = False
        waiting, self._await_count = self._await_count, []
        for counted in waiting:
            counted.callback(None)

    def _count(self) -> Iterator[None]:
        """Count the connections, a slice in each step.

        The totals of ended connections are taken in the first step. A connection that ends after that is counted as
        open, with its last number of bytes. So no total decreases from one count to the next.
        """
        found: dict[CounterKey, int] = {}
        for listener, stats in self._stats.items():
            found |= stats.counters(listener)
        listeners = {stats: listener for listener, stats in self._stats.items()}
        bytes_by_listener = {stats: [0, 0] for stats in listeners}  # received and sent
        phases: dict[ListenerStats, dict[Phase, int]] = {stats: {} for stats in listeners}
        # Two lists, since the garbage collector would look at each pair of a list of many pairs.
        connections, stats_of_each = list(self.open), list(self.open.values())
        for start in range(0, len(connections), SLICE):
            end = start + SLICE
            for connection, stats in zip(connections[start:end], stats_of_each[start:end], strict=True):
                sums = bytes_by_listener[stats]
                sums[0] += connection.bytes_in
                sums[1] += connection.bytes_out
                counts = phases[stats]
                phase = connection.phase
                counts[phase] = counts.get(phase, 0) + 1
            yield
        for stats, (bytes_in, bytes_out) in bytes_by_listener.items():
            listener = listeners[stats]
            add(found, {CounterKey("in", "", listener): bytes_in, CounterKey("out", "", listener): bytes_out})
        self._phases = {}
        for stats, counts in phases.items():
            found |= {CounterKey("phase", str(phase), listeners[stats]): count for phase, count in counts.items()}
            add(self._phases, counts)
        self._counted = found

    def phases(self) -> dict[Phase, int]:
        """Return the number of connections in each phase; with more than `SLICE`, those of the last count."""
        if not self._are_many():
            self._phases = _count_phases(self.open)
            return dict(self._phases)
        self._start_counting()
        found = _count_phases(()) | self._phases
        found[OPEN] = max(0, len(self.open) - sum(found.values()) + found[OPEN])
        return found

    # --- rows ---

    def rows(self, sort: str, count: int) -> Deferred[list[list[Any]]]:
        """Fire with the first `count` open connections in the order `sort`, each a list of the values of COLUMNS.

        `sort` is a column, with `-` before it for descending order. Ages and idle times are in seconds. Idle times are
        as exact as a sweep, and None without an idle timeout. More than `SLICE` connections are sorted over several
        turns of the reactor.
        """
        first: list[tuple[Any, Any]] = []
        attribute = _ATTRIBUTES[sort.removeprefix("-")]

        def sort_key(connection: Any) -> Any:
            if attribute == "idle":
                return self._idle(connection) or 0.0
            if attribute == "listener":
                return connection.port.name
            return peer_name(connection.getPeer()) if attribute == "peer" else getattr(connection, attribute)

        # The oldest connection has the smallest `opened`.
        descending = sort.startswith("-") != (attribute == "opened")
        choose = nlargest if descending else nsmallest

        def search() -> Iterator[None]:
            nonlocal first
            connections = list(self.open)
            for start in range(0, len(connections), SLICE):
                more = (
                    (sort_key(connection), connection)
                    for connection in connections[start : start + SLICE]
                    if connection in self.open  # still
                )
                first = choose(count, chain(first, more), key=itemgetter(0))
                yield

        def found(result: object) -> list[list[Any]]:
            return [self._row(connection) for _, connection in first if connection in self.open]

        if self._slices is not None and self._are_many():
            return self._slices.coiterate(search()).addCallback(found)
        for _ in search():
            pass
        return succeed(found(None))

    def _row(self, connection: Any) -> list[Any]:
        idle = self._idle(connection)
        return [
            # Its length is bounded, also in JSON.
            peer_name(connection.getPeer()).encode("ascii", "backslashreplace").decode()[:_PEER_LENGTH],
            connection.port.name,
            connection.phase,
            round(monotonic() - connection.opened, 3),
            None if idle is None else round(idle, 3),
            connection.bytes_in,
            connection.bytes_out,
        ]

    def _idle(self, connection: Any) -> float | None:
        if not self._sweeping.running:
            return None
        moved = connection.bytes_in + connection.bytes_out
        return self._seconds() - connection.still_since if connection.seen == moved else 0.0

    # --- shutdown ---

    def notify_drain(self) -> None:
        """Call `drain` of each protocol that provides IDrainable, once for each connection."""
        for connection in list(self.open):
            # Until a TLS handshake is done, the connection's protocol is not the hosted one.
            if connection.protocol is None or connection.phase is TLS or connection in self._notified:
                continue
            self._notified.add(connection)
            # Twisted's TLS, and other wrappers, are protocols around the hosted one.
            protocol = connection.protocol
            while isinstance(protocol, ProtocolWrapper) and IDrainable(protocol, None) is None:
                protocol = protocol.wrappedProtocol
            protocol = IDrainable(protocol, None)
            if protocol is not None:
                try:
                    protocol.drain()
                except BaseException:
                    PROTOCOL_FAILED.failure(
                        self._log,
                        protocol=type(protocol).__name__,
                        method="drain",
                        peer=peer_name(connection.getPeer()),
                        listener=connection.port.name,
                    )
                    connection.abortConnection()

    def close_all(self, reason: str) -> None:
        """Flush and close all connections, with this reason. Abort those without a protocol: they have no output."""
        now = self._seconds()
        for connection in list(self.open):
            connection.still_since = now
            if connection.phase is OPEN:
                connection.close(reason)
            elif connection.phase is not CLOSING:
                connection.abort(reason)

    def abort_all(self, reason: str) -> None:
        """Close all connections at once, with this reason."""
        for connection in list(self.open):
            connection.abort(reason)

    # --- records ---

    def _record(self, connection: Any, reason: str) -> None:
        seconds = monotonic() - connection.opened
        listener = connection.port.name
        bytes_in, bytes_out = connection.bytes_in, connection.bytes_out
        self._stats[listener].add_closed(reason, connection.phase, seconds, bytes_in, bytes_out)
        name = peer_name(connection.getPeer())
        if self._recorder is not None:
            self._recorder(name, listener, seconds, bytes_in, bytes_out, reason)
            return
        # The text is formatted here: six fields in the format took half of the time of a record in Twisted's log. The
        # fields are for observers of events.
        CONNECTION_CLOSED.log(
            self._log,
            # Without `counted`: two calls take 1 % of the time of a short connection.
            record=f"{name} on {listener}: {seconds:.3f} s, {bytes_in} byte{'s' if bytes_in != 1 else ''} in, "
            f"{bytes_out} byte{'s' if bytes_out != 1 else ''} out, {reason}",
            peer=name,
            listener=listener,
            seconds=seconds,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            reason=reason,
        )
