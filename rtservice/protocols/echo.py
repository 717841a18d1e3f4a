"""The default exchange: greet each client, then send back everything it sends."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from twisted.protocols.basic import Int32StringReceiver, LineOnlyReceiver, NetstringReceiver
from zope.interface import implementer

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


class EchoLines(LineOnlyReceiver, Echo):
    r"""Each line comes back as a line.

    A line ends with `\n`; a `\r` before it belongs to the terminator and comes back too, so that clients of either
    habit get their own bytes back. The greeting ends with `\r\n`, which both understand.
    """

    # Not LineReceiver: it copies the rest of its buffer for every line, which makes 64 KiB of empty lines a stall of
    # a third of a second. Nothing here needs its raw mode.
    delimiter = b"\n"

    def connectionMade(self) -> None:
        self.MAX_LENGTH = self.factory.max_message + 1  # room for the `\r`
        super().connectionMade()

    def send_greeting(self, greeting: bytes) -> None:
        self.sendLine(greeting + b"\r")

    def lineReceived(self, line: bytes) -> None:
        if len(line) == self.MAX_LENGTH and not line.endswith(b"\r"):
            self.lineLengthExceeded(line)
        else:
            self.sendLine(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        self.refuse(f"a line longer than the {self.factory.max_message} bytes of --max-message")


class EchoNetstrings(NetstringReceiver, Echo):
    """Each netstring comes back as a netstring (http://cr.yp.to/proto/netstrings.txt)."""

    def connectionMade(self) -> None:
        self.MAX_LENGTH = self.factory.max_message
        super().connectionMade()

    def send_greeting(self, greeting: bytes) -> None:
        self.sendString(greeting)

    def dataReceived(self, data: bytes) -> None:
        if self.brokenPeer:  # Twisted's receiver would parse on after an error
            return
        super().dataReceived(data)
        if self.brokenPeer:
            self.refuse(f"not a netstring of at most the {self.factory.max_message} bytes of --max-message")

    def stringReceived(self, string: bytes) -> None:
        self.sendString(string)


class EchoInt32(Int32StringReceiver, Echo):
    """Each message, behind its length as 32 bits in network byte order, comes back in the same form."""

    def connectionMade(self) -> None:
        self.MAX_LENGTH = self.factory.max_message
        super().connectionMade()

    def send_greeting(self, greeting: bytes) -> None:
        self.sendString(greeting)

    def stringReceived(self, string: bytes) -> None:
        self.sendString(string)

    def lengthLimitExceeded(self, length: int) -> None:
        self.refuse(f"a message of {length} bytes, above the {self.factory.max_message} of --max-message")


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
            raise ValueError(f"the longest message is {max_message} bytes, and has to be 1 or more")
        if framing == "line" and b"\n" in greeting:
            raise ValueError("the greeting of the framing `line` is one line: it cannot hold a line feed")
        if framing != "raw" and len(greeting) > max_message:
            raise ValueError(f"the greeting is {len(greeting)} bytes, above the {max_message} of a message")
        self.greeting = greeting
        self.greet = greet
        self.max_message = max_message
        self.protocol = PROTOCOLS[framing]
