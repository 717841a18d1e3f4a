"""PROXY headers of real proxies: HAProxy and nginx."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import is_closed
from tests.support.deadline import DEADLINE
from tests.support.front import Front
from tests.support.greeting import GREETING
from tests.support.ipv6 import needs_ipv6
from tests.support.listening import port_of

NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

# Debian installs them in /usr/sbin, which is not in the PATH of users.
HAPROXY, NGINX = (shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") for name in ("haproxy", "nginx"))

needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="haproxy (Debian: haproxy) is not installed")
needs_nginx = pytest.mark.skipif(
    NGINX is None or not NGINX_STREAM.exists(),
    reason="nginx's stream module (Debian: nginx-light, libnginx-mod-stream) is not installed",
)


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Start a proxy with a command line; terminate it after the test."""
    with contextlib.ExitStack() as stack:

        def run(front: Front, *command: str, **env: str) -> Front:
            output = stack.enter_context(open(tmp_path / "proxy.log", "w"))
            process = subprocess.Popen(
                command, pass_fds=(front.fd,), env={**os.environ, **env}, stdout=output, stderr=output
            )
            stack.callback(process.wait, DEADLINE)
            stack.callback(process.terminate)  # the nginx worker exits with its master
            # From here only the proxy has the socket open: if it exits, clients are refused at once.
            front.socket.close()
            return front

        yield run


@pytest.fixture
def haproxy(start, tmp_path):
    """Start HAProxy in front of a server in HAProxy syntax, such as `127.0.0.1:8080 send-proxy`."""

    def run(server: str, host: str = "127.0.0.1", bind: str = "") -> Front:
        front = Front(host)
        (tmp_path / "haproxy.cfg").write_text(f"""
global
    maxconn 100
    log stdout format raw local0
defaults
    mode tcp
    log global
    option log-health-checks
    timeout connect 20s
    timeout client 20s
    timeout server 20s
listen echo
    bind fd@{front.fd} {bind}
    server s {server}
""")
        return start(front, HAPROXY, "-db", "-f", str(tmp_path / "haproxy.cfg"))

    return run


