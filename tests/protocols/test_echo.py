"""The exchange, byte for byte, without a reactor."""

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from rtservice.protocols.echo import PROTOCOLS, Echo, EchoFactory
from tests.support.greeting import GREETING

# How each framing writes a message, and the greeting.
FRAMED = {
    "raw": lambda message: message,
    "line": lambda message: message + b"\r\n",
    "netstring": lambda message: b"%d:%s," % (len(message), message),
    "int32": lambda message: len(message).to_bytes(4, "big") + message,
}


class Client:
    """One connection: what the server would see and send."""

    def __init__(self, **settings) -> None:
        self.protocol: Echo = EchoFactory(**settings).buildProtocol(None)
        self.transport = StringTransport()
        self.protocol.makeConnection(self.transport)

    def receives(self) -> bytes:
        value = self.transport.value()
        self.transport.clear()
        return value


def test_every_framing_is_covered() -> None:
    assert FRAMED.keys() == PROTOCOLS.keys()


@pytest.mark.parametrize("framing", FRAMED)
def test_a_client_is_greeted_once_and_then_echoed(framing) -> None:
    client = Client(framing=framing)
    assert client.receives() == FRAMED[framing](GREETING)
    for message in (b"one", b"", b"two\0\xff"):
        if framed := FRAMED[framing](message):
            client.protocol.dataReceived(framed)
        assert client.receives() == framed


@pytest.mark.parametrize("framing", FRAMED)
def test_messages_split_at_any_byte_come_back_whole(framing) -> None:
    data = b"".join(FRAMED[framing](message) for message in (b"first", b"second\n"[:-1], b"third"))
    client = Client(framing=framing, greeting=b"")
    for at in range(len(data)):
        client.protocol.dataReceived(data[at : at + 1])
    assert client.receives() == data


@pytest.mark.parametrize("framing", FRAMED)
def test_greeting_on_first_data_waits_for_it(framing) -> None:
    client = Client(framing=framing, greet="first-data")
    assert client.receives() == b""
    client.protocol.dataReceived(FRAMED[framing](b"hi"))
    client.protocol.dataReceived(FRAMED[framing](b"ho"))
    assert client.receives() == b"".join(map(FRAMED[framing], (GREETING, b"hi", b"ho")))


@pytest.mark.parametrize("framing", FRAMED)
@pytest.mark.parametrize("greet", ["connect", "first-data"])
def test_an_empty_greeting_sends_nothing(framing, greet) -> None:
    client = Client(framing=framing, greet=greet, greeting=b"")
    assert client.receives() == b""
    client.protocol.dataReceived(FRAMED[framing](b"hi"))
    assert client.receives() == FRAMED[framing](b"hi")


def test_lines_keep_the_terminator_that_the_client_uses() -> None:
    client = Client(framing="line", greeting=b"")
    client.protocol.dataReceived(b"unix\ndos\r\n\n\r\n")
    assert client.receives() == b"unix\ndos\r\n\n\r\n"


@pytest.mark.parametrize("framing", ["line", "netstring", "int32"])
def test_a_message_of_the_limit_passes_and_one_more_byte_closes(framing) -> None:
    client = Client(framing=framing, greeting=b"", max_message=100)
    longest = FRAMED[framing](b"x" * 100)
    client.protocol.dataReceived(longest)
    assert client.receives() == longest
    assert not client.transport.disconnecting
    client.protocol.dataReceived(FRAMED[framing](b"x" * 101))
    assert client.receives() == b""
    assert client.transport.disconnecting


def test_a_line_that_never_ends_closes_at_the_limit() -> None:
    client = Client(framing="line", greeting=b"", max_message=100)
    client.protocol.dataReceived(b"x" * 101)
    assert not client.transport.disconnecting  # the last byte may yet prove to be a carriage return's place
    client.protocol.dataReceived(b"x")
    assert client.transport.disconnecting


def test_a_line_of_one_byte_too_many_without_carriage_return_closes() -> None:
    client = Client(framing="line", greeting=b"", max_message=100)
    client.protocol.dataReceived(b"x" * 101 + b"\n")
    assert client.transport.disconnecting
    assert client.receives() == b""


def test_what_is_no_netstring_closes_and_what_follows_is_ignored() -> None:
    client = Client(framing="netstring", greeting=b"")
    client.protocol.dataReceived(b"nonsense")
    assert client.transport.disconnecting
    client.protocol.dataReceived(b"2:hi,")
    assert client.receives() == b""


@pytest.mark.parametrize("framing", FRAMED)
def test_the_transport_is_its_own_producer_until_the_client_has_finished(framing) -> None:
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
def test_a_greeting_that_is_no_message_of_the_framing_is_refused(settings, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        EchoFactory(**settings)
