"""The public API for authors of protocols. All of it is optional.

An ordinary Twisted `Protocol` and `Factory` are served unchanged. Their transport has Twisted's contract. `getPeer`
returns the address of the client, also behind a proxy. With TLS the transport provides `ISSLTransport` and
`INegotiated`, and has the attributes `tls_version` and `tls_cipher`. Its `getHandle` (an `ssl.SSLObject`) and
`getPeerCertificate` return objects of Python's `ssl`. On a listener with `library=pyopenssl` the transport is Twisted's
`TLSMemoryBIOProtocol`, and they return objects of pyOpenSSL.

Twisted's own optional interfaces `IHalfCloseableProtocol`, `IHandshakeListener` and `ILoggingContext` work as on
Twisted's transports. `library=pyopenssl` has no half-close.

`startFactory` is called once in each process, before the first connection, and `stopFactory` once, after the last. A
factory or protocol gets further calls if it provides one of these interfaces, with `zope.interface.implementer`. The
API is stable.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Mapping
from typing import Any

from twisted.logger import Logger
from zope.interface import Interface


class Secret:
    """A text that must not be shown, such as a password, a key or a token.

    Annotate a parameter of a factory or protocol with it: `def __init__(self, password: Secret)`. Then the value of
    `--protocol-option password=@/run/secrets/pw` is converted to a Secret. `str()`, `repr()`, f-strings and `%s` give
    `<hidden>`, so logs, error messages and tracebacks do not show the text by accident. `reveal()` returns the text.

    It is not a `str`. A library that receives it by mistake raises TypeError, and does not use `<hidden>` as the text.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(<hidden>)"

    def __str__(self) -> str:
        return "<hidden>"

    def __format__(self, spec: str) -> str:
        return format("<hidden>", spec)

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        # In constant time, which does not reveal where the texts differ.
        own, others = (
            secret._text.encode("utf-8", "surrogatepass") if isinstance(secret, Secret) else None
            for secret in (self, other)
        )
        return NotImplemented if own is None or others is None else hmac.compare_digest(own, others)

    def __hash__(self) -> int:
        return hash(self._text)


class IStartable(Interface):
    """A factory that does some work before the service accepts connections."""

    def start() -> Awaitable[object]:
        """Do the work, and return a Deferred or a coroutine. Called once in each process, after `startFactory`.

        Until it is done, no connection is accepted, and the service is not ready. If it fails, the start of the
        service, or of this worker, fails with the exception in one line. A worker that is not done after 60 seconds is
        killed.
        """


class IDrainable(Interface):
    """A protocol or a factory that takes part in the graceful shutdown."""

    def drain() -> None:
        """Begin the graceful shutdown: finish the work in progress, then call the transport's `loseConnection`.

        Called once on the factory, then once on the protocol of each open connection, and of each that opens later. The
        connection stays open. A connection that is still open after the drain timeout is closed; all written output is
        sent first.
        """


class IMetrics(Interface):
    """A factory that adds values to the metrics."""

    def metrics() -> Mapping[str, int | float]:
        """Return the values by their names.

        A name consists of letters, digits and underscores, begins with a letter, and has at most 100 characters. At
        most 100 names are shown. Called about once a second while the factory serves, and once at its end.

        A name that ends in `_total` is a counter, which must never decrease; the counts of workers that have ended are
        added to it. Other names are gauges. `/metrics` shows them as `rtservice_protocol_NAME` for each worker, the
        status page shows their sum. An invalid name or value is omitted, and the log contains the reason.
        """


class IOneProcess(Interface):
    """A factory whose connections must be in one process, since they share memory.

    With more than one worker, the service fails to start.
    """


class ConnectionLogger(Logger):
    """A `twisted.logger.Logger` whose records have the fields of a protocol's connection.

    The fields are `peer` and `listener`, as in the record at the end of the connection, and `connection`, its number on
    this listener. A transport that is not rtservice's may lack some of them. Create the logger in `connectionMade`:
    `self.log = ConnectionLogger(self)`.
    """

    def __init__(self, protocol: Any) -> None:
        kind = type(protocol)
        super().__init__(namespace=f"{kind.__module__}.{kind.__qualname__}", source=protocol)
        self._fields: dict[str, object] = getattr(protocol.transport, "log_fields", {})

    def emit(self, level: Any, format: str | None = None, **kwargs: object) -> None:
        """Log as in Twisted, with these fields added. A field of the record itself takes precedence."""
        super().emit(level, format, **{**self._fields, **kwargs})
