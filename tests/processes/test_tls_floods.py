"""Hostile TLS clients of real processes: the latency for other clients, with and without workers."""

import contextlib
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.hosted import copy_hosted
from tests.support.listening import port_of
from tests.support.processes import children, cpu_seconds

pytest.importorskip("cryptography", reason="cryptography (twisted[tls]) is not installed")

from tests.support.client_hellos import mutated_hellos
from tests.support.forge import APPLICATION_DATA, CHANGE_CIPHER_SPEC, HANDSHAKE, Forger, client_hello, record

# The maximum round-trip time of other clients, in seconds. Without bounds these attacks cause 1.5 to 6 s, with them
# about 10 ms; the rest is for busy machines.
WORST = 1.0


def exchange(client: socket.socket) -> float:
    """Exchange a message; return the round-trip time, in seconds."""
    began = time.monotonic()
    client.sendall(b"ping")
    assert client.recv(100) == b"ping"
    return time.monotonic() - began


class Bystanders:
    """Clients of the plain listener, some of each worker; `worst` is their maximum round-trip time during an attack."""

    def __init__(self, port: int) -> None:
        self.clients = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(8)]
        for client in self.clients:
            assert client.recv(100) == b"Hello from the server!"
        self.worst = 0.0
        self.rounds = 0

    def exchange_during(self, attack: Callable[[], object]) -> None:
        thread = threading.Thread(target=attack)
        thread.start()
        while thread.is_alive() or self.rounds < 10:
            self.worst = max(self.worst, *map(exchange, self.clients))
            self.rounds += 1
        thread.join()


@pytest.fixture(
    params=[("1", "ssl"), ("2", "ssl"), ("1", "pyopenssl")], ids=["one process", "two workers", "Twisted's TLS"]
)
def attacked(request, service, certificates, tmp_path) -> Iterator[tuple[object, tuple[str, int], Bystanders]]:
    """A service with a TLS and a plain listener; yields it, the TLS address, and plain clients."""
    workers, library = request.param
    tls = f"ssl:0:interface=127.0.0.1:privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    tls += f":library={library}"
    copy_hosted("spout", tmp_path)
    where = ("--listen", tls, "--listen", "tcp:0:interface=127.0.0.1")
    running = service(*where, "--workers", workers, "--protocol", "spout:Spout", PYTHONPATH=str(tmp_path))
    ports = [port_of(running, kind) for kind in ("ssl", "tcp")]
    bystanders = Bystanders(ports[1])
    yield running, ("127.0.0.1", ports[0]), bystanders
    for client in bystanders.clients:
        client.close()
    running.stop()
    assert not [line for line in running.lines if "Traceback" in line]


