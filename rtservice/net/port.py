"""`Port`: accepts connections on a listening socket, and chooses the handshakes before the protocol."""

from __future__ import annotations

import errno
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet import interfaces
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.events import ACCEPT_PAUSED
from rtservice.net.address import Address, address_of
from rtservice.net.bpf import accept_new_clients, drop_new_clients
from rtservice.net.connection import Connection, log_prefix
from rtservice.net.handshakes import ProxyHandshake, TLSHandshake
from rtservice.net.lingering import Lingering
from rtservice.net.phases import OPEN, PROXY, TLS
from rtservice.net.tls import Context

# Default timeout in seconds, for the PROXY header and again for the TLS handshake.
HANDSHAKE_TIMEOUT = 10.0

# Connections accepted per event, for which open connections have to wait. With 64, the slowest 1 % of exchanges took up
# to 2 ms during a flood of refused connections.
ACCEPTS_PER_EVENT = 16

# Errors of accept() that concern one connection and not the listener (accept(2): "treat them like EAGAIN by retrying";
# EPERM comes from firewall rules).
_ACCEPT_SKIPS = frozenset(
    (
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EOPNOTSUPP,
        errno.ETIMEDOUT,
        getattr(errno, "ENONET", errno.EHOSTDOWN),
    )
)

# Errors of accept() that mean that this process or the host is out of descriptors or memory.
_ACCEPT_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# Seconds to pause accepting after such a shortage. The socket stays readable, and the reactor would spin.
_SHORTAGE_PAUSE = 0.5

# Seconds that `finish` waits for clients in their TCP handshake: a long round trip.
_QUIET = 0.2

_log = Logger()


def _begin_proxy(connection: Connection) -> None:
    ProxyHandshake(connection).begin()


def _begin_tls(connection: Connection) -> None:
    connection.port.start_tls(connection, connection.port.tls, server_side=True)


def _begin_protocol(connection: Connection) -> None:
    connection.enter(OPEN, None)
    connection.connect_protocol()


def _nothing(*arguments: object) -> None:
    """Do nothing: the default callback of a Port."""


