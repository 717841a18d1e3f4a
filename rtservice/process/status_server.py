"""The status server: listeners and connections of `--status`, served until the end of a shutdown."""

from __future__ import annotations

from time import monotonic
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure

from rtservice.events import STATUS_LISTENING
from rtservice.net.connection import LocalClose
from rtservice.net.listener import Listener
from rtservice.net.port import ACCEPTS_PER_EVENT, Port
from rtservice.process.admission import Limits
from rtservice.process.registry import Registry
from rtservice.process.socket_files import close_listeners

# Connections of the status server: a scraper, a load balancer's probes, a few people. And their minimum where
# descriptors are scarce.
CONNECTIONS, _FEWEST = 100, 4

# Minimum seconds that a connection is kept before it makes room for another, which limits new connections per second;
# and seconds after which an unfinished request makes room before idle connections. A request and its answer take some
# milliseconds.
_STAY, _SLOW = 0.2, 1.0

# Idle timeout in seconds. The protocol has further deadlines, which no byte extends.
_IDLE_TIMEOUT = 30.0


class StatusServer:
    """Serves a factory on the listeners of `--status`, with separate limits. Without listeners it is false.

    Its connections are not counted among those of the service. At `CONNECTIONS` connections, the first of these makes
    room for a new one:

    1. a connection that is closing;
    2. the oldest connection whose request is incomplete after `_SLOW` seconds;
    3. the oldest idle connection;
    4. the oldest connection whose request is incomplete;
    5. the oldest connection.

    A protocol reports its state in the attributes `idle`, `complete` and `since` (a time.monotonic). Without these it
    counts as incomplete since its connection was opened. New clients wait in the backlog until a connection was kept
    for `_STAY` seconds. So clients that hold connections, or that reconnect often, cannot keep out a new client.

    `descriptors` is the maximum number of descriptors that it may use, which can limit its connections; None is
    unlimited.
    """

    def __init__(self, log: Logger, listeners: list[Listener] | None = None, descriptors: int | None = None) -> None:
        self._log = log
        self.listeners = listeners or []
        self._most = CONNECTIONS
        if descriptors is not None:
            self._most = max(_FEWEST, min(CONNECTIONS, descriptors - self._beside_connections()))
        # Not limited to `_most`: a connection that makes room stays registered until the next turn of the reactor.
        limits = Limits(max_connections=2**31, at_limit="reject", idle_timeout=_IDLE_TIMEOUT)
        # Clients that poll each second must not fill the log.
        self._connections = Registry(Logger(observer=_discard), limits)  # type: ignore[arg-type]  # a plain function
        self._leaving: set[Any] = set()
        self._ports: list[Port] = []
        self._reactor: Any = None
        self._paused = False
        self._made_room = 0.0  # when
        self._resuming: Any = None  # the delayed call that ends a pause

    def __bool__(self) -> bool:
        return bool(self.listeners)

    @property
    def descriptors(self) -> int:
        """The maximum number of descriptors that it uses at once."""
        return self._most + self._beside_connections() if self else 0

    def _beside_connections(self) -> int:
        # Each accepted client makes another one leave, one turn later.
        return len(self.listeners) * (1 + ACCEPTS_PER_EVENT)

    def start(self, reactor: Any, factory: Any) -> None:
        """Accept on the listeners, and serve `factory`."""
        if not self:
            return
        self._reactor = reactor
        self._connections.start(reactor)
        for listener in self.listeners:
            port = Port(
                reactor,
                listener.socket,
                factory,
                name=listener.name,
                tls=listener.tls,
                opened=self._opened,
                identified=self._connections.identified,
                closed=self._closed,
            )
            self._ports.append(port)
            port.startListening()
            STATUS_LISTENING.log(self._log, listener=listener.name)

    def _opened(self, connection: Any) -> None:
        if self._is_full():
            self._make_room()
        self._connections.opened(connection)
        self._pause_or_resume()

    def _closed(self, connection: Any, reason: Failure) -> None:
        self._leaving.discard(connection)
        self._connections.closed(connection, reason)
        self._pause_or_resume()

    def _is_full(self) -> bool:
        return len(self._connections.open) - len(self._leaving) >= self._most

    def _staying(self) -> list[Any]:
        return [connection for connection in self._connections.open if connection not in self._leaving]

    def _make_room(self) -> None:
        now = monotonic()
        staying = self._staying()
        candidates = [connection for connection in staying if now - connection.opened >= _STAY] or staying
        replaced = min(candidates, key=lambda connection: _importance(connection, now))
        self._leaving.add(replaced)
        self._made_room = now
        replaced.error = LocalClose("made room")
        # Closed without a reset: the client may not have read its answer yet. Closed in the next turn: the descriptor
        # must not be reused while this batch of events is handled.
        self._reactor.callLater(0, replaced.connectionLost, Failure(ConnectionDone()))

    def _pause_or_resume(self) -> None:
        """Accept while there is room, or while a connection can make room."""
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        seconds = 0.0
        if self._is_full():
            oldest = min(connection.opened for connection in self._staying())
            # Spaced evenly, so that many clients that reconnect at once take little of each turn of the reactor.
            seconds = max(oldest + _STAY, self._made_room + _STAY / self._most) - monotonic()
        if seconds > 0:
            self._resuming = self._reactor.callLater(seconds, self._resume)
        if self._paused != (seconds > 0):
            self._paused = seconds > 0
            for port in self._ports:
                (port.pause if self._paused else port.resume)()

    def _resume(self) -> None:
        self._resuming = None
        self._pause_or_resume()

    def served(self) -> list[tuple[Listener, Port]]:
        """Return the listeners, each with the port that accepts on it, once it accepts."""
        return list(zip(self.listeners, self._ports, strict=False))

    def stop(self) -> None:
        """Abort the connections, and close the sockets."""
        for port in self._ports:
            port.stopListening()
        self._connections.abort_all("cut off")
        self._connections.stop()
        listeners, self.listeners = self.listeners, []
        close_listeners(listeners, self._log)


def _importance(connection: Any, now: float) -> tuple[int, float]:
    """Return the sort key of a connection. The connection with the smallest key makes room first."""
    if connection.phase == "closing":
        return 0, connection.opened
    protocol: Any = connection.protocol
    while isinstance(protocol, ProtocolWrapper):  # Twisted's layer of TLS
        protocol = protocol.wrappedProtocol
    since = getattr(protocol, "since", connection.opened)
    if getattr(protocol, "idle", False):
        return 2, since
    if getattr(protocol, "complete", False):
        return 4, since
    return (1 if now - since >= _SLOW else 3), since


def _discard(event: object) -> None:
    """Discard a log record."""
