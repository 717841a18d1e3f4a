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
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from zope.interface import Attribute, Interface


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


class HubUnavailable(Exception):  # noqa: N818  # it is the state of the hub that a caller asks about
    """The hub has no connection to Redis, or Redis refused the operation, or the hub has stopped.

    Without `--hub` only the last case and one other are possible: a claim is not decided within 10 seconds, because
    another worker hangs. The operation may have had an effect or not: some receivers may have got the message.
    """


class HubFull(Exception):  # noqa: N818  # as HubUnavailable
    """Too many messages wait in the hub. The message was not accepted, and no receiver gets it.

    The limits are 4 MiB of one topic and 64 MiB of all topics that wait for receivers of this process, and 20,000
    messages or 16 MiB that Redis has not confirmed. Each message counts as its length and 100 bytes. A worker that has
    just started accepts 10,000 messages or 4 MiB before it is linked with the others.
    """


@dataclass(frozen=True)
class Members:
    """A snapshot of the members of a topic.

    `total` is the number of all members. `members` has them in any order; if there are more than 1,000, it has at most
    1,000 of them. A member that joined twice is there twice.
    """

    members: tuple[bytes, ...]
    total: int


class IReceiver(Interface):
    """An object that receives the messages of topics.

    The hub calls it in the thread of the reactor, and never from within `publish` or another method of the hub. An
    exception is logged, and has no other effect. Both methods must return quickly, since they delay all other receivers
    of the process. If a client reads too slowly, its receiver should skip messages or close the connection; otherwise
    the unsent output grows.
    """

    def received(topic: str, message: bytes) -> None:
        """Handle a message."""

    def gap(topic: str) -> None:
        """Handle a gap: messages may be missing between the last one of this topic and the next one.

        Reload what the client sees from where it is stored, or tell the client.
        """


class ISubscription(Interface):
    """The result of `IHub.subscribe`."""

    def cancel() -> None:
        """End the subscription. The receiver is not called again. A second call does nothing."""


class IMembership(Interface):
    """The result of `IHub.join`."""

    def leave() -> None:
        """End the membership. A second call does nothing."""


class IClaim(Interface):
    """The result of `IHub.claim`: the only claim of its key in the whole service."""

    lost = Attribute(
        "A Deferred that fires with None when another process holds the key. That can happen with `--hub` only, when "
        "this process had no connection to Redis for 20 seconds, or Redis has lost data. The process learns it when it "
        "has a connection again; until then both processes have the claim. It does not fire after `release`."
    )

    def release() -> None:
        """End the claim. A second call does nothing."""


class IHub(Interface):
    """Publish and subscribe, presence and claims, across all processes of the service.

    Without `--hub` these are the processes of one service on one machine: one process, or the workers. With `--hub`
    these are all processes that use the same Redis and prefix, also on other machines. The hub guarantees in each case:

    - A message is delivered at most once to each subscription, and never twice.
    - Messages that one process publishes to one topic arrive in that order. Messages of different processes may arrive
      in a different order in different processes.
    - Loss is never silent. A receiver gets each message that is published after its subscription is active. Otherwise
      its `gap` is called, or the Deferred of `publish` fails.
    - A slow receiver, process or machine does not delay the others.
    - Members and claims of a process that was killed disappear: at once without `--hub`, within 30 seconds with it.

    It does not provide delivery exactly once, patterns of topics, requests with replies, or a history of messages.

    A topic or a key has 1 to 200 bytes in UTF-8, a message at most 1 MiB, a member or a holder at most 1 KiB. Other
    values raise ValueError or TypeError. A topic needs no creation: it exists while it is used. Topics and keys are
    independent: a claim of the key `a` and the topic `a` have nothing to do with each other.

    Call the methods in the thread of the reactor. The Deferreds that they return may have fired already. After the hub
    has stopped, at the end of the process, they fail with HubUnavailable.
    """

    def publish(topic: str, message: bytes) -> Deferred[None]:
        """Publish a message to all receivers of the topic, including those of this process.

        Fires with None when the hub has accepted the message. That does not tell whether there are receivers. Fails
        with HubUnavailable or HubFull. After HubUnavailable some receivers may have got the message.
        """

    def subscribe(topic: str, receiver: IReceiver) -> Deferred[ISubscription]:
        """Deliver messages of the topic to an IReceiver.

        Fires with an ISubscription when the subscription is active: each message that is published anywhere after that
        is delivered. While Redis is unavailable, it waits. To end a subscription that is not active yet, cancel the
        Deferred. A receiver may subscribe several times, and gets a message once for each subscription.
        """

    def join(topic: str, member: bytes) -> Deferred[IMembership]:
        """Add a member to the topic: bytes, such as a name. `members` shows it until it leaves, or its process ends.

        Fires with an IMembership when `members` shows the member in all processes. While Redis is unavailable, it
        waits. To end a membership that has not begun yet, cancel the Deferred. A member need not be subscribed.
        """

    def members(topic: str) -> Deferred[Members]:
        """Fires with the Members of the topic, in all processes. Fails with HubUnavailable."""

    def claim(key: str, holder: bytes) -> Deferred[IClaim | None]:
        """Claim a key, such as a nickname. `holder` is kept for people who look into Redis; no method returns it.

        Fires with an IClaim, or with None if the key is claimed already, in any process. The claim ends with `release`,
        or with the process. If the Deferred is cancelled, the claim is released. Fails with HubUnavailable; without
        `--hub` only if another worker hangs, after 10 seconds.
        """


class IHubUser(Interface):
    """A factory that uses the hub: its connections communicate with each other, across processes and machines."""

    def use(hub: IHub) -> None:
        """Keep the hub, for example as `self.hub`.

        Called once in each process, after `startFactory` and before `IStartable.start`. The methods of the hub can be
        called from now on. With `--hub` it has no connection yet: `subscribe` and `join` wait, and the others fail with
        HubUnavailable. Do not await them in `IStartable.start`: the service would not start while Redis is unavailable.
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
