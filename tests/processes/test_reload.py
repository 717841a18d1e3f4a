"""SIGHUP reloads certificates and settings of a running service; invalid ones change nothing."""

import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.deadline import DEADLINE
from tests.support.greeting import GREETING
from tests.support.hosted import copy_plugin
from tests.support.listening import port_of
from tests.support.odd_certificates import dns, odd_certificate
from tests.support.recorded import recorded
from tests.support.tls_libraries import needs_pyopenssl

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl (Debian: openssl) is not installed")


@pytest.fixture(scope="module")
def renewed(certificates):
    """The certificates, with two more for localhost and one for each of three other names."""
    for name in ("first", "second"):
        certificates.make(name, "server", "ca")
    for name in ("a", "b", "c"):
        certificates.make(name, "server", "ca", alternative=f"DNS:{name}.example")
    return certificates


@pytest.fixture
def put(renewed, tmp_path):
    """Install a certificate and its key as an ACME client does: each file is replaced atomically."""

    def copy(name: str, file: str = "served", suffixes: tuple[str, ...] = ("key", "pem")) -> None:
        for suffix in suffixes:
            shutil.copy(renewed[f"{name}.{suffix}"], tmp_path / "new")
            (tmp_path / "new").replace(tmp_path / f"{file}.{suffix}")

    return copy


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TLS = "--listen=ssl:0:interface=127.0.0.1:privateKey=served.key:certKey=served.pem"


