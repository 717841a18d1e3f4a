"""The default protocol: greet each client, then send back everything that it sends."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from zope.interface import implementer

from rtservice.counted import counted
from rtservice.protocols import framings

Greet = Literal["connect", "first-data"]
Framing = Literal["raw", "line", "netstring", "int32"]


@implementer(IHalfCloseableProtocol)
class Echo(Protocol):
    """Bytes in, the same bytes out, in order, until the client has finished sending."""

    factory: EchoFactory
    transport: Any  # Twisted's interfaces split in five what every stream transport has
    log: ClassVar[Logger] = Logger()

    def connectionMade(self) -> None:
        # The transport is its own producer: it stops reading while more than its buffer size is unsent, so a client
        # that sends and never reads costs a bounded amount of memory.
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
        """The client has finished sending (FIN): what is still unsent goes out, then the connection closes."""
        self.close()

    def writeConnectionLost(self) -> None:
        """Nothing more can be sent, so nothing more is worth reading."""
        self.close()

    def close(self) -> None:
        """Send what is buffered, then close."""
        # Twisted's transports keep a connection open whose producer is registered and paused.
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def refuse(self, problem: str) -> None:
        """Close because of what the client sent, and say why in the log.

        `problem` must not hold bytes of the client's.
        """
        self.log.warn("closing {peer}: {problem}", peer=self.transport.getPeer(), problem=problem)
        self.close()


class FramedEcho(Echo):
    """Each message of a framing comes back with its framing, as it was received.

    A message that breaks the rules of the framing closes the connection; what precedes it is echoed.
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
    r"""Lines end with `\n`; a `\r` before it comes back too, so that clients of either habit get their own bytes back.

    The greeting ends with `\r\n`, which both understand.
    """

    framing = framings.Lines


class EchoNetstrings(FramedEcho):
    """Messages are netstrings."""

    framing = framings.Netstrings


class EchoInt32(FramedEcho):
    """Messages come behind their length as 32 bits in network byte order."""

    framing = framings.Int32


PROTOCOLS: dict[Framing, type[Echo]] = {
    "raw": Echo,
    "line": EchoLines,
    "netstring": EchoNetstrings,
    "int32": EchoInt32,
}


class EchoFactory(Factory[Echo]):
    """Greets each client, then sends back everything it sends.

    `greeting` is sent once to each client, as one message of the framing; empty means none. `greet` says when: as soon
    as it connects, or before the answer to its first data. `framing` is how messages are told apart: `raw` has no
    messages, bytes come back as they came. In the others a message of more than `max_message` bytes (1 or more) closes
    its connection with a logged reason; its framing does not count.

    Raises ValueError when the greeting cannot be one message of the framing, or no message could be sent.
    """

    noisy = False

    def __init__(
        self,
        greeting: bytes = b"Hello from the server!",
        greet: Greet = "connect",
        framing: Framing = "raw",
        max_message: int = 64 * 1024,
    ) -> None:
        if max_message < 1:
            raise ValueError(f"the longest message is {counted(max_message, 'byte')}, and has to be 1 or more")
        if framing == "line" and b"\n" in greeting:
            raise ValueError("the greeting of the framing `line` is one line: it cannot hold a line feed")
        if framing != "raw" and len(greeting) > max_message:
            raise ValueError(f"the greeting is {counted(len(greeting), 'byte')}, above the {max_message} of a message")
        self.greeting = greeting
        self.greet = greet
        self.max_message = max_message
        self.protocol = PROTOCOLS[framing]
