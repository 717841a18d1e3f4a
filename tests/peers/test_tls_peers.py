"""Clients of a TLS listener of a real process: openssl, socat, curl, and stalled or idle peers."""

import contextlib
import os
import re
import selectors
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support.deadline import DEADLINE
from tests.support.greeting import GREETING
from tests.support.needs import needs
from tests.support.processes import cpu_seconds, descriptors


@pytest.fixture
def secure(service, certificates):
    """Start the service with one `ssl:` listener on a free loopback port."""

    def start(*arguments: str, name: str = "server", more: str = ""):
        files = f"privateKey={certificates[f'{name}.key']}:certKey={certificates[f'{name}.pem']}"
        return service(f"--listen=ssl:0:interface=127.0.0.1:{files}{more}", *arguments)

    return start


class Program:
    """A program whose standard input and output are connected to the test."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )

    def send(self, data: bytes) -> None:
        self.process.stdin.write(data)

    def receive(self, size: int) -> bytes:
        """Read this many bytes of the output, or fewer at its end."""
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while len(received) < size:
                assert selector.select(DEADLINE), f"nothing more after {received!r}"
                if not (piece := self.process.stdout.read(size - len(received))):
                    break
                received += piece
        return received

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


# --- TLS clients ---


@needs("openssl", "openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("name", ["server", "rsa"])
def test_openssl_is_greeted_and_echoed(secure, certificates, version, name) -> None:
    running = secure(name=name)
    checks = ("-CAfile", certificates["ca.pem"], "-verify_return_error", "-verify_hostname", "localhost")
    with Program("openssl", "s_client", "-quiet", version, *checks, "-connect", f"127.0.0.1:{running.port}") as peer:
        assert peer.receive(22) == GREETING
        for message in (b"hello\n", b"\0\xff", b"x" * 40_000):
            peer.send(message)
            assert peer.receive(len(message)) == message


@needs("openssl", "openssl")
def test_openssl_accepts_the_chain_and_alpn_and_sends_a_client_certificate(secure, certificates) -> None:
    more = f":extraCertChain={certificates['inner.pem']}:clientCA={certificates['ca.pem']}:alpn=echo"
    running = secure(name="leaf", more=more)
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{running.port}", "-CAfile", certificates["ca.pem"]]
    command += ["-verify_return_error", "-alpn", "other,echo", "-ign_eof"]
    with Program(*command, "-cert", certificates["client.pem"], "-key", certificates["client.key"]) as peer:
        output = peer.receive(1)
        while GREETING not in output:
            output += (more := peer.receive(1))
            assert more, output
        assert b"ALPN protocol: echo" in output
        assert b"Verify return code: 0 (ok)" in output
    with Program(*command) as stranger:
        output = stranger.receive(1 << 20)
    assert GREETING not in output
    running.wait_event(
        "connection.closed", bytes_in=0, bytes_out=0, reason="TLS failed (PEER_DID_NOT_RETURN_A_CERTIFICATE)"
    )


@needs("socat", "socat")
def test_half_close_of_socat_echoes_50_mib_in_bounded_memory(secure, certificates) -> None:
    running = secure()
    data = os.urandom(50 << 20)
    target = f"OPENSSL:localhost:{running.port},pf=ip4,cafile={certificates['ca.pem']},verify=1"
    answer = subprocess.run(
        ["socat", "-t30", "-", target], input=data, capture_output=True, timeout=60, check=True
    ).stdout
    assert answer == GREETING + data
    running.wait_event("connection.closed", bytes_in=len(data), bytes_out=len(data) + 22, reason="peer finished")
    assert running.peak_memory < 80e6


@needs("curl", "curl")
def test_curl_verifies_the_certificate_and_receives_its_request_back(secure, certificates) -> None:
    running = secure()
    url = f"https://localhost:{running.port}/echo"
    common = ("curl", "--silent", "--ipv4", "--no-buffer", "--http0.9")
    with Program(*common, "--cacert", certificates["ca.pem"], url) as peer:
        request = f"GET /echo HTTP/1.1\r\nHost: localhost:{running.port}\r\n".encode()
        assert peer.receive(22 + len(request)) == GREETING + request
    refused = subprocess.run([*common, "--cacert", certificates["other.pem"], url], timeout=DEADLINE)
    assert refused.returncode == 60  # the peer's certificate cannot be authenticated
    running.wait_event("connection.closed", reason=re.compile("^TLS failed"))


def fill_buffers(peer: ssl.SSLSocket) -> None:
    """Send without reading until every buffer is full."""
    peer.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while True:
            peer.sendall(b"x" * 65536)


def test_a_client_that_never_reads_uses_bounded_memory(secure, trusting) -> None:
    running = secure()
    before = running.peak_memory
    with trusting.wrap_socket(running.connect(), server_hostname="localhost") as peer:
        fill_buffers(peer)
        assert running.peak_memory < before + 8e6


# --- the record of a connection ---


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        (b"hello, is this plain text?\n", r"TLS failed \(WRONG_VERSION_NUMBER\)"),
        (b"GET / HTTP/1.1\r\n\r\n", r"TLS failed \(HTTP_REQUEST\)"),
        (b"", "peer finished without close_notify"),
    ],
)
def test_data_that_is_not_tls_is_logged_once_and_other_clients_are_served(secure, trusting, garbage, reason) -> None:
    running = secure()
    with trusting.wrap_socket(running.connect(), server_hostname="localhost") as good:
        with running.connect() as bad:
            bad.sendall(garbage)
            with contextlib.suppress(OSError):  # it may be reset at any of these steps
                bad.shutdown(socket.SHUT_WR)
                while bad.recv(1000):
                    pass
        running.wait_event("connection.closed", bytes_in=0, bytes_out=0, reason=re.compile(rf"^{reason}$"))
        good.sendall(b"hello")
        received = b""
        while len(received) < 27:
            received += good.recv(100)
        assert received == GREETING + b"hello"
    assert not [line for line in running.lines if "Traceback" in line]


# --- stalled and idle peers ---


def test_fifty_stalled_handshakes_time_out_while_other_clients_are_served(secure, trusting, wait_for):
    running = secure("--handshake-timeout=1.5")
    with trusting.wrap_socket(running.connect(), server_hostname="localhost") as first:
        assert first.recv(100) == GREETING
    running.wait_event("connection.closed")  # then descriptors that are opened once are open
    before = descriptors(running.process.pid)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(running.connect()) for _ in range(50)]
        for client in stalled[::2]:
            client.sendall(b"\x16\x03\x01\x02\x00\x01")  # the start of a ClientHello
        with trusting.wrap_socket(running.connect(), server_hostname="localhost") as good:
            assert good.recv(100) == GREETING
        for client in stalled:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        running.wait_event("connection.closed", 50, bytes_in=0, bytes_out=0, reason="TLS handshake timed out")
        wait_for(lambda: descriptors(running.process.pid) <= before)


def test_idle_peers_use_no_cpu_time(secure, trusting) -> None:
    """Stalled handshakes, a paused client, and a half-closed client that does not read cause no busy loop."""
    running = secure("--handshake-timeout=60")

    def connected() -> ssl.SSLSocket:
        peer = stack.enter_context(trusting.wrap_socket(running.connect(), server_hostname="localhost"))
        assert peer.recv(100) == GREETING
        return peer

    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(running.connect()).sendall(b"\x16\x03\x01\x02\x00\x01")
        connected()
        paused, finished = connected(), connected()
        for peer in (paused, finished):
            fill_buffers(peer)
        # FIN after unread data, within a record: the kernel reports an event that reading does not clear.
        finished._sslobj, _ = None, finished._sslobj
        finished.shutdown(socket.SHUT_WR)
        before = cpu_seconds(running.process.pid)
        # The measurement needs one second of real time.
        end = time.monotonic() + 1
        while (left := end - time.monotonic()) > 0:
            threading.Event().wait(left)
        assert cpu_seconds(running.process.pid) - before <= 0.05
        assert not [event for event in running.events if event["event"] == "connection.closed"]


# --- failed starts ---


@pytest.mark.parametrize(
    ("key", "certificate", "more", "names"),
    [
        ("/no/key.pem", "server.pem", "", ["'/no/key.pem'", "no such file"]),
        ("server.key", "/no/cert.pem", "", ["'/no/cert.pem'", "no such file"]),
        ("server.key", "client.pem", "", ["server.key", "client.pem", "does not belong"]),
        ("server.key", "server.key", "", ["server.key", "no usable certificate"]),
        ("server.pem", "server.pem", "", ["server.pem", "no usable private key"]),
        ("encrypted.key", "server.pem", "", ["encrypted.key", "is encrypted"]),
        ("server.key", "server.pem", ":extraCertChain=/no/chain.pem", ["'/no/chain.pem'"]),
        ("server.key", "server.pem", ":clientCA=/no/ca.pem", ["'/no/ca.pem'"]),
        ("server.key", "server.pem", ":minimum=1.0", ["minimum '1.0'", "1.2, 1.3"]),
        ("server.key", "server.pem", ":bogus=1", ["unknown keyword 'bogus'"]),
    ],
)
@pytest.mark.parametrize(
    "twistd", [["-n", "--pidfile="], ["--pidfile=d.pid", "--logfile=d.log"]], ids=["foreground", "daemon"]
)
def test_an_unusable_certificate_is_one_error_line(
    run, certificates, tmp_path, twistd, key, certificate, more, names
) -> None:
    if not Path(certificates["encrypted.key"]).exists():
        plain, encrypted = certificates["server.key"], certificates["encrypted.key"]
        certificates.openssl("pkey", "-in", plain, "-aes256", "-passout", "pass:x", "-out", encrypted)
    paths = [name if name.startswith("/") else certificates[name] for name in (key, certificate)]
    result = run(*twistd, "rtservice", f"--listen=ssl:0:privateKey={paths[0]}:certKey={paths[1]}{more}")
    assert result.returncode != 0
    assert "Traceback" not in result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("rtservice: --listen ssl:0:")
    for name in names:
        assert name in lines[0]
    assert not (tmp_path / "d.pid").exists()