def served_certificate(port: int, name: str = "localhost") -> bytes:
    """Return the certificate that the server sends to openssl, as DER."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", name]
    output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE).stdout
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(begin + output.split(begin)[1].split(end)[0] + end)


@pytest.fixture
def der(renewed):
    def read(name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert(Path(renewed[f"{name}.pem"]).read_text())

    return read


@pytest.fixture
def tls_client(renewed):
    """Connect with TLS and read the greeting."""

    def connect(port: int) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=renewed["ca.pem"])
        plain = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        client = context.wrap_socket(plain, server_hostname="localhost")
        assert client.recv(100) == GREETING
        return client

    return connect


def echoes(client: socket.socket, data: bytes = b"still here") -> bool:
    client.sendall(data)
    received = b""
    while len(received) < len(data) and (piece := client.recv(100)):
        received += piece
    return received == data


def reload(running) -> str:
    """Reload; return the settings that changed, or the problem if the reload failed."""
    done = running.reload()
    if done["event"] == "reload.failed":
        assert done["level"] == "error"
        return done["problem"]
    return recorded(running.events, "settings.reloaded")[-1]["settings"]


def lines(running, word: str) -> list[str]:
    return [line for line in running.lines if word in line]


def errors(running) -> list[dict]:
    return [record for record in running.records if record["level"] in ("error", "critical")]


# --- certificates ---


@pytest.mark.parametrize("library", ["ssl", pytest.param("pyopenssl", marks=needs_pyopenssl)])
def test_sighup_loads_a_renewed_certificate_and_keeps_open_connections(service, put, der, tls_client, library) -> None:
    put("first")
    running = service(f"{TLS}:library={library}")
    assert served_certificate(running.port) == der("first")
    with tls_client(running.port) as old:
        put("second")
        assert served_certificate(running.port) == der("first")
        assert reload(running) == "none"
        assert served_certificate(running.port) == der("second")
        assert old.getpeercert(binary_form=True) == der("first")
        assert echoes(old)
        with tls_client(running.port) as new:
            assert echoes(new)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda put, here: put("second", suffixes=("key",)), "does not belong to the certificate"),
        (lambda put, here: (here / "served.pem").write_text("garbage"), "no usable certificate in PEM form"),
        (lambda put, here: (here / "served.key").write_bytes(b"\0\xff" * 99), "no usable private key in PEM form"),
        (lambda put, here: (here / "served.pem").write_text(""), "no usable certificate in PEM form"),
        (lambda put, here: (here / "served.key").unlink(), "cannot read the private key"),
        (lambda put, here: replace_by_pipe(here / "served.key"), "not a regular file"),
    ],
    ids=["mismatch", "garbage", "binary", "empty", "missing", "pipe"],
)
def test_reload_with_an_invalid_certificate_logs_one_line_and_keeps_the_current_one(
    service, put, der, tls_client, tmp_path, spoil, problem
) -> None:
    put("first")
    running = service(TLS)
    with tls_client(running.port) as old:
        spoil(put, tmp_path)
        line = reload(running)
        assert problem in line
        assert str(tmp_path / "served.") in line
        assert served_certificate(running.port) == der("first")
        assert echoes(old)
        put("second")
        reload(running)
        assert served_certificate(running.port) == der("second")
    assert running.stop() == 0
    assert len(errors(running)) == 1
    assert not lines(running, "Traceback")


def test_watch_certificates_loads_a_replaced_certificate_without_a_signal(
    service, put, der, wait_for, tmp_path
) -> None:
    put("first")
    running = service(TLS, "--watch-certificates")
    (tmp_path / "served.key").write_text("half of a ke")
    assert "no usable private key" in running.wait_event("certificates.rejected")["problem"]
    assert served_certificate(running.port) == der("first")
    put("second")
    running.wait_event("certificate.loaded", 2)
    assert served_certificate(running.port) == der("second")
    # A problem is logged once per change, not once per check.
    assert len(recorded(running.events, "certificates.rejected")) <= 2


@pytest.mark.parametrize("how", ["SIGHUP", "watched"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_certificate_of_the_status_server_is_reloaded(service, put, der, wait_for, workers, how) -> None:
    put("first")
    more = ["--watch-certificates"] if how == "watched" else []
    running = service(
        "--listen=tcp:0:interface=127.0.0.1", TLS.replace("--listen", "--status"), f"--workers={workers}", *more
    )
    port = int(running.wait_event("status.listening")["listener"].rpartition(":")[2])
    assert served_certificate(port) == der("first")
    put("second")
    if how == "SIGHUP":
        reload(running)
        assert served_certificate(port) == der("second")
    else:
        wait_for(lambda: served_certificate(port) == der("second"))
    assert running.stop() == 0


def write_crl(certificates, path: Path, *names: str, period: tuple[str, ...] = ("-crldays", "30")) -> None:
    """Install a revocation list of `ca` that contains these certificates."""
    config, index = certificates["revoke.cnf"], certificates["revoke.index"]
    Path(index).write_text("")
    Path(config).write_text(f"[ca]\ndefault_ca=own\n[own]\ndatabase={index}\ndefault_md=sha256\n")
    common = ("ca", "-config", config, "-keyfile", certificates["ca.key"], "-cert", certificates["ca.pem"])
    for name in names:
        certificates.openssl(*common, "-revoke", certificates[f"{name}.pem"])
    certificates.openssl(*common, "-gencrl", *period, "-out", str(path.with_suffix(".new")))
    path.with_suffix(".new").replace(path)


def is_accepted(port: int, certificates, name: str) -> bool:
    """Return whether a client with this certificate is greeted."""
    context = ssl.create_default_context(cafile=certificates["ca.pem"])
    context.load_cert_chain(certificates[f"{name}.pem"], certificates[f"{name}.key"])
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as client:
                return client.recv(100) == GREETING
        except (ssl.SSLError, ConnectionResetError):
            return False


@pytest.mark.parametrize("library", ["ssl", pytest.param("pyopenssl", marks=needs_pyopenssl)])
@pytest.mark.parametrize("how", ["SIGHUP", "watched"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_revoked_client_certificate_is_refused_after_a_reload(
    service, put, renewed, wait_for, tmp_path, workers, how, library
) -> None:
    renewed.make("gone", "client", "ca")
    put("first")
    path = tmp_path / "clients.crl"
    write_crl(renewed, path)
    more = ["--watch-certificates"] if how == "watched" else []
    policy = f"clientCA={renewed['ca.pem']}:clientCRL={path}:library={library}"
    running = service(f"{TLS}:{policy}", f"--workers={workers}", *more)
    running.wait_event("revocation.loaded", path=re.compile("/clients.crl$"), left="29 days")
    assert [is_accepted(running.port, renewed, name) for name in ("client", "gone", "stranger")] == [True, True, False]
    write_crl(renewed, path, "gone")
    if how == "SIGHUP":
        reload(running)
    wait_for(lambda: not is_accepted(running.port, renewed, "gone"))
    assert is_accepted(running.port, renewed, "client")
    assert running.stop() == 0


def test_an_expired_revocation_list_logs_a_warning_and_refuses_all_clients(service, put, renewed, tmp_path) -> None:
    put("first")
    path = tmp_path / "clients.crl"
    write_crl(renewed, path, period=("-crl_lastupdate", "20200101000000Z", "-crl_nextupdate", "20200201000000Z"))
    running = service(f"{TLS}:clientCA={renewed['ca.pem']}:clientCRL={path}")
    assert running.wait_event("revocation.expired", path=re.compile("/clients.crl$"))["level"] == "warn"
    assert not is_accepted(running.port, renewed, "client")
    write_crl(renewed, path)
    reload(running)
    assert is_accepted(running.port, renewed, "client")
    path.write_text("junk")
    assert "no usable revocation list in PEM form" in reload(running)
    assert is_accepted(running.port, renewed, "client")
    assert running.stop() == 0


def hello(name: bytes) -> bytes:
    """Return a ClientHello of TLS 1.2 with a server name (RFC 5246, section 7.4.1.2; RFC 6066, section 3)."""
    entry = struct.pack("!HBH", len(name) + 3, 0, len(name)) + name
    extensions = struct.pack("!HH", 0, len(entry)) + entry
    ciphers = b"\xc0\x2f\xc0\x2b"
    body = b"\x03\x03" + bytes(32) + b"\0" + struct.pack("!H", len(ciphers)) + ciphers + b"\x01\0"
    body += struct.pack("!H", len(extensions)) + extensions
    message = b"\x01" + struct.pack("!I", len(body))[1:] + body
    return b"\x16\x03\x01" + struct.pack("!H", len(message)) + message


@pytest.mark.parametrize("library", ["ssl", pytest.param("pyopenssl", marks=needs_pyopenssl)])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_invalid_sni_name_causes_no_traceback(service, put, tmp_path, workers, library) -> None:
    (tmp_path / "names").mkdir()
    put("a", "names/a")
    running = service(
        f"--listen=ssl:0:interface=127.0.0.1:certificates=names:library={library}", f"--workers={workers}"
    )
    for name in (b"b\xfccher.example", b"\xff" * 255, b"a\x1b[2J.example"):
        with socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE) as client:
            client.sendall(hello(name))
            assert client.recv(1)  # an alert, or a ServerHello
    running.wait_event("connection.closed", 3)
    assert running.stop() == 0
    assert not [line for line in running.lines if "Traceback" in line or "Exception" in line or "\x1b" in line]


def test_reload_adds_and_removes_names_of_a_certificate_directory(service, put, der, tmp_path) -> None:
    (tmp_path / "names").mkdir()
    put("a", "names/a")
    put("b", "names/b")
    running = service("--listen=ssl:0:interface=127.0.0.1:certificates=names")
    assert [served_certificate(running.port, f"{name}.example") for name in "abc"] == [der("a"), der("b"), der("a")]
    put("c", "names/c")
    for suffix in ("pem", "key"):
        (tmp_path / f"names/b.{suffix}").unlink()
    reload(running)
    assert [served_certificate(running.port, f"{name}.example") for name in "abc"] == [der("a"), der("a"), der("c")]
    (tmp_path / "names/c.key").unlink()
    assert "no private key for" in reload(running)
    assert served_certificate(running.port, "c.example") == der("c")


def test_days_until_expiry_are_logged_at_start_and_reload(service, put, renewed) -> None:
    renewed.make("short", "server", "ca", days=7)
    put("first")
    running = service(TLS)
    running.wait_event("certificate.loaded", path=re.compile("/served.pem$"), names="localhost", days_left=89)
    put("short")
    reload(running)
    running.wait_event("certificate.loaded", path=re.compile("/served.pem$"), names="localhost", days_left=6)
    renewed.make("many", "server", "ca", alternative=",".join(f"DNS:n{number}.example" for number in range(500)))
    put("many")
    reload(running)
    running.wait_event(
        "certificate.loaded", names=re.compile(r"^n0\.example,( n[1-4]\.example,?){4} and 495 more$"), days_left=89
    )


@pytest.fixture
def fill(renewed, tmp_path):
    """Write certificates for NAMEn.example, all with one key, into a directory; `serial` makes them differ."""
    (tmp_path / "names").mkdir()
    key = Path(renewed["first.key"]).read_text()

    def write(name: str, numbers: range, serial: int = 1) -> None:
        for number in numbers:
            names = dns(b"%s%d.example" % (name.encode(), number), b"m\xfcller%d.example" % number)
            pem = odd_certificate(renewed["first.pem"], alternative=names, serial=bytes((serial,)))
            (tmp_path / "new").write_text(pem + key)
            (tmp_path / "new").replace(tmp_path / f"names/{name}{number}.pem")

    return write


def der_of(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text().partition("-----BEGIN PRIVATE")[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_many_certificates_with_odd_names_are_reloaded_while_clients_are_served(
    service, fill, wait_for, tmp_path, workers
) -> None:
    fill("a", range(3))
    listen = ("--listen=ssl:0:interface=127.0.0.1:certificates=names", "--listen=unix:s")
    running = service(*listen, f"--workers={workers}")
    port = port_of(running, "ssl")
    running.wait_event(
        "certificate.loaded", path=re.compile("/a2.pem$"), names="a2.example, müller2.example", days_left=89
    )
    assert served_certificate(port, "a1.example") == der_of(tmp_path / "names/a1.pem")
    # A second reload is requested during the first one, and finds the later change.
    fill("b", range(120))
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(str(tmp_path / "s"))
        assert client.recv(100) == GREETING
        running.process.send_signal(signal.SIGHUP)
        running.wait_event("reload.started")
        for number in range(20):
            assert echoes(client, b"%d" % number)
        fill("a", range(1, 2), serial=2)
        running.process.send_signal(signal.SIGHUP)
        running.wait_event("reload.started", 2)
        running.wait_event("reload.done", 2 if workers == 1 else 1)  # with workers, both may be reported once
        for name in ("a1", "b119"):
            wait_for(
                lambda name=name: served_certificate(port, f"{name}.example") == der_of(tmp_path / f"names/{name}.pem")
            )
        assert echoes(client)
    # An unreadable file changes nothing, although valid files precede it.
    fill("a", range(1, 2), serial=3)
    (tmp_path / "names/z.pem").write_text("junk")
    running.process.send_signal(signal.SIGHUP)
    assert "/names/z.pem'" in running.wait_event("reload.failed")["problem"]
    assert served_certificate(port, "b1.example") == der_of(tmp_path / "names/b1.pem")
    assert served_certificate(port, "a1.example") != der_of(tmp_path / "names/a1.pem")
    # A stop does not wait for a reload.
    (tmp_path / "names/z.pem").unlink()
    fill("b", range(120), serial=2)
    running.process.send_signal(signal.SIGHUP)
    running.wait_event("reload.started", 4)
    assert running.stop() == 0
    assert not [line for line in running.lines if "Traceback" in line or "nhandled" in line]
    assert len(errors(running)) == 1


# The program `faketime` would be a process between the test and the service.
FAKETIME = [str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]


@pytest.mark.skipif(not FAKETIME, reason="libfaketime (Debian: libfaketime) is not installed")
@pytest.mark.parametrize(("clock", "state"), [("+100d", "certificate.expired"), ("-9d", "certificate.not_yet_valid")])
def test_a_certificate_outside_its_validity_period_is_served_with_a_warning(service, put, der, clock, state) -> None:
    put("first")
    running = service(TLS, LD_PRELOAD=FAKETIME[0], FAKETIME=clock)
    assert running.wait_event(state, path=re.compile("/served.pem$"), names="localhost")["level"] == "warn"
    assert served_certificate(running.port) == der("first")
    reload(running)
    running.wait_event(state, 2, path=re.compile("/served.pem$"))


# --- settings ---


@pytest.fixture
def configured(service, tmp_path):
    """Start the service with a settings file; return it and a function that replaces the file and reloads."""

    def start(before: str, *arguments: str, **more):
        file = tmp_path / "rt.toml"
        file.write_text(before)
        running = service("--config=rt.toml", *(arguments or ("--listen=tcp:0:interface=127.0.0.1",)), **more)

        def change(content: str) -> str:
            file.write_text(content)
            return reload(running)

        return running, change

    return start


def connected(running) -> socket.socket:
    client = running.connect()
    assert client.recv(100) == GREETING
    return client


def test_reload_changes_max_connections_and_at_limit(configured) -> None:
    running, change = configured("max-connections = 1\nat-limit = 'reject'")
    with connected(running) as first:
        with running.connect() as second:
            assert second.recv(100) == b""
        assert change("max-connections = 2\nat-limit = 'reject'") == "max-connections"
        with connected(running) as second:
            assert echoes(second)
            assert change("max-connections = 2") == "at-limit"
            with running.connect() as third:
                third.setblocking(False)
                with pytest.raises(BlockingIOError):
                    third.recv(100)
                third.settimeout(DEADLINE)
                change("max-connections = 3")
                assert third.recv(100) == GREETING
                assert all(map(echoes, (first, second, third)))


def test_a_limit_below_the_open_connections_closes_none_of_them(configured) -> None:
    running, change = configured("")
    with connected(running) as first, connected(running) as second:
        change("max-connections = 1\nat-limit = 'reject'")
        assert echoes(first)
        assert echoes(second)
        with running.connect() as third:
            assert third.recv(100) == b""


def test_a_new_limit_per_peer_counts_open_connections(configured) -> None:
    running, change = configured("")
    with connected(running) as first:
        assert change("max-connections-per-peer = 1") == "max-connections-per-peer"
        with running.connect() as second:
            assert second.recv(100) == b""
        assert change("max-connections-per-peer = 2\npeer-prefix-v6 = 56") == "max-connections-per-peer, peer-prefix-v6"
        with connected(running) as second:
            assert echoes(first)
            assert echoes(second)


def test_reload_changes_the_idle_timeout_of_open_connections(configured) -> None:
    running, change = configured("idle-timeout = 0")
    with connected(running) as client:
        assert echoes(client)
        change("idle-timeout = 0.2")
        assert client.recv(100) == b""
    running.wait_event("connection.closed", reason="idle")


def test_reload_changes_the_handshake_timeout_of_new_connections(configured, put) -> None:
    put("first")
    running, change = configured("", TLS)
    change("handshake-timeout = 0.2")
    with running.connect() as silent, contextlib.suppress(ConnectionResetError):
        assert silent.recv(100) == b""
    running.wait_event("connection.closed", bytes_in=0, bytes_out=0, reason=re.compile("handshake"))


def test_reload_changes_proxy_from(configured) -> None:
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    running, change = configured("proxy-from = '192.0.2.9'", "--listen=proxy:tcp:0:interface=127.0.0.1")
    port = int(running.wait_event("listener.listening")["listener"].rpartition(":")[2])

    def answer() -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
            try:
                client.sendall(header)
                return client.recv(100)
            except (ConnectionResetError, BrokenPipeError):
                return b""

    assert answer() == b""
    assert change("proxy-from = '127.0.0.1'") == "proxy-from"
    assert answer() == GREETING


def test_reload_changes_the_log_level(configured, tmp_path, read_all) -> None:
    running, change = configured("")

    def visit() -> str:
        with running.connect() as client:
            peer = "{}:{}".format(*client.getsockname())
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == GREETING
        return peer

    running.wait_event("connection.closed", peer=visit())
    # The reload itself is logged with level info, which is hidden then; the greeting causes a warning.
    (tmp_path / "rt.toml").write_text("log-level = 'warn'\ngreeting = 'x'")
    running.process.send_signal(signal.SIGHUP)
    running.wait_event("settings.need_restart")
    unseen = visit()
    assert change("log-level = 'info'") == "log-level"
    running.wait_event("connection.closed", peer=visit())
    assert not lines(running, unseen)


def test_reload_changes_the_drain_timeout(configured) -> None:
    running, change = configured("drain-timeout = 600")
    change("drain-timeout = 0.2")
    with connected(running) as client:
        running.process.send_signal(signal.SIGTERM)
        assert client.recv(100) == b""
    assert running.process.wait(DEADLINE) == 0
    running.wait_event("drain.started", count=1, seconds=0.2)


def test_reload_can_enable_watch_certificates(configured, put, der) -> None:
    put("first")
    running, change = configured("", TLS)
    assert change("watch-certificates = true") == "watch-certificates"
    put("second")
    running.wait_event("certificates.changed")
    running.wait_event("certificate.loaded", 3)
    assert served_certificate(running.port) == der("second")


def test_settings_that_need_a_restart_are_reported_at_each_reload_and_not_applied(configured) -> None:
    # Port 1 could not be bound, and is not tried.
    running, change = configured("listen = 'tcp:0:interface=127.0.0.1'", "--backlog=7")
    for count in (1, 2):
        change("port = 1\ngreeting = 'x'\nframing = 'line'\nmax-message = 1\ngreet = 'first-data'\nbacklog = 9\n")
        restart = running.wait_event("settings.need_restart", count)
        assert restart["level"] == "warn"
        assert restart["settings"] == "port, listen, greeting, greet, framing, max-message"
    with connected(running) as client:
        assert echoes(client)
    change("listen = 'tcp:0:interface=127.0.0.1'")
    assert len(recorded(running.events, "settings.need_restart")) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "max-connections = 1\nat-limit = 'reject'\nmax-connections-per-peer = -1",
            "max-connections-per-peer: '-1' is",
        ),
        ("max-connections = 1\nat-limit = 'reject'\nprot = 1", "prot: no such setting; did you mean port?"),
        ("max-connections = 1\nat-limit = 'reject'\nport =", "is not TOML"),
        ("max-connections = 1\nat-limit = 'reject'\nframing = 'line'\ngreeting = 'a\\nb'", "greeting: "),
        ("max-connections = 1\nat-limit = 'reject'\nport = 1\nlisten = '1'", "port: cannot be combined with listen"),
        ("max-connections = 1\nat-limit = 'reject'\n\udcff", "is not UTF-8"),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["value", "key", "syntax", "together", "both", "encoding", "missing"],
)
def test_reload_with_an_invalid_file_changes_nothing(configured, put, der, tmp_path, content, problem) -> None:
    put("first")
    running, _ = configured("", TLS)
    put("second")
    file = tmp_path / "rt.toml"
    file.unlink() if content is None else file.write_text(content, errors="surrogateescape")
    line = reload(running)
    assert line.startswith(f"{file}: ")
    assert problem in line
    with running.connect(), running.connect():
        assert served_certificate(running.port) == der("first")
    assert not recorded(running.events, "connection.refused")
    assert running.stop() == 0
    assert not lines(running, "Traceback")


def test_reload_with_an_invalid_certificate_keeps_the_current_settings(configured, put, tmp_path) -> None:
    put("first")
    running, change = configured("", TLS, "--listen=unix:s")
    running.wait_event("listener.listening", listener=re.compile("^unix:"))
    (tmp_path / "served.pem").write_text("garbage")
    assert "no usable certificate" in change("idle-timeout = 0.1\ngreeting = 'x'")
    assert not recorded(running.events, "settings.need_restart")
    put("second")
    assert change("idle-timeout = 0.1") == "idle-timeout"


# --- signals at any time ---


def test_a_hundred_sighups_lose_no_client(configured, put, der, tls_client) -> None:
    put("first")
    running, change = configured("", TLS)
    port, stopped, served, problems = running.port, threading.Event(), [], []

    def visit() -> None:
        while not stopped.is_set():
            try:
                with tls_client(port) as client:
                    assert echoes(client)
                served.append(1)
            except (OSError, AssertionError) as problem:
                problems.append(problem)

    visitors = [threading.Thread(target=visit) for _ in range(2)]
    for visitor in visitors:
        visitor.start()
    with tls_client(port) as old:
        for number in range(100):
            put(("first", "second")[number % 2], suffixes=("pem", "key") if number % 3 else ("pem",))
            running.process.send_signal(signal.SIGHUP)
            assert echoes(old)
    stopped.set()
    for visitor in visitors:
        visitor.join(DEADLINE)
    assert not problems
    assert served
    put("second")
    change("idle-timeout = 7")
    running.wait_event("settings.reloaded", settings="idle-timeout")
    assert served_certificate(port) == der("second")
    assert running.stop() == 0
    assert not lines(running, "Traceback")


def test_sighup_during_the_start_reloads_once_serving(service, tmp_path) -> None:
    copy_plugin("when_endpoint", tmp_path)
    running = service("--listen=when:there", "--listen=unix:s", PYTHONPATH=str(tmp_path))
    running.process.send_signal(signal.SIGHUP)
    (tmp_path / "there").touch()
    running.wait_event("settings.reloaded", settings="none")
    order = [event["event"] for event in running.events if event["event"] in ("listener.listening", "reload.started")]
    assert order == ["listener.listening", "listener.listening", "reload.started"]
    assert running.stop() == 0


def test_sighup_during_a_drain_is_ignored(service) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1")
    with connected(running) as client:
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("drain.started", count=1)
        running.process.send_signal(signal.SIGHUP)
        assert echoes(client)
    assert running.process.wait(DEADLINE) == 0
    assert running.wait_event("drain.done", ended=1, aborted=0)
    assert not recorded(running.events, "reload.started")


def test_sigusr1_without_a_log_file_is_harmless(service) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1")
    with connected(running) as client:
        running.process.send_signal(signal.SIGUSR1)
        assert echoes(client)
    assert running.stop() == 0


# --- after privileges are dropped ---


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user or the root")
def test_reload_after_dropping_privileges_reports_an_unreadable_key(service, put, der, tmp_path) -> None:
    put("first")
    (tmp_path / "served.key").chmod(0o600)
    running = service(TLS, twistd=("--uid=nobody",))
    assert "the private key" in (line := reload(running)) or "the certificate" in line
    assert "permission denied" in line
    assert served_certificate(running.port) == der("first")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user or the root")
def test_reload_after_chroot_reports_files_outside_the_root(service, put, der, tmp_path) -> None:
    put("first")
    (tmp_path / "rt.toml").write_text("")
    running = service(TLS, twistd=(f"--chroot={tmp_path}",))
    line = reload(running)
    assert line.startswith("cannot read the certificate")
    assert served_certificate(running.port) == der("first")
