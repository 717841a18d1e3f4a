"""The ClientHello parser: it finds the same ALPN as OpenSSL, raises no exception, and uses bounded memory."""

import random
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import suppress

import pytest

from rtservice.net.client_hello import (
    ILLEGAL_PARAMETER,
    MAX_CLIENT_HELLO,
    NO_APPLICATION_PROTOCOL,
    UNEXPECTED_MESSAGE,
    ALPNGate,
    ClientHello,
    ClientHelloReader,
    HandshakeRejection,
    Unread,
    parse_client_hello,
)
from rtservice.net.groups import client_hello
from tests.support.client_hellos import fragmented, message, mutated_hellos, real_hello, record, with_extension

SHORT = client_hello([29], (29, b"\x09" + bytes(31)))


@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("alpn", [None, ["echo"], ["h2", "http/1.1"], ["x" * 255, "y"]])
@pytest.mark.parametrize("name", [None, "localhost"])
def test_the_client_hello_of_the_ssl_module_is_parsed(maximum, alpn, name) -> None:
    found = parse_client_hello(real_hello(alpn=alpn, name=name, maximum=maximum))
    assert found == ClientHello(
        None if alpn is None else tuple(protocol.encode() for protocol in alpn), None if name is None else name.encode()
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl (Debian: openssl) is not installed")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3", "-no_tls1_3"])
def test_the_client_hello_of_s_client_is_parsed(version) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.getsockname()[1]}", version]
        command += ["-alpn", "echo,h2", "-servername", "a.example"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as s:
            client, _ = server.accept()
            with client:
                client.settimeout(30)
                reader = ClientHelloReader()
                found = Unread.MORE
                while found is Unread.MORE:
                    found = reader.feed(client.recv(1))
            s.communicate(timeout=30)
    assert found == ClientHello((b"echo", b"h2"), b"a.example")


def test_a_client_hello_may_be_split_at_any_byte() -> None:
    hello = real_hello(alpn=["echo", "h2"], name="localhost")
    for cut in range(len(hello)):
        reader = ClientHelloReader()
        assert reader.feed(hello[:cut]) is Unread.MORE
        assert reader.feed(hello[cut:]) == ClientHello((b"echo", b"h2"), b"localhost")
        assert reader.data == hello


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 255])
def test_a_client_hello_may_span_records_and_arrive_byte_by_byte(size) -> None:
    data = b"".join(fragmented(message(real_hello(alpn=["echo"])), [size]))
    reader = ClientHelloReader()
    for at in range(len(data) - 1):
        assert reader.feed(data[at : at + 1]) is Unread.MORE
    assert reader.feed(data[-1:]) == ClientHello((b"echo",), None)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", Unread.MORE),
        (b"\x16", Unread.MORE),
        (b"\x16\x03\x01\x40\x00", Unread.MORE),
        (b"\x16\x03\x01\x40\x01", Unread.OTHER),
        (b"\x16\x02", Unread.MORE),
        (b"\x16\x02\0\0\5", Unread.OTHER),
        (b"GET / HTTP/1.1\r\n", Unread.OTHER),
        (b"\x80\x2e\x01\x03\x03", Unread.OTHER),  # a ClientHello as in SSL 2
        (b"\x14", Unread.MISPLACED),
        (b"\x15\x03\x03\0\2\1\0", Unread.MISPLACED),
        (b"\x17", Unread.MISPLACED),
        (record(b"\2\0\0\0"), Unread.OTHER),  # a ServerHello
        (record(b"\1\xff\xff\xff"), Unread.TOO_LARGE),
        (record(b""), Unread.MORE),
        (record(b"") * 10000, Unread.TOO_LARGE),
        (record(b"") + SHORT, ClientHello(None, None)),
        (SHORT[:5] + b"\1" + SHORT[6:] + SHORT, ClientHello(None, None)),
        (b"".join(fragmented(message(SHORT), [50])[:1]) + record(b"\1", 20), Unread.MISPLACED),
        (b"".join(fragmented(message(SHORT), [50])[:1]) + b"G", Unread.MISPLACED),
        (with_extension(SHORT, 16, b"\0\3\2h2"), ClientHello((b"h2",), None)),
        (with_extension(SHORT, 16, b"\0\3\2h2\0"), Unread.OTHER),
        (with_extension(SHORT, 16, b"\0\4\2h2"), Unread.OTHER),
        (with_extension(SHORT, 16, b"\0\1\0"), Unread.OTHER),
        (with_extension(SHORT, 16, b"\0\0"), Unread.OTHER),
        (with_extension(SHORT, 16, b""), Unread.OTHER),
        (with_extension(with_extension(SHORT, 16, b"\0\3\2h2"), 16, b"\0\5\4echo"), Unread.OTHER),
        (with_extension(SHORT, 0, b"\0\6\0\0\3a.b"), ClientHello(None, b"a.b")),
        (with_extension(SHORT, 0, b"\0\6\1\0\3a.b"), ClientHello(None, None)),
        (with_extension(SHORT, 0, b""), ClientHello(None, None)),
        (record(message(SHORT)[:4] + bytes(200)), Unread.OTHER),
        (record(b"\1\0\0\x2a\3\3" + bytes(33) + b"\0\2\x13\1\1\0\0"), Unread.OTHER),
        (record(b"\1\0\0\x29\3\3" + bytes(33) + b"\0\2\x13\1\1\0"), ClientHello(None, None)),
    ],
)
def test_first_bytes_are_classified(data, found) -> None:
    assert parse_client_hello(data) == found


