"""The default protocol: greets each client, then echoes everything that it sends."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from zope.interface import implementer

from rtservice.counted import counted
from rtservice.events import ECHO_MESSAGE_REJECTED
from rtservice.protocols import framings
from rtservice.protocols.alias import Alias

Greet = Literal["connect", "first-data"]
Framing = Literal["raw", "line", "netstring", "int32"]


@implementer(IHalfCloseableProtocol)
class Echo(Protocol):
    """Echoes all received bytes in order, until the client's FIN."""

    factory: EchoFactory
    transport: Any  # Twisted divides the methods of a stream transport among five interfaces
    log: ClassVar[Logger] = Logger()

    def connectionMade(self) -> None:
        # Back-pressure: the transport, registered as its own producer, pauses reading while more than its buffer size
        # is unsent. So a client that sends and never reads costs bounded memory.
        self.transport.registerProducer(self.transport, True)
        if not self.factory.greeting:
            return
        if self.factory.greet == "connect":
            self.send_greeting(self.factory.greeting)
        else:
            self.dataReceived = self._first_data  # type: ignore[method-assign]  # undone by the first data

    def _first_data(self, data: bytes) -> None:
        del self.dataReceived
        self.send_greeting(self.factory.greeting)
        self.dataReceived(data)

    def send_greeting(self, greeting: bytes) -> None:
        self.transport.write(greeting)

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)

    def readConnectionLost(self) -> None:
        """Send unsent output, then close: the client has sent FIN."""
        self.close()

    def writeConnectionLost(self) -> None:
        """Close: nothing more can be echoed."""
        self.close()

    def close(self) -> None:
        """Send unsent output, then close."""
        # Twisted's transports do not close while a paused producer is registered.
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def refuse(self, problem: str) -> None:
        """Close after an error of the client, and log the reason.

        `problem` must not contain bytes of the client.
        """
        fields = getattr(self.transport, "log_fields", None) or {"peer": str(self.transport.getPeer())}
        ECHO_MESSAGE_REJECTED.log(self.log, peer=fields["peer"], problem=problem)
        self.close()


class FramedEcho(Echo):
    """Echoes complete messages with their framing, unchanged.

    An invalid message closes the connection; the messages before it are echoed.
    """

    framing: ClassVar[type[framings.Framing]]

    def connectionMade(self) -> None:
        self._framing = self.framing(self.factory.max_message)
        super().connectionMade()

    def send_greeting(self, greeting: bytes) -> None:
        self.transport.write(self.framing.frame(greeting))

    def dataReceived(self, data: bytes) -> None:
        complete = self._framing.take(data)
        if complete:
            self.transport.write(complete)
        if self._framing.problem and not self.transport.disconnecting:
            self.refuse(self._framing.problem)


class EchoLines(FramedEcho):
    r"""Echoes lines that end with `\n` or `\r\n`, with their own terminator. The greeting ends with `\r\n`."""

    framing = framings.Lines


class EchoNetstrings(FramedEcho):
    """Echoes netstrings."""

    framing = framings.Netstrings


class EchoInt32(FramedEcho):
    """Echoes messages that follow their length as 32 bits in network byte order."""

    framing = framings.Int32


PROTOCOLS: dict[Framing, type[Echo]] = {
    "raw": Echo,
    "line": EchoLines,
    "netstring": EchoNetstrings,
    "int32": EchoInt32,
}


class EchoFactory(Factory[Echo]):
    """Greets each client, then echoes everything that it sends.

    `greeting` is sent once to each client, as one message of the framing; empty disables it. `greet` selects the time:
    when the client connects, or before its first data is echoed. `framing` divides the stream into messages; `raw` has
    no messages. With the others, a message of more than `max_message` bytes (1 or more), without its framing, closes
    the connection, and the reason is logged.

    Raises ValueError if the greeting is not one valid message of the framing, or if `max_message` is below 1.
    """

    noisy = False

    aliases: ClassVar = (
        Alias(
            "greeting", r"(echo) Greeting sent to each client; empty disables it. Escapes: `\r \n \t \0 \e \\ \xHH`."
        ),
        Alias("greet", "(echo) When to greet: on `connect`, or before the answer to the `first-data`."),
        Alias("framing", "(echo) Unit that is echoed: `raw` bytes, or each `line`, `netstring` or `int32` message."),
        Alias(
            "max-message",
            "(echo) Longest message of a framing, in bytes. A longer one closes its connection.",
            metavar="BYTES",
            bounds=(1, 2**30),
        ),
    )

    def __init__(
        self,
        greeting: bytes = b"Hello from the server!",
        greet: Greet = "connect",
        framing: Framing = "raw",
        max_message: int = 64 * 1024,
    ) -> None:
        if max_message < 1:
            raise ValueError(f"max-message is {counted(max_message, 'byte')}; it must be 1 or more")
        if framing == "line" and b"\n" in greeting:
            raise ValueError("the greeting contains a line feed; with the framing `line` it must be one line")
        if framing != "raw" and len(greeting) > max_message:
            raise ValueError(f"the greeting is {counted(len(greeting), 'byte')}; the maximum is {max_message}")
        self.greeting = greeting
        self.greet = greet
        self.max_message = max_message
        self.protocol = PROTOCOLS[framing]
