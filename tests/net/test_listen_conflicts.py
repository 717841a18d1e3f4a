"""Conflicting listeners are detected before either is bound, and the kernel agrees."""

import contextlib
import itertools
import os
import random
import socket

import pytest

from rtservice.net.description import ListenError
from rtservice.net.listen_conflicts import FilePlace, PassedPlace, Place, TCPPlace, exclude, first_conflict
from rtservice.net.listen_types import ListenerSpec, read_description, read_port
from tests.support.ipv6 import has_ipv6, needs_ipv6

ANY4, ONE4, TWO4 = (TCPPlace(False, host, 1) for host in ("0.0.0.0", "127.0.0.1", "127.0.0.2"))
ANY6, ONE6 = (TCPPlace(True, host, 1) for host in ("::", "::1"))
FILE = FilePlace((1, 2), "s")


@pytest.mark.parametrize(
    ("one", "other", "excluded"),
    [
        (ANY4, ANY4, True),
        (ANY4, ONE4, True),
        (ONE4, ONE4, True),
        (ONE4, TWO4, False),
        (ANY4, ANY6, False),
        (ONE4, ONE6, False),
        (ANY6, ONE6, True),
        (ANY4, TCPPlace(False, "0.0.0.0", 2), False),
        (TCPPlace(False, "0.0.0.0", 0), TCPPlace(False, "0.0.0.0", 0), False),
        (TCPPlace(True, "fe80::1", 1, zone=2), TCPPlace(True, "fe80::1", 1, zone=3), False),
        (TCPPlace(True, "fe80::1", 1, zone=2), TCPPlace(True, "fe80::1", 1, zone=2), True),
        (TCPPlace(True, "fe80::1", 1, zone=2), ANY6, True),
        (TCPPlace(False, "web", 1), TCPPlace(False, "web", 1), True),
        (TCPPlace(False, "web", 1), ANY4, True),
        (TCPPlace(False, "web", 1, may_be_absent=True), ANY4, False),
        (ANY4, TCPPlace(False, "web", 1, may_be_absent=True), False),
        (TCPPlace(False, "web", 1, may_be_absent=True), TCPPlace(False, "web", 1), True),
        (FILE, FilePlace((1, 2), "s"), True),
        (FILE, FilePlace((1, 3), "s"), False),
        (FILE, FilePlace((1, 2), "t"), False),
        (FILE, ANY4, False),
        (PassedPlace(5, ONE4), PassedPlace(5, ONE4), True),
        (PassedPlace(5, ONE4), PassedPlace(6, ONE4), False),
        (PassedPlace(5, ONE4), ANY4, True),
        (PassedPlace(5, FILE), FILE, True),
        (PassedPlace(5, None), ANY4, False),
    ],
)
def test_conflicting_addresses_are_detected(one: Place, other: Place, excluded: bool) -> None:
    assert exclude(one, other) == excluded
    assert exclude(other, one) == excluded


def test_a_conflict_names_both_settings_and_the_remedy() -> None:
    any4, one4 = TCPPlace(False, "0.0.0.0", 80, shown="0.0.0.0:80"), TCPPlace(False, "127.0.0.1", 80, shown="1:80")
    is_ipv6 = TCPPlace(True, "::", 80, shown="[::]:80")
    assert first_conflict([("--a", [any4, is_ipv6]), ("--b", []), ("--c", [one4])]) == (
        "--c",
        "1:80 is taken by --a (0.0.0.0:80); change or remove one of the two",
    )
    assert first_conflict([("--a", [any4]), ("--a", [any4])]) == (
        "--a",
        "0.0.0.0:80 is taken by --a; change or remove one of the two",
    )
    # One setting may select several passed sockets of one address, as configured in the service manager.
    assert first_conflict([("--a", [PassedPlace(1, any4), PassedPlace(2, any4)]), ("--b", [is_ipv6])]) is None


def described(*descriptions: str, slots: int = 0, **how) -> list[ListenerSpec]:
    return [read_description(description, backlog=5, slots=slots, **how) for description in descriptions]


def conflict(wanted: list[ListenerSpec], *, look_up: bool = True) -> bool:
    return first_conflict(("x", spec.places(look_up=look_up)) for spec in wanted) is not None


@pytest.mark.parametrize("slots", [0, 2])
def test_the_kernel_agrees_with_and_without_workers(slots: int) -> None:
    hosts = ["0.0.0.0", "127.0.0.1", "127.0.0.2", *(["::", "::1"] if has_ipv6() else [])]
    chance = random.Random(os.getpid())
    for first, second in itertools.product(hosts, hosts):
        # Another process may use the port, in one family only: then another port is tried. Ephemeral ports
        # (ip(7), ip_local_port_range) are avoided, since thousands may be in use.
        for _ in range(50):
            port = chance.randrange(10_000, 20_000)
            wanted = described(f"tcp:{port}:interface={first}", f"tcp:{port}:interface={second}", slots=slots)
            with contextlib.ExitStack() as stack:
                had = []
                for spec in wanted:
                    with contextlib.suppress(ListenError):
                        for opened in spec.open():
                            stack.callback(opened.close)
                            had.append(spec)
            if wanted[0] in had and (wanted[1] in had) != conflict(wanted):
                break
        assert wanted[0] in had
        assert (wanted[1] in had) != conflict(wanted), (first, second)


