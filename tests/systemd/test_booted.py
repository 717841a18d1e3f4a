"""The files of etc/ under a real systemd: start, reload, restart, watchdog and stop."""

import contextlib
import re
import shutil
import socket
import ssl
import threading
import time

import pytest

from tests.support.greeting import GREETING

DATA = bytes(range(256)) * 100
PLAIN, TLS = 8080, 8443  # the ports of the socket units in etc/
ACTIVATED, STANDALONE = "rtservice.service", "rtservice-standalone.service"

# The first run downloads a Debian.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def installed(machine, certificates):
    """The machine, with certificates and settings where the files of etc/ expect them."""
    # As in docs/howto/systemd.md: create the plugin cache of Twisted, which the service has no permission to write.
    machine.run("/opt/rtservice/bin/twistd", "--help")
    machine.run("systemd-sysusers")
    machine.run("systemd-tmpfiles", "--create")
    shutil.copy(certificates["server.pem"], machine.path("/etc/rtservice/certificate.pem"))
    shutil.copy(certificates["server.key"], machine.path("/etc/rtservice/key.pem"))
    return machine


@pytest.fixture(params=[ACTIVATED, STANDALONE])
def unit(request, installed, certificates):
    """The name of a started unit that serves PLAIN and TLS."""
    yield from started(request.param, installed, certificates)


@pytest.fixture
def activated(installed, certificates):
    yield from started(ACTIVATED, installed, certificates)


@pytest.fixture
def standalone(installed, certificates):
    yield from started(STANDALONE, installed, certificates)


def started(unit, machine, certificates):
    renew(machine, certificates, "server")
    config = machine.path("/etc/rtservice/rtservice.toml")
    original = config.read_text()
    if unit == STANDALONE:
        tls = f"ssl:{TLS}:certificates=/etc/rtservice/certificates"
        listen = f'listen = ["tcp:{PLAIN}", "tcp6:{PLAIN}", "{tls}", "{tls}:interface=\\\\:\\\\:"]'
        config.write_text(original.replace(f"port = {PLAIN}", listen))
        names = [unit]
    else:
        names = ["rtservice.socket", "rtservice-tls.socket"]
    machine.run("systemctl", "enable", "--now", *names)
    if unit == ACTIVATED:
        echo(machine)  # the first connection activates the service
    yield unit
    machine.run("systemctl", "disable", "--now", *names)
    machine.run("systemctl", "stop", unit)
    config.write_text(original)
    machine.run("systemctl", "reset-failed")


def renew(machine, certificates, name) -> None:
    """Install a certificate where the standalone unit reads it."""
    for kind in ("pem", "key"):
        path = f"/etc/rtservice/certificates/default.{kind}"
        shutil.copy(certificates[f"{name}.{kind}"], machine.path(path))
        machine.run("chgrp", "rtservice", path)
        machine.run("chmod", "640", path)


@contextlib.contextmanager
def connected(machine, host="127.0.0.1", authority=None):
    """Connect a client, with TLS if a trusted authority is given."""
    with machine.network():
        sock = socket.create_connection((host, TLS if authority else PLAIN), timeout=30)
    with sock:
        if authority is None:
            yield sock
        else:
            with ssl.create_default_context(cafile=authority).wrap_socket(sock, server_hostname="localhost") as tls:
                yield tls


def read_exactly(sock, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        piece = sock.recv(length - len(received))
        assert piece, f"the end after {len(received)} of {length} bytes"
        received += piece
    return bytes(received)


def echo(machine, host="127.0.0.1", authority=None) -> None:
    """Check that a client receives the greeting and the complete echo."""
    with connected(machine, host, authority) as sock:
        sock.sendall(DATA)
        assert read_exactly(sock, len(GREETING + DATA)) == GREETING + DATA


@contextlib.contextmanager
def changed(machine, unit, setting: str):
    """Restart the unit with an additional setting in its [Service] section."""
    dropin = machine.path(f"/run/systemd/system/{unit}.d/test.conf")
    dropin.parent.mkdir(parents=True)
    dropin.write_text(f"[Service]\n{setting}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", unit)
    try:
        yield
    finally:
        shutil.rmtree(dropin.parent)
        machine.run("systemctl", "daemon-reload")


def main_pid(machine, unit) -> str:
    assert machine.property(unit, "ActiveState") == "active"
    return machine.property(unit, "MainPID")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_and_tls_are_served(machine, unit, certificates, host) -> None:
    echo(machine, host)
    echo(machine, host, certificates["ca.pem"])
    assert machine.run("systemctl", "is-active", unit) == "active\n"
    # The sandbox causes no errors.
    log = "\n".join(machine.journal(unit))
    assert not re.search("Traceback|[Uu]nable|[Ee]rror|denied|not permitted|not supported", log), log


def test_the_status_text_shows_the_number_of_clients(machine, unit, wait_for) -> None:
    wait_for(lambda: re.search(r"\b0\b", machine.property(unit, "StatusText")))
    with connected(machine) as first, connected(machine) as second:
        for sock in (first, second):
            read_exactly(sock, len(GREETING))
        wait_for(lambda: re.search(r"\b2\b", machine.property(unit, "StatusText")))


def test_a_reload_keeps_open_connections(machine, unit) -> None:
    before = main_pid(machine, unit)
    with connected(machine) as sock:
        read_exactly(sock, len(GREETING))
        machine.run("systemctl", "reload", unit)
        sock.sendall(DATA)
        assert read_exactly(sock, len(DATA)) == DATA
    echo(machine)
    assert main_pid(machine, unit) == before


def test_a_reload_loads_a_renewed_certificate(machine, standalone, certificates, wait_for) -> None:
    def shown() -> bytes:
        with connected(machine, authority=certificates["ca.pem"]) as sock:
            return ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True)).encode()

    def on_file(name: str) -> bytes:
        with open(certificates[name], "rb") as file:
            return file.read()

    before = main_pid(machine, standalone)
    assert shown() == on_file("server.pem")
    renew(machine, certificates, "rsa")
    machine.run("systemctl", "reload", standalone)
    wait_for(lambda: shown() == on_file("rsa.pem"))
    assert main_pid(machine, standalone) == before