def test_a_classification_is_final() -> None:
    reader = ClientHelloReader()
    assert reader.feed(b"x") is Unread.OTHER
    assert reader.feed(real_hello()) is Unread.OTHER


def test_buffered_bytes_are_bounded() -> None:
    reader = ClientHelloReader()
    piece = record(b"\1\0\x40\0"[:1])
    fed = 0
    while reader.feed(piece) is Unread.MORE:
        fed += len(piece)
        assert fed <= 2 * MAX_CLIENT_HELLO
    assert reader.feed(b"") is not Unread.MORE


# --- against OpenSSL ---


@pytest.fixture(scope="module")
def seen_by_openssl(certificates):
    """Return what pyOpenSSL's OpenSSL finds in the first bytes: the ALPN protocols, the server name, and its answer.

    The ALPN protocols are None if OpenSSL does not call the ALPN callback.
    """
    SSL = pytest.importorskip("OpenSSL.SSL")  # noqa: N806  # the name of the module
    asked: list[list[bytes]] = []
    names: list[bytes | None] = []
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_file(certificates["server.pem"])
    context.use_privatekey_file(certificates["server.key"])

    def choose(connection, offered):
        asked.append(offered)
        return SSL.NO_OVERLAPPING_PROTOCOLS

    context.set_alpn_select_callback(choose)
    context.set_tlsext_servername_callback(lambda connection: names.append(connection.get_servername()))

    def see(data: bytes) -> tuple[tuple[bytes, ...] | None, bytes | None, bytes]:
        asked.clear()
        names.clear()
        connection = SSL.Connection(context, None)
        connection.set_accept_state()
        with suppress(SSL.Error):
            connection.bio_write(data)
            connection.do_handshake()
        answer = b""
        with suppress(SSL.Error):
            answer = connection.bio_read(1 << 16)
        return tuple(asked[0]) if asked else None, names[0] if names else None, answer

    return see


@pytest.mark.parametrize("seed", range(4))
def test_openssl_sees_the_same_alpn_as_the_parser(seen_by_openssl, seed) -> None:
    dice = random.Random(seed)
    counts = dict.fromkeys(("same", "none", "left", "refused"), 0)
    for data in mutated_hellos(seed, 400):
        reader = ClientHelloReader()
        at, found = 0, Unread.MORE
        while at < len(data):
            size = dice.choice((1, 5, 100, 1 << 14))
            found = reader.feed(data[at : at + size])
            at += size
        assert reader.data == data
        assert found == parse_client_hello(data)
        alpn, name, answer = seen_by_openssl(data)
        goes_on = answer[:1] == b"\x16"
        hexadecimal = data.hex()
        if isinstance(found, ClientHello):
            if alpn is not None:
                assert found.alpn == alpn, hexadecimal
            elif goes_on:
                assert found.alpn is None, hexadecimal
            if goes_on and name is not None:
                assert found.server_name == name, hexadecimal
            counts["none" if alpn is None else "same"] += 1
        elif found in (Unread.MISPLACED, Unread.TOO_LARGE):
            counts["refused"] += 1
        else:  # passed to OpenSSL, which must not find ALPN protocols
            assert alpn is None, hexadecimal
            counts["left"] += 1
    assert min(counts.values()) > 5, counts