@pytest.mark.parametrize(
    ("descriptions", "conflicts"),
    [
        (["tcp:8080", "tcp:8080"], True),
        (["8080", "*:8080"], True),
        (["tcp:8080", "tcp:8080:interface=127.0.0.1"], True),
        (["localhost:8080", "127.0.0.1:8080"], True),
        (["ssl:8080:certificates=/d", "proxy:tcp:127.0.0.1:8080"], True),
        (["tcp:127.0.0.1:8080", "tcp:127.0.0.2:8080"], False),
        (["tcp:0", "tcp:0"], False),
        (["tcp:8080", "tcp:8081"], False),
        (["tcp:8080", "tcp6:8080"], False),
        (["tcp:127.0.0.1:8080", "[::1]:8080"], False),
        pytest.param(["tcp6:8080", "[::1]:8080"], True, marks=needs_ipv6),
        pytest.param([r"tcp6:8080:interface=\:\:1", "tcp:8080:interface=0::1"], True, marks=needs_ipv6),
        (["unix:{0}/s", "unix:{0}/s"], True),
        (["unix:{0}/s", "unix:{0}/./sub/../s"], True),
        (["unix:{0}/sub/s", "unix:{0}/link/s:mode=600"], True),
        (["unix:{0}/s", "unix:{0}/sub/s"], False),
        (["unix:{0}/missing/s", "unix:{0}/missing/./s"], True),
        (["systemd:", "systemd:name=web"], False),  # nothing was passed
    ],
)
@pytest.mark.parametrize("look_up", [True, False])
def test_descriptions_of_the_same_address_conflict_in_any_spelling(tmp_path, descriptions, conflicts, look_up) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("sub")
    wanted = described(*(description.format(tmp_path) for description in descriptions))
    assert conflict(wanted, look_up=look_up) == conflicts
    assert conflict(wanted[::-1], look_up=look_up) == conflicts


def test_a_port_uses_both_families_and_a_status_description_uses_loopback() -> None:
    port = read_port(8080, interface="", backlog=5)
    for description in ("tcp:8080", "tcp6:8080"):
        assert conflict([port, *described(description)])
        assert conflict([port, *described(description, loopback=True)])
    assert not conflict([read_port(8080, interface="127.0.0.2", backlog=5), *described("8080", loopback=True)])
    assert conflict([read_port(8080, interface="localhost", backlog=5), *described("localhost:8080")])


def test_without_look_up_names_are_compared_as_text(monkeypatch) -> None:
    def refuse(host, *arguments, **keywords):
        assert host == "localhost" or keywords.get("flags") == socket.AI_NUMERICHOST, host
        return resolve(host, *arguments, **keywords)

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert conflict(described("tcp:Web:8080", "tcp:web:8080", "localhost:8080"), look_up=False)
    assert conflict(described("tcp:web:8080", "tcp:8080"), look_up=False)
    assert not conflict(described("tcp:web:8080", "tcp:db:8080", "localhost:8080"), look_up=False)
    # A name in `--interface` may have addresses of one family only, which is unknown without a look-up: no conflict.
    port = read_port(8080, interface="web", backlog=5)
    for description in ("tcp:8080", "tcp6:8080"):
        assert not conflict([port, *described(description)], look_up=False)
        assert not conflict([*described(description), port], look_up=False)
    assert conflict([port, *described("tcp:web:8080")], look_up=False)
    monkeypatch.undo()
    (invalid,) = described("a.invalid:8080")
    with pytest.raises(ListenError, match=r"cannot resolve the interface 'a\.invalid': "):
        invalid.places()


def test_a_passed_socket_is_served_once_and_keeps_its_address(monkeypatch, tmp_path) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    path = f"{tmp_path}/s"
    with listening, socket.socket(socket.AF_UNIX) as file:
        file.bind(path)
        file.listen()
        port = listening.getsockname()[1]
        passed = [(listening.fileno(), "web"), (file.fileno(), "file")]
        monkeypatch.setattr("rtservice.net.activation._systemd_sockets", lambda: passed)
        before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        for descriptions, conflicts in (
            (["systemd:name=web", "systemd:name=file"], False),
            (["systemd:", "systemd:name=web"], True),
            (["systemd:index=0", "ssl:systemd:name=web:certificates=/d"], True),
            (["systemd:name=web", f"127.0.0.1:{port}"], True),
            (["systemd:name=web", f"tcp:{port}"], True),
            (["systemd:name=web", f"127.0.0.2:{port}"], False),
            (["systemd:name=file", f"unix:{tmp_path}/./s"], True),
        ):
            assert conflict(described(*descriptions)) == conflicts, descriptions
        if before:
            assert len(os.listdir("/proc/self/fd")) == before
