"""TLS of an outgoing connection, with the standard library's `ssl`.

Twisted's own TLS needs pyOpenSSL, which does not work with MemoryDenyWriteExecute=yes of systemd: its callbacks need
memory that is writable and executable.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.escaping import escaped
from rtservice.hub.redis_url import BadHubURL, TLSFiles

_READ_SIZE = 1 << 16


def client_context(files: TLSFiles) -> ssl.SSLContext:
    """Return a context for the TLS options of a URL. Raises BadHubURL if a file cannot be used.

    Certificates and host names are verified, unless `verify` is False.
    """
    try:
        context = ssl.create_default_context(cafile=files.cafile or None)
    except (OSError, ValueError) as problem:  # ssl.SSLError is an OSError
        raise BadHubURL(f"cafile {escaped(files.cafile)}: {_reason(problem)}") from None
    if files.certfile:
        try:
            # Without a password callback OpenSSL would ask for one on the terminal.
            context.load_cert_chain(files.certfile, files.keyfile or None, password=lambda: b"")
        except (OSError, ValueError) as problem:
            raise BadHubURL(f"certfile {escaped(files.certfile)}: {_reason(problem)}") from None
    if not files.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _reason(problem: Exception) -> str:
    if isinstance(problem, ssl.SSLError):
        return "is not a file of certificates, or of a certificate and its key, in PEM format"
    return escaped(getattr(problem, "strerror", None) or str(problem))


@implementer(IStreamClientEndpoint)
class TLSClientEndpoint:
    """Connects with TLS over another endpoint. `connect` fires once the handshake is complete."""

    def __init__(self, endpoint: Any, context: ssl.SSLContext, host: str) -> None:
        self._endpoint = endpoint
        self._context = context
        self._host = host

    def connect(self, factory: Any) -> Deferred[Any]:
        """Connect; fails with ssl.SSLError if the handshake fails, such as ssl.SSLCertVerificationError."""

        def cancel(_: object) -> None:
            connecting.cancel()
            stream.abort_connecting()

        def fail(failure: Failure) -> None:
            if not connected.called:
                connected.errback(failure)

        connected: Deferred[Any] = Deferred(cancel)
        stream = TLSClientStream(self._context, self._host, factory, connected)
        outer = Factory.forProtocol(lambda: stream)
        outer.noisy = False
        connecting: Deferred[Any] = self._endpoint.connect(outer).addErrback(fail)
        return connected


class TLSClientStream(Protocol):
    """The TLS of one connection: the protocol of the socket, and the transport of the inner protocol."""

    transport: Any

    def __init__(self, context: ssl.SSLContext, host: str, factory: Any, connected: Deferred[Any]) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._factory = factory
        self._connected = connected
        self._inner: Any = None
        self._problem: BaseException | None = None  # why this side ended it

    # --- the protocol of the socket ---

    def connectionMade(self) -> None:
        """Begin the handshake."""
        self._shake()

    def dataReceived(self, data: bytes) -> None:
        """Continue the handshake, or decrypt."""
        self._incoming.write(data)
        if self._inner is None and not self._shake():
            return
        try:
            while self._problem is None and (plain := self._tls.read(_READ_SIZE)):
                self._inner.dataReceived(plain)
        except ssl.SSLWantReadError:
            self._send()  # such as the answer to a KeyUpdate
            return
        except ssl.SSLError as problem:
            self._fail(problem)
            return
        self.loseConnection()  # after close_notify

    def _shake(self) -> bool:
        if self._problem is not None:
            return False
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return False
        except (ssl.SSLError, ValueError) as problem:  # ValueError: a host name that is not valid for SNI
            self._send()  # the alert
            self._fail(problem)
            return False
        self._send()
        self._inner = self._factory.buildProtocol(self.transport.getPeer())
        self._inner.makeConnection(self)
        self._connected.callback(self._inner)
        return self._problem is None

    def _fail(self, problem: BaseException) -> None:
        # The traceback refers to frames, which would keep the stream until a garbage collection.
        self._problem = self._problem or problem.with_traceback(None)
        self.transport.loseConnection()

    def connectionLost(self, reason: Any = None) -> None:
        """Report the end to the inner protocol, or the failed handshake."""
        reason = reason if self._problem is None else Failure(self._problem)
        if self._inner is not None:
            self._inner.connectionLost(reason)
        elif not self._connected.called:
            self._connected.errback(reason)

    def abort_connecting(self) -> None:
        """End a connection whose handshake is not complete."""
        if self.transport is not None and self._inner is None:
            self.transport.abortConnection()

    # --- the transport of the inner protocol ---

    def write(self, data: bytes) -> None:
        """Encrypt and send."""
        if self._problem is not None:
            return
        view = memoryview(data)
        at = 0
        try:
            while at < len(view):
                at += self._tls.write(view[at:])
        except ssl.SSLError as problem:
            self._fail(problem)
        self._send()

    def writeSequence(self, pieces: Iterable[bytes]) -> None:
        """Encrypt and send."""
        self.write(b"".join(pieces))

    def loseConnection(self) -> None:
        """Close after everything written is sent."""
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()  # close_notify
        self._send()
        self.transport.loseConnection()

    def abortConnection(self) -> None:
        """Close at once."""
        self.transport.abortConnection()

    def _send(self) -> None:
        if data := self._outgoing.read():
            self.transport.write(data)