def send_until_closed(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(data)
        read_to_end(sock)


def read_to_end(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(65536):
            pass


def flood(address, version: str, make: Callable[[Forger], bytes]) -> None:
    with Forger(address, version, timeout=30) as peer:
        send_until_closed(peer.sock, make(peer))


def key_updates(address) -> None:
    flood(address, "TLSv1_3", lambda peer: b"".join(peer.key_update() for _ in range(100_000)))


def renegotiations(address) -> None:
    hello = client_hello(version="TLSv1_2")
    flood(address, "TLSv1_2", lambda peer: b"".join(peer.seal(HANDSHAKE, hello) for _ in range(60_000)))


def hello_in_one_byte_records(address) -> None:
    """Send a ClientHello in records of one byte, with as many change_cipher_spec records as OpenSSL permits."""
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(record(HANDSHAKE, client_hello()))
        assert sock.recv(65536)[5] == 2, "the HelloRetryRequest"
        hello = client_hello(key_share=bytes(65), padding=60_000)
        send_until_closed(sock, b"".join(record(HANDSHAKE, bytes([byte])) + 31 * CHANGE_CIPHER_SPEC for byte in hello))


ATTACKS = [key_updates, renegotiations, hello_in_one_byte_records]


@pytest.mark.parametrize("attack", ATTACKS)
def test_records_without_data_do_not_delay_other_clients(attacked, attack) -> None:
    _, address, bystanders = attacked
    bystanders.exchange_during(lambda: attack(address))
    assert bystanders.worst < WORST


def test_key_updates_between_bytes_of_data_do_not_delay_other_clients(attacked) -> None:
    """A client with many expensive records is scheduled like any other busy client."""
    _, address, bystanders = attacked

    def attack() -> None:
        with Forger(address, timeout=30) as peer:
            reader = threading.Thread(target=read_to_end, args=[peer.sock])
            reader.start()
            for _ in range(200):
                pairs = (peer.key_update() + peer.seal(APPLICATION_DATA, b"x") for _ in range(100))
                peer.sock.sendall(b"".join(pairs))
            peer.sock.shutdown(socket.SHUT_WR)
            reader.join()

    bystanders.exchange_during(attack)
    assert bystanders.worst < WORST


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a process or one of its children, the larger, in bytes."""
    found = [Path(f"/proc/{process}/status").read_text() for process in (pid, *children(pid))]
    return max(int(status.split("VmHWM:")[1].split()[0]) * 1024 for status in found)


def test_key_update_requests_of_a_peer_that_never_reads_use_bounded_cpu_and_memory(attacked, wait_for) -> None:
    running, address, bystanders = attacked
    pid = running.process.pid
    with Forger(address, small_buffers=True) as peer:
        peer.sock.sendall(peer.seal(APPLICATION_DATA, b"much"))
        received = 0
        while received < 100_000:  # more than the greeting: the response is being sent
            received += len(peer.sock.recv(1 << 16))
        before = peak_memory(pid)

        def attack() -> None:
            peer.sock.settimeout(1)
            with contextlib.suppress(TimeoutError):
                while True:
                    updates = b"".join(peer.key_update(ask=True) for _ in range(200))
                    peer.sock.sendall(updates + peer.seal(APPLICATION_DATA, b"x"))

        bystanders.exchange_during(attack)
        assert bystanders.worst < WORST

        def idle() -> bool:
            """Return whether the service uses less than a tenth of a core."""
            cpu, began = cpu_seconds(pid, *children(pid)), time.monotonic()
            threading.Event().wait(0.5)
            return cpu_seconds(pid, *children(pid)) - cpu < 0.1 * (time.monotonic() - began)

        wait_for(idle)
        assert peak_memory(pid) - before < 8 << 20


@pytest.mark.parametrize("alpn", ["", ":alpn=echo,h2"], ids=["", "alpn"])
def test_mutated_client_hellos_cause_no_traceback(service, certificates, alpn) -> None:
    tls = (
        f"ssl:0:interface=127.0.0.1:privateKey={certificates['server.key']}:certKey={certificates['server.pem']}{alpn}"
    )
    running = service("--listen", tls, "--handshake-timeout", "1")
    address = "127.0.0.1", running.port
    chance = random.Random(14)
    waiting: deque[socket.socket] = deque()
    for hello in mutated_hellos(seed=14, count=2000):
        sock = socket.create_connection(address, timeout=30)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            cut = chance.randrange(len(hello) + 1)
            sock.sendall(hello[:cut])
            sock.sendall(hello[cut:])
        waiting.append(sock)
        if len(waiting) > 50:  # the oldest reads its response, or closes
            oldest = waiting.popleft()
            if chance.random() < 0.5:
                with contextlib.suppress(OSError):  # it was reset
                    oldest.shutdown(socket.SHUT_WR)
                read_to_end(oldest)
            oldest.close()
    for sock in waiting:
        sock.close()
    context = ssl.create_default_context(cafile=certificates["ca.pem"])
    with (
        socket.create_connection(address, timeout=30) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as peer,
    ):
        assert peer.recv(100) == b"Hello from the server!"
    assert running.stop() == 0
    assert not [
        record for record in running.records if "traceback" in record or record["level"] in ("error", "critical")
    ]
