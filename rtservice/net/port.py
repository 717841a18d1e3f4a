"""`Port`: accept connections on a listening socket, and choose the handshakes before the protocol."""

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

from rtservice.net.address import Address, address_of
from rtservice.net.bpf import accept_new_clients, drop_new_clients
from rtservice.net.connection import Connection, log_prefix
from rtservice.net.handshakes import ProxyHandshake, TLSHandshake
from rtservice.net.lingering import Lingering
from rtservice.net.phases import OPEN, PROXY, TLS
from rtservice.net.tls import Context

# Default timeout of a PROXY header and of a TLS handshake, each, in seconds.
HANDSHAKE_TIMEOUT = 10.0

# Connections accepted per event, for which open ones have to wait: with 64, the slowest hundredth of exchanges took up
# to 2 ms during a flood of connects that were refused.
ACCEPTS_PER_EVENT = 16

# Why accept() can fail for one connection while the listener is fine (accept(2): "treat them like EAGAIN by
# retrying"; EPERM is a firewall's refusal).
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

# Why accept() can fail because this process or the host has run out of something.
_ACCEPT_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# Seconds without accepting after such a shortage: the socket stays readable, and the reactor would spin.
_SHORTAGE_PAUSE = 0.5

# Seconds that a listener that finishes waits for clients whose TCP handshake is under way: a long round trip.
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
    """The default of each callback of a Port."""


@implementer(interfaces.IListeningPort, interfaces.IReadDescriptor, interfaces.ILoggingContext)
class Port:
    """Accepts connections from a bound, listening, non-blocking socket. The caller makes and closes the socket.

    `name` is its name in logs. With `proxied`, each connection begins with a PROXY header; `opened` decides which peers
    may send one. With `tls`, a TLS handshake follows. Each of the two has `handshake_timeout` seconds, and the protocol
    is built after them. `tls` (of the same library) and `handshake_timeout` may be changed at any time; the change
    applies to new connections.

    `opened` is called with each Connection when it is accepted, and `identified` when its PROXY header is complete.
    Either may call the connection's `refuse`. `closed` is called with each connection that was not refused and the
    Failure that ended it, after its protocol was told. `broken` is called when the port can accept no more without
    having been stopped.
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
        # The first phase of a connection, and what begins it; what follows a PROXY header.
        self._phase = PROXY if proxied else OPEN if tls is None else TLS
        self.after_proxy: Callable[[Connection], None] = _begin_protocol if tls is None else _begin_tls
        self._begin = _begin_proxy if proxied else Connection.connect_protocol if tls is None else _begin_tls
        # Only our reactor has them. With others a write outside of an event waits until the kernel says that it may,
        # and a stage is unregistered before the next one is registered.
        self.write_soon: Callable[[Any], None] | None = getattr(reactor, "write_soon", None)
        self.exchange: Callable[[Any, Any], None] | None = getattr(reactor, "exchange", None)
        self.fileno = sock.fileno
        self.listening = False
        self.paused = False
        self._number = 0
        self._resting: Any = None  # the delayed call that ends a pause
        self._shortage = 0  # the errno of a shortage that is already logged
        self._finished: Deferred[None] | None = None
        self._quiet: Any = None  # the delayed call that ends a listener that finishes

    def startListening(self) -> None:
        """Start the factory, and start to accept."""
        if self.socket.family != socket.AF_UNIX:
            _tune_tcp(self.socket)
            accept_new_clients(self.socket)
        self.factory.doStart()
        self.listening = True
        if not self.paused:
            self.reactor.addReader(self)

    def stopListening(self) -> Deferred[None]:
        """Stop to accept; the factory is stopped. The socket stays open: it is its maker's to close."""
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
        """Leave clients in the kernel's queue until `resume`. Open connections go on."""
        self.paused = True
        self.reactor.removeReader(self)

    def resume(self) -> None:
        """Accept again."""
        self.paused = False
        if self.listening and self._resting is None:
            self.reactor.addReader(self)

    def finish(self) -> Deferred[None]:
        """Accept who is in the queue already, then stop as stopListening does. The Deferred fires after that.

        On Linux new clients of a TCP socket are not answered from now on, so that the queue has an end: they try again
        a second later, and find a closed port or a successor. The file of a UNIX socket has to be gone already. A
        paused port waits until it may go on.
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
        """Called by the reactor, at its own end or when the socket is broken."""
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
            if self.paused or not self.listening:  # the registry, or a protocol, has stopped this port
                return

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        sock.setblocking(False)
        self._number += 1
        connection = Connection(self.reactor, sock, self, address_of(address), self._number, self._phase)
        self.connection_opened(connection)
        if not connection.disconnected:
            try:
                self._begin(connection)
            except BaseException:  # most likely of a producer of its protocol: the port goes on
                reason = Failure()
                _log.failure("{connection} failed as it began", reason, connection=connection)
                connection.connectionLost(reason)

    def start_tls(self, connection: Connection, context: Any, *, server_side: bool) -> None:
        """Begin a TLS handshake on a connection, with what `startTLS` takes. Raises what that does."""
        if isinstance(context, ssl.SSLContext):
            wrong = ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER
            if context.protocol == wrong or (context.check_hostname and not server_side):
                raise ValueError(f"this context cannot be the {'server' if server_side else 'client'} of a handshake")
            TLSHandshake(connection, context, server_side=server_side).begin()
        else:
            from rtservice.net.pyopenssl_stream import PyOpenSSLStream

            PyOpenSSLStream(connection, context, server_side=server_side).begin()

    def linger(self, connection: Connection) -> None:
        """Begin the end of a connection whose last output is under way."""
        Lingering(connection).begin()

    def _rest(self, problem: OSError) -> None:
        """Leave clients in the kernel's queue for a while. Open connections go on."""
        if problem.errno != self._shortage:
            self._shortage = problem.errno or 0
            _log.error("{listener} accepts nobody for now: {problem}", listener=self.name, problem=problem.strerror)
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
    """Set options that accepted connections inherit on Linux, so that they cost no system calls for each."""
    # Writes of one event are joined already. Nagle would only delay the answer until the last one is acknowledged.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that vanished without FIN is found after 2 + 4 x 0.5 minutes instead of never; a probe every two minutes is
    # also below the idle limits of common NATs and load balancers.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
