"""Addresses in every accepted form, suggestions for mistyped names, and conflicts between listeners."""

import re
import signal
import socket
import subprocess

import pytest

from rtservice.testing import DEADLINE
from tests.support.free_port import free_port
from tests.support.greeting import GREETING
from tests.support.ipv6 import needs_ipv6

FOREGROUND = ("-n", "--pidfile=")


def greets(host: str, port: int) -> bool:
    with socket.create_connection((host, port), timeout=DEADLINE) as client:
        return client.recv(100) == GREETING


def line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1, result
    assert result.stdout == ""
    (message,) = result.stderr.splitlines()
    return message


@needs_ipv6
def test_addresses_are_accepted_in_every_form_including_the_logged_one(service, certificates) -> None:
    pair = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    typed = {
        "[::1]:0": "tcp:[::1]:",
        "tcp6:0:interface=::1:backlog=5": "tcp:[::1]:",
        r"tcp6:0:interface=\:\:1": "tcp:[::1]:",
        "localhost:0": "tcp:127.0.0.1:",
        "*:0": "tcp:0.0.0.0:",
        f"ssl:0:interface=::1:{pair}": "ssl:[::1]:",
    }
    first = service("--workers=2", "--status=[::1]:0", RTSERVICE_LISTEN=" ".join(typed))
    first.wait_event("status.listening", listener=re.compile(r"^tcp:\[::1\]:\d+$"))
    printed = []
    for name in typed.values():
        found = first.wait_event(
            "listener.listening", printed_count(printed, name) + 1, listener=re.compile(rf"^{re.escape(name)}\d+$")
        )["listener"]
        printed.append(found.rpartition(" on ")[2])
    assert serve_all(printed)
    assert first.stop() == 0
    second = service(*(f"--listen={name}:{pair}" if name.startswith("ssl") else f"--listen={name}" for name in printed))
    for name in printed:
        second.wait_event("listener.listening", listener=name)
    assert serve_all(printed)


def printed_count(printed: list[str], name: str) -> int:
    return sum(address.startswith(name) for address in printed)


def serve_all(names: list[str]) -> bool:
    """Return whether each listener without TLS greets."""
    addresses = [re.fullmatch(r"tcp:\[?(.*?)\]?:(\d+)", name) for name in names]
    return all(greets(found[1].replace("0.0.0.0", "127.0.0.1"), int(found[2])) for found in addresses if found)


def test_two_listeners_on_one_address_are_reported_before_anything_is_bound(run, tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("sub")
    port = free_port()
    for arguments, expected_text in (
        (
            [f"--listen=tcp:{port}", f"--listen=tcp:{port}"],
            f"--listen tcp:{port}: 0.0.0.0:{port} is taken by --listen tcp:{port}",
        ),
        (
            ["--listen=unix:first", f"--listen={port}", f"--listen=localhost:{port}", "--workers=2"],
            f"--listen localhost:{port}: 127.0.0.1:{port} is taken by --listen {port} (0.0.0.0:{port})",
        ),
        (
            [f"--port={port}", f"--status={port}"],
            f"--status {port}: 127.0.0.1:{port} is taken by --port {port} (0.0.0.0:{port})",
        ),
        (
            ["--listen=unix:sub/s", "--listen=unix:./link/s"],
            f"--listen unix:./link/s: unix:{tmp_path}/link/s is taken by --listen unix:sub/s (unix:{tmp_path}/sub/s)",
        ),
    ):
        expected = f"rtservice: {expected_text}; change or remove one of the two"
        assert line(run(*FOREGROUND, "rtservice", *arguments)) == expected
    assert line(run(*FOREGROUND, "rtservice", "--check", *arguments)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "sub"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_reports_conflicting_listeners_and_invalid_descriptions(service, tmp_path, workers) -> None:
    port = free_port()
    config = tmp_path / "rt.toml"
    config.write_text(f"workers = {workers}\nlisten = ['unix:s']\n", encoding="utf-8-sig")
    running = service("--config=rt.toml")
    setting = f"{config}: listen"
    for listen, expected_text in (
        (
            f"['unix:s', 'tcp:{port}', '127.0.0.1:{port}']",
            f"{setting} 127.0.0.1:{port}: 127.0.0.1:{port} is taken by {config}: listen tcp:{port} ",
        ),
        (
            "['unix:s', 'unix:./s']",
            f"{setting} unix:./s: unix:{tmp_path}/s is taken by {config}: listen unix:s; change",
        ),
        ("['ttcp:1']", f"{setting} ttcp:1: unknown type 'ttcp'; accepted are 8080, "),
        ("['::1:80']", f"{setting} ::1:80: '::1:80' may be an IPv6 address or one with a port"),
    ):
        config.write_text(f"workers = {workers}\nlisten = {listen}\n")
        running.process.send_signal(signal.SIGHUP)
        running.wait_event("reload.failed", problem=re.compile(f"^{re.escape(expected_text)}"))
    config.write_text(f"workers = {workers}\nlisten = ['unix:s', 'tcp:{port}', 'tcp6:{port}']\n")
    running.process.send_signal(signal.SIGHUP)
    running.wait_event("settings.need_restart", settings="listen")


def test_a_suggestion_is_part_of_one_error_line(run, tmp_path) -> None:
    (tmp_path / "wide.toml").write_bytes("port = 1".encode("utf-16"))
    (tmp_path / "key.pem").write_bytes("key".encode("utf-16"))
    for arguments, expected_text in (
        (["--draintimeout=3"], "option --draintimeout not recognized; did you mean --drain-timeout?"),
        (["--logfile=x"], "option --logfile not recognized; put --logfile before the word rtservice"),
        (["--config=wide.toml"], f"{tmp_path}/wide.toml: is UTF-16 by its byte order mark; save it as UTF-8"),
        (["--listen=ssl:0:privateKey=key.pem"], f"the certificate '{tmp_path}/key.pem' is UTF-16 by its byte order"),
        (["--listen=tls:8443"], "Twisted's type tls begins with a directory, not with a port; did you mean ssl:…?"),
    ):
        assert expected_text in line(run(*FOREGROUND, "rtservice", *arguments)), arguments