def test_restarts_refuse_no_client_and_lose_no_byte(machine, activated, certificates, wait_for) -> None:
    problems: list[BaseException] = []
    authorities = [None, None, certificates["ca.pem"]]
    served = [0] * len(authorities)
    stopped = threading.Event()

    def keep_connecting(number: int) -> None:
        while not stopped.is_set():
            try:
                echo(machine, authority=authorities[number])
            except BaseException as problem:
                problems.append(problem)
            served[number] += 1

    clients = [threading.Thread(target=keep_connecting, args=(number,)) for number in range(len(served))]
    for client in clients:
        client.start()
    try:
        pids = {main_pid(machine, activated)}
        for _ in range(3):
            machine.run("systemctl", "restart", activated)
            pids.add(main_pid(machine, activated))
            before = served.copy()
            wait_for(lambda before=before: all(now > then + 3 for now, then in zip(served, before, strict=True)))
    finally:
        stopped.set()
        for client in clients:
            client.join()
    assert problems == []
    assert len(pids) == 4


def test_the_watchdog_restarts_only_a_stuck_process(machine, unit, wait_for) -> None:
    def last_notification() -> int:
        return int(machine.property(unit, "WatchdogTimestampMonotonic"))

    with changed(machine, unit, "WatchdogSec=2"):
        before = main_pid(machine, unit)
        first = last_notification()
        wait_for(lambda: last_notification() > first + 3_000_000)
        assert main_pid(machine, unit) == before
        machine.run("kill", "-STOP", before)
        wait_for(lambda: machine.property(unit, "NRestarts") == "1" and machine.property(unit, "SubState") == "running")
        echo(machine)
        assert main_pid(machine, unit) != before
        log = machine.journal(unit)
        assert any("Watchdog timeout" in line for line in log)
        # The header of the traceback of faulthandler.
        assert "Fatal Python error: Aborted" in log


def test_an_invalid_setting_is_one_log_line_without_restarts(machine, activated) -> None:
    config = machine.path("/etc/rtservice/rtservice.toml")
    config.write_text(config.read_text().replace("max-connections =", "max-conections ="))
    machine.run("systemctl", "stop", activated)
    with pytest.raises(AssertionError, match="failed"):
        machine.run("systemctl", "start", activated)
    assert machine.property(activated, "Result") == "exit-code"
    assert machine.property(activated, "NRestarts") == "0"
    assert sum("max-conections" in line for line in machine.journal(activated)) == 1


def test_a_stop_drains_and_succeeds(machine, unit, wait_for) -> None:
    with connected(machine) as sock:
        read_exactly(sock, len(GREETING))
        stopping = threading.Thread(target=machine.run, args=("systemctl", "stop", unit))
        stopping.start()
        wait_for(lambda: machine.property(unit, "ActiveState") == "deactivating")
        sock.sendall(DATA)
        assert read_exactly(sock, len(DATA)) == DATA
    stopping.join()
    assert machine.property(unit, "Result") == "success"
    assert any("drained: 1 ended, 0 aborted" in line for line in machine.journal(unit))


def test_a_drain_longer_than_the_stop_timeout_extends_it(machine, unit, wait_for) -> None:
    with changed(machine, unit, "TimeoutStopSec=1"):
        with connected(machine) as sock:
            read_exactly(sock, len(GREETING))
            stopping = threading.Thread(target=machine.run, args=("systemctl", "stop", unit))
            stopping.start()
            wait_for(lambda: machine.property(unit, "ActiveState") == "deactivating")
            since = int(machine.property(unit, "StateChangeTimestampMonotonic")) / 1_000_000
            wait_for(lambda: time.monotonic() > since + 3)
            sock.sendall(DATA)
            assert read_exactly(sock, len(DATA)) == DATA
        stopping.join()
        assert machine.property(unit, "Result") == "success"


def test_a_port_in_use_is_retried_until_it_is_free(machine, standalone, wait_for) -> None:
    machine.run("systemctl", "stop", standalone)
    with machine.network():
        other = socket.create_server(("127.0.0.1", PLAIN))
    with other, pytest.raises(AssertionError, match="failed"):
        machine.run("systemctl", "start", standalone)
    wait_for(lambda: machine.property(standalone, "ActiveState") == "active")
    echo(machine)