@pytest.fixture
def nginx(start, tmp_path):
    """Start nginx, which sends headers of version 1, in front of a server."""

    def run(server: str, host: str = "127.0.0.1") -> Front:
        front = Front(host)
        name = f"[{host}]" if ":" in host else host
        (tmp_path / "nginx.conf").write_text(f"""
daemon off;
user root;
worker_processes 1;
pid {tmp_path}/nginx.pid;
load_module {NGINX_STREAM};
events {{ }}
stream {{
    server {{
        listen {name}:{front.address[1]};
        proxy_pass {server};
        proxy_protocol on;
        proxy_half_close on;
    }}
}}
""")
        # The variable NGINX passes inherited sockets; without a master process nginx would crash.
        command = (NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr")
        return start(front, *command, NGINX=f"{front.fd};")

    return run


@pytest.fixture
def proxies(haproxy, nginx):
    """Start one of PROXIES in front of a server."""

    def run(name: str, server: str, **settings: str) -> Front:
        if name == "nginx":
            return nginx(server.replace("unix@", "unix:"), **settings)
        return haproxy(f"{server} {name}", **settings)

    return run


PROXIES = [
    pytest.param("send-proxy", marks=needs_haproxy),
    pytest.param("send-proxy-v2", marks=needs_haproxy),
    pytest.param("send-proxy-v2 proxy-v2-options crc32c,unique-id", marks=needs_haproxy),
    pytest.param("nginx", marks=needs_nginx),
]


def port(running) -> int:
    return port_of(running, "proxy:(tcp|ssl)")


def name(sock: socket.socket) -> str:
    """Return the peer address of this client as logged."""
    host, number = sock.getsockname()[:2]
    return f"[{host}]:{number}" if ":" in host else f"{host}:{number}"


def receive(sock: socket.socket, size: int) -> bytes:
    """Receive this many bytes, or fewer at the end of the connection."""
    received = bytearray()
    while len(received) < size and (piece := sock.recv(min(size - len(received), 1 << 18))):
        received += piece
    return bytes(received)


def greet(sock: socket.socket, data: bytes) -> None:
    """Send a small message, and read its echo after the greeting."""
    sock.sendall(data)
    answer = receive(sock, len(GREETING) + len(data))
    assert answer == GREETING + data


def exchange(sock: socket.socket, data: bytes) -> None:
    """Send large data while reading its echo; not for TLS sockets, which two threads cannot use at once."""
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    answer = receive(sock, len(GREETING) + len(data))
    sender.join()
    assert answer == GREETING + data


def problems(running) -> list[str]:
    return [
        record["message"]
        for record in running.records
        if record["level"] not in ("debug", "info") or "traceback" in record
    ]


# --- the logged peer address ---


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_data_is_echoed_through_a_proxy_and_the_log_names_the_client(service, proxies, proxy, host) -> None:
    running = service("--listen=proxy:tcp:0:interface=127.0.0.1")
    front = proxies(proxy, f"127.0.0.1:{port(running)}", host=host)
    size = 4 << 20
    for source in ("127.0.0.2", "127.0.0.3") if host == "127.0.0.1" else ("::1",):
        with front.connect(source) as client:
            exchange(client, os.urandom(size))
            peer = name(client)
        record = running.wait_event("connection.closed", peer=peer, listener=re.compile("^proxy:tcp:127.0.0.1:"))
        assert (record["bytes_in"], record["bytes_out"]) == (size, size + len(GREETING))
    assert not problems(running)


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_can_connect_over_a_unix_socket(service, proxies, tmp_path, proxy) -> None:
    running = service("--listen=proxy:unix:s")
    front = proxies(proxy, f"unix@{tmp_path}/s")
    with front.connect("127.0.0.2") as client:
        exchange(client, os.urandom(1 << 20))
        peer = name(client)
    running.wait_event("connection.closed", peer=peer, listener=f"proxy:unix:{tmp_path}/s")
    assert not problems(running)


@pytest.mark.parametrize("proxy", PROXIES)
def test_half_close_through_a_proxy_echoes_everything_received(service, proxies, proxy) -> None:
    running = service("--listen=proxy:tcp:0:interface=127.0.0.1")
    front = proxies(proxy, f"127.0.0.1:{port(running)}")
    data = os.urandom(1 << 20)
    with front.connect() as client:

        def send():
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        answer = receive(client, 2 * len(data))
        sender.join()
    assert answer == GREETING + data
    running.wait_event("connection.closed", reason="peer finished")


# --- TLS ---


@pytest.mark.parametrize("proxy", PROXIES)
def test_tls_passthrough_behind_a_proxy_header_works(service, proxies, certificates, trusting, proxy) -> None:
    files = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    running = service(f"--listen=proxy:ssl:0:interface=127.0.0.1:{files}")
    front = proxies(proxy, f"127.0.0.1:{port(running)}")
    with trusting.wrap_socket(front.connect("127.0.0.2"), server_hostname="localhost") as client:
        greet(client, b"hello")
        peer = name(client)
    running.wait_event(
        "connection.closed", peer=peer, listener=re.compile("^proxy:ssl:127.0.0.1:"), bytes_in=5, bytes_out=27
    )
    assert not problems(running)


@needs_haproxy
def test_a_header_of_a_tls_terminating_proxy_is_accepted(service, haproxy, certificates, trusting) -> None:
    running = service("--listen=proxy:tcp:0:interface=127.0.0.1")
    pem = certificates.join("haproxy.pem", "server.pem", "server.key")
    options = "ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c"
    front = haproxy(f"127.0.0.1:{port(running)} send-proxy-v2-ssl-cn proxy-v2-options {options}", bind=f"ssl crt {pem}")
    with trusting.wrap_socket(front.connect("127.0.0.2"), server_hostname="localhost") as client:
        greet(client, b"hello")
        peer = name(client)
    running.wait_event(
        "connection.closed", peer=peer, listener=re.compile("^proxy:tcp:127.0.0.1:"), bytes_in=5, bytes_out=27
    )
    assert not problems(running)


# --- health checks ---


@needs_haproxy
@pytest.mark.parametrize("proxy", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c"])
def test_health_checks_with_a_header_pass_without_errors(service, haproxy, proxy) -> None:
    running = service("--listen=proxy:tcp:0:interface=127.0.0.1")
    front = haproxy(f"127.0.0.1:{port(running)} {proxy} check check-send-proxy inter 50ms fall 1")
    running.wait_event("connection.closed", 5, peer=re.compile("^127.0.0.1:"), bytes_in=0)
    with front.connect("127.0.0.2") as client:  # refused if a check had failed
        greet(client, b"hello")
    assert not problems(running)


@needs_haproxy
def test_health_checks_without_a_header_pass_and_are_not_logged(service, haproxy, wait_for, tmp_path) -> None:
    running = service("--listen=proxy:tcp:0:interface=127.0.0.1")
    # With `check port`, even for the same port, checks send no header: SYN, and RST instead of the last ACK.
    front = haproxy(f"127.0.0.1:{port(running)} send-proxy check port {port(running)} inter 50ms fall 1")
    wait_for(lambda: "Health check for server echo/s succeeded" in (tmp_path / "proxy.log").read_text())
    with front.connect("127.0.0.2") as client:
        greet(client, b"hello")
        peer = name(client)
    running.wait_event("connection.closed", peer=peer)
    assert not problems(running)
    assert not [event for event in running.events if event["event"] == "connection.closed" and event["peer"] != peer]


# --- limits ---


@pytest.mark.parametrize("proxy", PROXIES)
def test_the_limit_per_peer_counts_clients_behind_a_proxy(service, proxies, proxy) -> None:
    running = service("--listen=proxy:tcp:0:interface=127.0.0.1", "--max-connections-per-peer=2")
    front = proxies(proxy, f"127.0.0.1:{port(running)}")
    with contextlib.ExitStack() as stack:

        def connect(source: str) -> socket.socket:
            return stack.enter_context(front.connect(source))

        for source in ("127.0.0.2", "127.0.0.3", "127.0.0.3", "127.0.0.2"):
            greet(last := connect(source), b"hello")
        third = connect("127.0.0.2")
        assert is_closed(third)
        running.wait_event("connection.refused", peer=name(third), setting="max-connections-per-peer")
        greet(connect("127.0.0.4"), b"hello")
        # After one connection closes, another is accepted.
        peer = name(last)
        last.close()
        running.wait_event("connection.closed", peer=peer)
        greet(connect("127.0.0.2"), b"hello")


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_outside_proxy_from_is_refused(service, proxies, proxy) -> None:
    running = service("--listen=proxy:tcp:0:interface=127.0.0.1", "--proxy-from=192.0.2.0/24,127.0.0.2")
    front = proxies(proxy, f"127.0.0.1:{port(running)}")
    with front.connect() as client:
        assert is_closed(client)
    running.wait_event("connection.refused", peer=re.compile("^127.0.0.1:"), setting="proxy-from")
    # A PROXY header from a trusted address.
    with socket.create_connection(("127.0.0.1", port(running)), DEADLINE, source_address=("127.0.0.2", 0)) as client:
        client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
        greet(client, b"hello")
    running.wait_event("connection.closed", peer="192.0.2.1:1")


@needs_haproxy
def test_haproxy_prefix_is_an_alias_of_proxy(service, haproxy) -> None:
    running = service("--listen=haproxy:tcp:0:interface=127.0.0.1")
    front = haproxy(f"127.0.0.1:{port(running)} send-proxy-v2")
    with front.connect("127.0.0.2") as client:
        greet(client, b"hello")
        peer = name(client)
    running.wait_event("connection.closed", peer=peer, listener=re.compile("^proxy:tcp:127.0.0.1:"))
