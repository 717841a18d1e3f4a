"""The echo protocol: exact bytes for each framing, without a reactor."""

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from rtservice.protocols.echo import PROTOCOLS, Echo, EchoFactory
from tests.support.greeting import GREETING

# The encoding of a message, or of the greeting, in each framing.
FRAMED = {
    "raw": lambda message: message,
    "line": lambda message: message + b"\r\n",
    "netstring": lambda message: b"%d:%s," % (len(message), message),
    "int32": lambda message: len(message).to_bytes(4, "big") + message,
}


class Client:
    """A connection to the server, as its client uses it."""

    def __init__(self, **settings) -> None:
        self.protocol: Echo = EchoFactory(**settings).buildProtocol(None)
        self.transport = StringTransport()
        self.protocol.makeConnection(self.transport)

    def received(self) -> bytes:
        value = self.transport.value()
        self.transport.clear()
        return value


def test_every_framing_is_covered() -> None:
    assert FRAMED.keys() == PROTOCOLS.keys()


@pytest.mark.parametrize("framing", FRAMED)
def test_a_client_is_greeted_once_and_then_echoed(framing) -> None:
    client = Client(framing=framing)
    assert client.received() == FRAMED[framing](GREETING)
    for message in (b"one", b"", b"two\0\xff"):
        if framed := FRAMED[framing](message):
            client.protocol.dataReceived(framed)
        assert client.received() == framed


@pytest.mark.parametrize("framing", FRAMED)
def test_messages_split_at_any_byte_are_echoed_unchanged(framing) -> None:
    data = b"".join(FRAMED[framing](message) for message in (b"first", b"second\n"[:-1], b"third"))
    client = Client(framing=framing, greeting=b"")
    for at in range(len(data)):
        client.protocol.dataReceived(data[at : at + 1])
    assert client.received() == data


@pytest.mark.parametrize("framing", FRAMED)
def test_greeting_on_first_data_is_sent_with_the_first_data(framing) -> None:
    client = Client(framing=framing, greet="first-data")
    assert client.received() == b""
    client.protocol.dataReceived(FRAMED[framing](b"hi"))
    client.protocol.dataReceived(FRAMED[framing](b"ho"))
    assert client.received() == b"".join(map(FRAMED[framing], (GREETING, b"hi", b"ho")))


@pytest.mark.parametrize("framing", FRAMED)
@pytest.mark.parametrize("greet", ["connect", "first-data"])
def test_an_empty_greeting_sends_nothing(framing, greet) -> None:
    client = Client(framing=framing, greet=greet, greeting=b"")
    assert client.received() == b""
    client.protocol.dataReceived(FRAMED[framing](b"hi"))
    assert client.received() == FRAMED[framing](b"hi")


def test_lines_keep_their_terminator() -> None:
    client = Client(framing="line", greeting=b"")
    client.protocol.dataReceived(b"unix\ndos\r\n\n\r\n")
    assert client.received() == b"unix\ndos\r\n\n\r\n"


@pytest.mark.parametrize("framing", ["line", "netstring", "int32"])
def test_a_message_longer_than_the_limit_closes_the_connection(framing) -> None:
    client = Client(framing=framing, greeting=b"", max_message=100)
    longest = FRAMED[framing](b"x" * 100)
    client.protocol.dataReceived(longest)
    assert client.received() == longest
    assert not client.transport.disconnecting
    client.protocol.dataReceived(FRAMED[framing](b"x" * 101))
    assert client.received() == b""
    assert client.transport.disconnecting


def test_an_unterminated_line_closes_the_connection_at_the_limit() -> None:
    client = Client(framing="line", greeting=b"", max_message=100)
    client.protocol.dataReceived(b"x" * 101)
    assert not client.transport.disconnecting  # one more byte is allowed for a carriage return
    client.protocol.dataReceived(b"x")
    assert client.transport.disconnecting


def test_a_line_one_byte_over_the_limit_closes_the_connection() -> None:
    client = Client(framing="line", greeting=b"", max_message=100)
    client.protocol.dataReceived(b"x" * 101 + b"\n")
    assert client.transport.disconnecting
    assert client.received() == b""


def test_an_invalid_netstring_closes_the_connection_and_later_data_is_ignored() -> None:
    client = Client(framing="netstring", greeting=b"")
    client.protocol.dataReceived(b"nonsense")
    assert client.transport.disconnecting
    client.protocol.dataReceived(b"2:hi,")
    assert client.received() == b""


@pytest.mark.parametrize("framing", FRAMED)
def test_the_transport_is_its_producer_until_the_client_half_closes(framing) -> None:
    client = Client(framing=framing)
    assert client.transport.producer is client.transport
    assert client.transport.streaming
    assert IHalfCloseableProtocol.providedBy(client.protocol)
    client.protocol.readConnectionLost()
    assert client.transport.producer is None
    assert client.transport.disconnecting
    client.protocol.connectionLost(Failure(ConnectionDone()))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"framing": "line", "greeting": b"two\nlines"}, "line feed"),
        ({"framing": "int32", "greeting": b"12345", "max_message": 4}, "5 bytes; the maximum is 4"),
    ],
)
def test_a_greeting_that_is_invalid_for_the_framing_is_rejected(settings, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        EchoFactory(**settings)