@pytest.mark.parametrize("seed", range(4))
def test_clients_past_the_gate_have_a_common_protocol_or_offered_none(certificates, seed) -> None:
    """Against the OpenSSL of `ssl`, which may differ from pyOpenSSL's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates["server.pem"], certificates["server.key"])
    context.set_alpn_protocols(["echo"])
    counts = dict.fromkeys(("chosen", "without", "refused", "failed"), 0)
    for data in mutated_hellos(seed, 400):
        found = parse_client_hello(data)
        passed = ALPNGate((b"echo",)).feed(data)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        incoming.write(data)
        connection = context.wrap_bio(incoming, outgoing, server_side=True)
        with suppress(ssl.SSLError):
            connection.do_handshake()
        hexadecimal = data.hex()
        if outgoing.read(1) != b"\x16":
            counts["failed"] += 1
        elif isinstance(passed, HandshakeRejection):
            assert not isinstance(found, ClientHello) or connection.selected_alpn_protocol() is None, hexadecimal
            counts["refused"] += 1
        elif connection.selected_alpn_protocol() == "echo":
            assert isinstance(found, ClientHello), hexadecimal
            assert b"echo" in (found.alpn or ()), hexadecimal
            counts["chosen"] += 1
        else:
            assert found == ClientHello(None, found.server_name), hexadecimal
            counts["without"] += 1
    assert min(counts.values()) > 5, counts


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_raise_no_exception(seed) -> None:
    dice = random.Random(seed)
    for _ in range(2000):
        data = dice.choice((b"", b"\x16", b"\x16\x03\x01", SHORT[: dice.randrange(len(SHORT))]))
        assert isinstance(parse_client_hello(data + dice.randbytes(dice.randrange(200))), ClientHello | Unread)


# --- the gate ---


@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("offered", [None, ["echo"], ["h2", "echo"]])
def test_the_gate_passes_every_byte_of_clients_with_a_common_protocol_or_no_alpn(maximum, offered) -> None:
    hello = real_hello(alpn=offered, maximum=maximum) + b"and more"
    for cut in range(1, len(hello), 7):
        gate = ALPNGate((b"echo",))
        passed = gate.feed(hello[:cut])
        if passed is None:
            passed = gate.feed(hello[cut:])
            cut = len(hello)
        assert passed == hello[:cut]


@pytest.mark.parametrize(
    ("data", "alert"),
    [
        (real_hello(alpn=["h2"]), NO_APPLICATION_PROTOCOL),
        (real_hello(alpn=["ECHO", "echo2", "ech"], maximum=ssl.TLSVersion.TLSv1_2), NO_APPLICATION_PROTOCOL),
        (record(b"") + real_hello(alpn=["h2"]), NO_APPLICATION_PROTOCOL),
        (record(b"\1\0", 21) + real_hello(alpn=["h2"]), UNEXPECTED_MESSAGE),
        (record(b"\1", 20), UNEXPECTED_MESSAGE),
        (record(b"\1\0\x40\1"), ILLEGAL_PARAMETER),
    ],
)
def test_the_gate_rejects_a_client_hello_without_a_common_or_readable_protocol(data, alert) -> None:
    refusal = ALPNGate((b"echo",)).feed(data)
    assert isinstance(refusal, HandshakeRejection)
    assert refusal.alert == alert
    assert refusal.reason


def test_first_bytes_that_are_no_client_hello_are_passed_to_openssl() -> None:
    assert ALPNGate((b"echo",)).feed(b"GET / HTTP/1.1\r\n") == b"GET / HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("alert", "words"),
    [
        (NO_APPLICATION_PROTOCOL, "no application protocol"),
        (UNEXPECTED_MESSAGE, "unexpected message"),
        (ILLEGAL_PARAMETER, "illegal parameter"),
    ],
)
@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_reports_the_alert(alert, words, maximum) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = maximum
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(alert)
    with pytest.raises(ssl.SSLError) as caught:
        client.do_handshake()
    assert words in str(caught.value).lower().replace("_", " ")


def test_memory_is_bounded_while_many_threads_use_separate_gates() -> None:
    """Gates share no state."""
    hello = real_hello(alpn=["echo"])
    results: list[object] = []

    def run() -> None:
        gate = ALPNGate((b"echo",))
        results.extend(gate.feed(hello[at : at + 1]) for at in range(len(hello)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result for result in results if result is not None] == [hello] * 4
