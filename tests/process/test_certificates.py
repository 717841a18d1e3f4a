"""Certificates in the log and on the status page, and their renewal."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.logger import Logger, formatEvent

from rtservice.net import tls
from rtservice.net.crl import RevocationLists
from rtservice.net.description import ListenError
from rtservice.net.listener import Listener
from rtservice.net.tls import Certificate, DirectoryTLS, Files, ServerTLS
from rtservice.process.certificates import certificates_of, days_left, logging_certificates, renewing
from rtservice.steps import finish
from tests.support.odd_certificates import dns, odd_certificate

DAY, NOW = 86400, 1_800_000_000.5


def listener(*certificates: Certificate, source: Any = None, **more: Any) -> Listener:
    return Listener(None, "ssl", certificates=certificates, source=source, **more)  # type: ignore[arg-type]  # it is not used


def logged(monkeypatch: pytest.MonkeyPatch, *listeners: Listener) -> list[str]:
    events: list[dict[str, Any]] = []
    monkeypatch.setattr("rtservice.process.certificates.time.time", lambda: NOW)
    finish(logging_certificates(Logger(observer=events.append), list(listeners)))  # type: ignore[arg-type]  # of Twisted
    return [f"{event['log_level'].name}: {formatEvent(event)}" for event in events]


# --- days ---


@pytest.mark.parametrize(
    ("seconds", "days", "text"),
    [
        (90 * DAY + 0.5, 90, "info: certificate /c for a: expires in 90 days"),
        (90 * DAY - 0.5, 89, "info: certificate /c for a: expires in 89 days"),
        (8.9 * DAY, 8, "info: certificate /c for a: expires in 8 days"),
        (1.9 * DAY, 1, "info: certificate /c for a: expires in 1 day"),
        (DAY + 0.5, 1, "info: certificate /c for a: expires in 1 day"),
        (DAY - 0.5, 0, "info: certificate /c for a: expires in less than 1 day"),
        (0.5, 0, "info: certificate /c for a: expires in less than 1 day"),
        (-0.5, -1, "warn: certificate /c for a: expired"),
        (-DAY - 0.5, -2, "warn: certificate /c for a: expired"),
        (253402300799 - NOW, 2912063, "info: certificate /c for a: expires in 2912063 days"),
    ],
)
def test_log_and_status_page_show_the_same_remaining_days(monkeypatch, seconds, days, text) -> None:
    served_listener = listener(Certificate("/c", ("a",), 0, int(NOW + seconds)))
    assert days_left(NOW + seconds, NOW) == days
    assert logged(monkeypatch, served_listener) == [text]
    assert [row["days_left"] for row in certificates_of([served_listener], NOW)] == [days]


def test_revocation_list_is_logged_with_the_remaining_days(monkeypatch) -> None:
    for seconds, text in ((1.9 * DAY, "in 1 day"), (0.5, "in less than 1 day"), (8.9 * DAY, "in 8 days")):
        lists = RevocationLists("/l", 1, int(NOW + seconds))
        assert logged(monkeypatch, listener(revocation=lists)) == [f"info: revocation list /l: next update {text}"]


def test_certificate_that_is_not_valid_yet_is_logged_as_a_warning(monkeypatch) -> None:
    served_listener = listener(Certificate("/c", ("a",), int(NOW + DAY), int(NOW + 9 * DAY)))
    assert logged(monkeypatch, served_listener) == ["warn: certificate /c for a: not valid yet"]
    assert certificates_of([served_listener], NOW)[0]["not_before"] > NOW


def test_certificates_that_expire_first_and_one_of_each_listener_are_shown() -> None:
    many = [Certificate(f"/{number}", ("a",), 0, 1000 - number) for number in range(1000)]
    late = [Certificate(f"/late{number}", ("a",), 0, 5000 + number) for number in range(3)]
    shown = certificates_of([listener(*many), listener(), listener(*late)], NOW)
    assert [row["not_after"] for row in shown] == [*range(1, 101), 5000]


# --- renewal ---


@pytest.fixture
def directory(certificates, tmp_path):
    """A directory with `default.pem` and certificates a, b and c, and a function that writes a certificate."""
    key = Path(certificates["server.key"]).read_text()

    def write(name: str, serial: int = 1, key: str = key) -> None:
        pem = odd_certificate(
            certificates["server.pem"], alternative=dns(f"{name}.example".encode()), serial=b"%c" % serial
        )
        (tmp_path / f"{name}.pem").write_text(pem + key)

    for name in ("default", "a", "b", "c"):
        write(name)
    return SimpleNamespace(path=str(tmp_path), write=write)


def served(*sources: Any) -> list[tuple[Listener, Any]]:
    """Return listeners that have loaded these certificates, each with its port."""
    pairs = []
    for source in sources:
        served_listener = listener(source=source)
        served_listener.adopt(source.load())
        pairs.append((served_listener, SimpleNamespace(tls=served_listener.tls)))
    return pairs


def contexts(served_listener: Listener) -> dict[str, Any]:
    found = dict(served_listener.reusable.names.contexts)
    return {name: served_listener.tls if context is None else context for name, context in found.items()}


def test_only_contexts_of_changed_certificates_are_created_again(directory, monkeypatch) -> None:
    pairs = served(DirectoryTLS(directory.path))
    [(served_listener, port)] = pairs
    before = contexts(served_listener)
    directory.write("b", 2)
    directory.write("d")
    made = []
    make = DirectoryTLS._make
    monkeypatch.setattr(DirectoryTLS, "_make", lambda *given: made.append(os.path.basename(given[1])) or make(*given))
    adopt = finish(renewing(pairs))
    assert contexts(served_listener) == before
    assert port.tls is before["default.example"]
    finish(adopt())
    after = contexts(served_listener)
    assert made == ["b.pem", "d.pem", "default.pem"]  # the default holds the SNI lookup and is never reused
    assert {name for name in after if after[name] is before.get(name)} == {"a.example", "c.example"}
    assert port.tls is served_listener.tls is after["default.example"]


@pytest.mark.parametrize("other", ["clients", "key"])
def test_context_is_not_reused_if_the_client_ca_or_the_key_changes(directory, certificates, tmp_path, other) -> None:
    authorities = tmp_path / "authorities"
    authorities.write_text(Path(certificates["ca.pem"]).read_text())
    pairs = served(DirectoryTLS(directory.path, client_ca=str(authorities)))
    before = contexts(pairs[0][0])
    if other == "clients":
        authorities.write_text(Path(certificates["other.pem"]).read_text())
    else:  # the same key in other bytes
        for name in ("a", "b", "c", "default"):
            directory.write(name, key=Path(certificates["server.key"]).read_text() + "\n")
    finish(finish(renewing(pairs))())
    after = contexts(pairs[0][0])
    assert not [name for name in after if after[name] is before[name]]


def test_unreadable_certificate_of_one_listener_changes_no_listener(directory, certificates, tmp_path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for suffix in ("pem", "key"):
        shutil.copy(certificates[f"server.{suffix}"], alone)
    pairs = served(DirectoryTLS(directory.path), ServerTLS(str(alone / "server.key"), str(alone / "server.pem")))
    before = [contexts(served_listener) | {"": served_listener.tls} for served_listener, _ in pairs]
    directory.write("a", 2)
    (alone / "server.key").write_text("half of a ke")
    with pytest.raises(ListenError, match="no usable private key"):
        finish(renewing(pairs))
    assert [contexts(served_listener) | {"": served_listener.tls} for served_listener, _ in pairs] == before


def test_each_step_loads_at_most_one_certificate(directory, monkeypatch) -> None:
    made = []
    make = DirectoryTLS._make
    monkeypatch.setattr(DirectoryTLS, "_make", lambda *given: made.append(1) or make(*given))
    steps, most = 0, 0
    loading = DirectoryTLS(directory.path).loading()
    for _ in loading:
        steps, most = steps + 1, max(most, len(made))
        made.clear()
    assert (steps, most) == (4, 1)


class Changing(Files):
    """Files that change while they are read: `change` is called before the file `at` is read."""

    change: Any = None
    at = ""

    def read(self, path: str, what: str) -> str:
        if Changing.change is not None and path.endswith(Changing.at):
            change, Changing.change = Changing.change, None
            change()
        return super().read(path, what)


@pytest.mark.parametrize(
    "change",
    [
        lambda directory: os.unlink(f"{directory.path}/b.pem"),
        lambda directory: directory.write("c", 2),
        lambda directory: directory.write("a", 2),
        lambda directory: directory.write("new", 2),
    ],
    ids=["gone", "later", "earlier", "more"],
)
def test_directory_changed_during_reading_is_read_again(directory, monkeypatch, change) -> None:
    pairs = served(DirectoryTLS(directory.path))
    monkeypatch.setattr("rtservice.process.certificates.Files", Changing)
    monkeypatch.setattr(Changing, "at", "b.pem")
    monkeypatch.setattr(Changing, "change", staticmethod(lambda: change(directory)))
    finish(finish(renewing(pairs))())
    assert Changing.change is None
    assert "a.example" in contexts(pairs[0][0])


def test_mismatched_key_pair_is_read_at_most_three_times(directory, certificates, monkeypatch) -> None:
    pairs = served(DirectoryTLS(directory.path))
    before = contexts(pairs[0][0])
    other = Path(certificates["client.key"]).read_text()
    readings = []

    def replace_pair() -> None:
        readings.append(1)
        directory.write("b", 2, key=other if len(readings) < good else Path(certificates["server.key"]).read_text())
        Changing.change = replace_pair if len(readings) < 9 else None

    monkeypatch.setattr("rtservice.process.certificates.Files", Changing)
    monkeypatch.setattr(Changing, "at", "b.pem")
    good = 3
    monkeypatch.setattr(Changing, "change", staticmethod(replace_pair))
    finish(finish(renewing(pairs))())
    assert len(readings) == 3
    current = contexts(pairs[0][0])
    assert current["b.example"] is not before["b.example"]

    readings.clear()
    good = 99
    monkeypatch.setattr(Changing, "change", staticmethod(replace_pair))
    with pytest.raises(ListenError, match=re.escape("b.pem' does not belong to the certificate")):
        finish(renewing(pairs))
    assert len(readings) == 3
    assert contexts(pairs[0][0]) == current


def test_invalid_certificate_that_does_not_change_is_not_read_again(directory, certificates, monkeypatch) -> None:
    pairs = served(DirectoryTLS(directory.path))
    directory.write("b", key=Path(certificates["client.key"]).read_text())
    reads = []
    read = tls.Files.read
    monkeypatch.setattr(tls.Files, "read", lambda *given: reads.append(given[1][-5:]) or read(*given))
    with pytest.raises(ListenError):
        finish(renewing(pairs))
    assert reads == ["a.pem", "b.pem"]
