"""What a protocol author may import, and the whole of it; nothing of it has to be.

An ordinary Twisted `Protocol` and `Factory` are served as they are. Their transport has Twisted's contract: `getPeer`
is the client, also behind a proxy; with TLS it provides `ISSLTransport` and `INegotiated`, and has `tls_version` and
`tls_cipher`. Its `getHandle` (an `ssl.SSLObject`) and `getPeerCertificate` give what Python's `ssl` has, or, on a
listener with `library=pyopenssl`, what pyOpenSSL has; the transport is then Twisted's `TLSMemoryBIOProtocol`.

`startFactory` is called once in each process, before the first connection, and `stopFactory` once, after the last. What
a factory or protocol wants beyond that it says by providing one of these interfaces, with `zope.interface.implementer`.
All of it is stable.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Mapping
from typing import Any

from twisted.logger import Logger
from zope.interface import Interface


class Secret:
    """A text that is not to be shown: a password, a key, a token. For parameters of a factory or a protocol.

    `def __init__(self, password: Secret)` has `--protocol-option password=@/run/secrets/pw` converted to one. `str()`,
    `repr()`, f-strings and `%s` give `<hidden>`, so that it is in no log, no error message and no traceback that shows
    variables by accident; `reveal()` gives the text. It is no `str`, since a library that was given it by mistake would
    use the text in some places and `<hidden>` in others: it raises TypeError instead.
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
        # In a time that says nothing about where they differ.
        ours, theirs = (
            one._text.encode("utf-8", "surrogatepass") if isinstance(one, Secret) else None for one in (self, other)
        )
        return NotImplemented if ours is None or theirs is None else hmac.compare_digest(ours, theirs)

    def __hash__(self) -> int:
        return hash(self._text)


class IStartable(Interface):
    """A factory that has something to do before it serves."""

    def start() -> Awaitable[object]:
        """Called once in each process, after startFactory; gives a Deferred or a coroutine.

        Nobody is accepted before it is done, and the service is not ready. If it fails, so does the start of the
        service, or of this worker, with the exception in one line. A worker that takes a minute for it is killed.
        """


class IDrainable(Interface):
    """A protocol, or a factory, that wants to say goodbye before the service ends."""

    def drain() -> None:
        """The service is about to end. Called once on the factory and then once on the protocol of each open
        connection, also of those that open from now on.

        The connection goes on: finish what is under way, then call the transport's `loseConnection`. What is still
        open after the service's drain timeout is closed by it, with everything written sent first.
        """


class IMetrics(Interface):
    """A factory that counts something."""

    def metrics() -> Mapping[str, int | float]:
        """What it has counted, by names of letters, digits and underscores that begin with a letter: 100 of them at
        the most, of 100 characters.

        Called now and then while the factory serves, and once at its end. A name that ends in `_total` is of
        something that only grows: what workers that have ended counted stays part of it. Others are what is now. The
        status page shows them added up; in `/metrics` they are `rtservice_protocol_NAME`, one for each worker. What
        cannot be shown is left out, and the log says why.
        """


class IOneProcess(Interface):
    """A factory whose connections have to be in one process, since they know of each other: with several workers,
    such a service does not start."""


class ConnectionLogger(Logger):
    """A `twisted.logger.Logger` whose records have the fields of a protocol's connection.

    These are `peer` and `listener`, as in the record that the service writes at the connection's end, and `connection`,
    its number on this listener, where the transport is rtservice's. On a transport that knows none of these there are
    none. To be made when the protocol is connected: `self.log = ConnectionLogger(self)` in `connectionMade`.
    """

    def __init__(self, protocol: Any) -> None:
        of = type(protocol)
        super().__init__(namespace=f"{of.__module__}.{of.__qualname__}", source=protocol)
        self._fields: dict[str, object] = getattr(protocol.transport, "log_fields", {})

    def emit(self, level: Any, format: str | None = None, **kwargs: object) -> None:
        """As in Twisted, with these fields; those of the record itself win."""
        super().emit(level, format, **{**self._fields, **kwargs})