@implementer(interfaces.IListeningPort, interfaces.IReadDescriptor, interfaces.ILoggingContext)
class Port:
    """Accepts connections from a bound, listening, non-blocking socket. The caller creates and closes the socket.

    `name` is its name in logs. With `proxied`, each connection begins with a PROXY header; `opened` decides which peers
    may send one. With `tls`, a TLS handshake follows. Each of the two has `handshake_timeout` seconds, and the protocol
    is built after them. `tls` (of the same library) and `handshake_timeout` may be changed at any time; the change
    applies to new connections.

    `opened` is called with each accepted Connection, and `identified` when its PROXY header is complete. Either may
    call the connection's `refuse`. `closed` is called with each connection that was not refused and the Failure that
    ended it, after the protocol's connectionLost. `broken` is called with the port and a Failure when an error, not
    stopListening, ends it.
    """

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        factory: Any,
        *,
        name: str,
        proxied: bool = False,
        tls: Context | None = None,
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
        opened: Callable[[Connection], None] = _nothing,
        identified: Callable[[Connection], None] = _nothing,
        closed: Callable[[Connection, Failure], None] = _nothing,
        broken: Callable[[Port, Failure], None] = _nothing,
    ) -> None:
        self.reactor = reactor
        self.socket = sock
        self.factory = factory
        self.name = name
        self.connection_opened = opened
        self.connection_identified = identified
        self.connection_closed = closed
        self._broken = broken
        self.tls = tls
        self.handshake_timeout = handshake_timeout
        self.proxied = proxied
        # The first phase of a connection; the function that begins it, and the one that begins the phase after a PROXY
        # header.
        self._phase = PROXY if proxied else OPEN if tls is None else TLS
        self.after_proxy: Callable[[Connection], None] = _begin_protocol if tls is None else _begin_tls
        self._begin = _begin_proxy if proxied else Connection.connect_protocol if tls is None else _begin_tls
        # Only rtservice's reactor has these. With others, a write outside of an event waits until the kernel reports
        # writability, and a stage is unregistered before the next one is registered.
        self.write_soon: Callable[[Any], None] | None = getattr(reactor, "write_soon", None)
        self.exchange: Callable[[Any, Any], None] | None = getattr(reactor, "exchange", None)
        self.fileno = sock.fileno
        self.listening = False
        self.paused = False
        self._number = 0
        self._resting: Any = None  # the delayed call that ends a pause
        self._shortage = 0  # the errno of the shortage that was logged last
        self._finished: Deferred[None] | None = None
        self._quiet: Any = None  # the delayed call that checks whether `finish` is done

    def startListening(self) -> None:
        """Start the factory, and start accepting."""
        if self.socket.family != socket.AF_UNIX:
            _tune_tcp(self.socket)
            accept_new_clients(self.socket)
        self.factory.doStart()
        self.listening = True
        if not self.paused:
            self.reactor.addReader(self)

    def stopListening(self) -> Deferred[None]:
        """Stop accepting, and stop the factory. The socket stays open; the caller closes it."""
        if self.listening:
            self.listening = False
            self.reactor.removeReader(self)
            for call in (self._resting, self._quiet):
                if call is not None:
                    call.cancel()
            self._resting = self._quiet = None
            self.factory.doStop()
            if self._finished is not None:
                self._finished.callback(None)
        return succeed(None)

    def pause(self) -> None:
        """Pause accepting: clients stay in the backlog until `resume`. Open connections continue."""
        self.paused = True
        self.reactor.removeReader(self)

    def resume(self) -> None:
        """Resume accepting."""
        self.paused = False
        if self.listening and self._resting is None:
            self.reactor.addReader(self)

    def finish(self) -> Deferred[None]:
        """Accept the clients in the backlog, then stop as stopListening does. The Deferred fires after that.

        On Linux, SYNs of new TCP clients are dropped from now on, so that the backlog becomes empty. These clients
        retry a second later, and reach a closed port or a successor. The caller must have removed the file of a UNIX
        socket before. A paused port waits for `resume`.
        """
        if not self.listening:
            return succeed(None)
        if self.socket.family != socket.AF_UNIX:
            drop_new_clients(self.socket)
        self._finished = Deferred()
        self._finish_when_quiet(-1)
        return self._finished

    def _finish_when_quiet(self, number: int) -> None:
        self._quiet = None
        if not self.paused and self._resting is None:
            before = self._number
            self.doRead()
            if not self.listening:
                return
            if before == number == self._number and not self.paused and self._resting is None:
                self.stopListening()
                return
        self._quiet = self.reactor.callLater(_QUIET, self._finish_when_quiet, self._number)

    def connectionLost(self, reason: Failure) -> None:
        """Stop, and call `broken`. Called by the reactor when it ends or when the socket has failed."""
        if self.listening:
            self.stopListening()
            self._broken(self, reason)

    def doRead(self) -> None:
        accept = self.socket.accept
        for _ in range(ACCEPTS_PER_EVENT):
            try:
                sock, address = accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno in _ACCEPT_SKIPS:
                    continue
                if problem.errno in _ACCEPT_SHORTAGES:
                    self._rest(problem)
                    return
                raise
            self._shortage = 0
            self._accepted(sock, address)
            if self.paused or not self.listening:  # a callback or a protocol has paused or stopped this port
                return

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        sock.setblocking(False)
        self._number += 1
        connection = Connection(self.reactor, sock, self, address_of(address), self._number, self._phase)
        self.connection_opened(connection)
        if not connection.disconnected:
            try:
                self._begin(connection)
            except BaseException:  # usually of a producer of the protocol; the port continues
                connection._failed()

    def start_tls(self, connection: Connection, context: Any, *, server_side: bool) -> None:
        """Begin a TLS handshake on a connection. `context` and the errors are those of `Connection.startTLS`."""
        if isinstance(context, ssl.SSLContext):
            wrong = ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER
            if context.protocol == wrong or (context.check_hostname and not server_side):
                raise ValueError(f"this context cannot be the {'server' if server_side else 'client'} of a handshake")
            TLSHandshake(connection, context, server_side=server_side).begin()
        else:
            from rtservice.net.pyopenssl_stream import PyOpenSSLStream

            PyOpenSSLStream(connection, context, server_side=server_side).begin()

    def linger(self, connection: Connection) -> None:
        """Keep a connection that closes until its last output is delivered."""
        Lingering(connection).begin()

    def _rest(self, problem: OSError) -> None:
        """Pause accepting for a short time: clients stay in the backlog. Open connections continue."""
        if problem.errno != self._shortage:
            self._shortage = problem.errno or 0
            ACCEPT_PAUSED.log(_log, listener=self.name, problem=problem.strerror)
        self.reactor.removeReader(self)
        self._resting = self.reactor.callLater(_SHORTAGE_PAUSE, self._rested)

    def _rested(self) -> None:
        self._resting = None
        if not self.paused:
            self.reactor.addReader(self)

    def getHost(self) -> Address:
        return address_of(self.socket.getsockname())

    def logPrefix(self) -> str:
        return log_prefix(self.factory)

    def __repr__(self) -> str:
        return f"<Port {self.name} of {log_prefix(self.factory)}>"


def _tune_tcp(sock: socket.socket) -> None:
    """Set options that accepted connections inherit on Linux, which saves system calls for each connection."""
    # Writes of one event are joined already. Nagle would only delay output until earlier output is acknowledged.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that disappeared without FIN is detected after 2 + 4 x 0.5 minutes. A probe every two minutes is also below
    # the idle timeouts of common NATs and load balancers.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
