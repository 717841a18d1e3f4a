"""From a description to sockets."""

import os
import socket
import stat

import pytest

from rtservice.net.listeners import Listener, ListenError, open_description, open_port, split_description


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


@pytest.fixture
def opened():
    """Opens descriptions, and closes what it opened."""
    listeners: list[Listener] = []

    def open_all(description: str) -> list[Listener]:
        found = open_description(description, backlog=10)
        listeners.extend(found)
        return found

    yield open_all
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("description", "parts"),
    [
        ("8080", ("tcp", ["8080"], {})),
        ("tcp:8080", ("tcp", ["8080"], {})),
        ("tcp:8080:interface=127.0.0.1", ("tcp", ["8080"], {"interface": "127.0.0.1"})),
        (r"tcp6:1:interface=\:\:1", ("tcp6", ["1"], {"interface": "::1"})),
        (r"unix:/a\:b\\c\=d", ("unix", [r"/a:b\c=d"], {})),
        ("x:a=b=c:d=", ("x", [], {"a": "b=c", "d": ""})),
        ("unix:", ("unix", [""], {})),
    ],
)
def test_descriptions_are_read_as_twisted_reads_them(description, parts) -> None:
    assert split_description(description) == parts
    if ":" in description:
        from twisted.internet.endpoints import _parse

        positional, keywords = _parse(description)
        assert (positional[0], positional[1:], keywords) == parts


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("tcp:", "the port is missing"),
        ("tcp:x", "port 'x' is not a whole number"),
        ("tcp:70000", "port '70000' is not a whole number from 0 to 65535"),
        ("tcp:1:2.3.4.5:6:7", "too many parts: '7'"),
        ("tcp:1:bogus=2", "unknown keyword 'bogus'"),
        ("tcp:1:port=2", "port is given twice"),
        ("tcp:1:backlog=0", "backlog '0'"),
        ("tcp:0:interface=203.0.113.1", "cannot listen on 203.0.113.1:0"),
        ("tcp:0:interface=no.such.host.invalid", "cannot resolve the interface 'no.such.host.invalid'"),
        ("unix:", "path of the socket is missing"),
        ("unix:/tmp/x:mode=9", "mode '9' is not an octal"),
        ("unix:/no/such/place/x", "cannot open the directory '/no/such/place'"),
        ("systemd:", "exactly one of index= and name="),
        ("systemd:index=0", "no sockets were passed"),
    ],
)
def test_a_bad_description_is_refused_with_what_was_found(description, problem) -> None:
    with pytest.raises(ListenError) as caught:
        open_description(description, backlog=10)
    assert problem in str(caught.value)


def test_a_port_that_is_taken_is_named(opened) -> None:
    (first,) = opened("tcp:0:interface=127.0.0.1")
    port = first.socket.getsockname()[1]
    with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: address already in use"):
        open_description(f"tcp:{port}:interface=127.0.0.1", backlog=10)


@needs_ipv6
@pytest.mark.parametrize("interface", ["", "localhost"])
def test_port_zero_is_one_number_on_both_families(interface) -> None:
    listeners = open_port(0, interface=interface, backlog=10)
    try:
        numbers = {listener.socket.getsockname()[1] for listener in listeners}
        families = [listener.socket.family for listener in listeners]
        assert len(numbers) == 1
        assert families[0] == socket.AF_INET
        if not interface:
            assert families == [socket.AF_INET, socket.AF_INET6]
    finally:
        for listener in listeners:
            listener.close()


@needs_ipv6
def test_tcp_and_tcp6_share_a_port(opened) -> None:
    (four,) = opened("tcp:0")
    port = four.socket.getsockname()[1]
    (six,) = opened(f"tcp6:{port}")
    assert (four.name, six.name) == (f"tcp:0.0.0.0:{port}", f"tcp:[::]:{port}")


def test_sockets_listen_without_blocking(opened) -> None:
    (listener,) = opened("tcp:0:interface=127.0.0.1")
    assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert not listener.socket.getblocking()
    assert not os.get_inheritable(listener.socket.fileno())


def test_a_unix_socket_has_its_mode_and_goes_with_its_listener(opened, tmp_path) -> None:
    path = tmp_path / "s"
    (listener,) = opened(f"unix:{path}:mode=640")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    listener.close()
    assert not path.exists()


def test_a_stale_unix_socket_is_taken_over(opened, tmp_path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
    (listener,) = opened(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert listener.name == f"unix:{path}"


def test_a_unix_socket_that_somebody_answers_on_is_refused(opened, tmp_path) -> None:
    path = tmp_path / "s"
    opened(f"unix:{path}")
    with pytest.raises(ListenError, match="another process answers on it"):
        opened(f"unix:{path}")
    assert path.exists()


def test_a_file_that_is_no_socket_is_refused_and_kept(opened, tmp_path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        opened(f"unix:{path}")
    assert path.read_text() == "precious"


def test_a_unix_path_that_is_too_long_is_refused(opened, tmp_path) -> None:
    with pytest.raises(ListenError, match="longer than 107 bytes"):
        opened(f"unix:{tmp_path}/{'x' * 108}")


def test_a_successors_socket_file_is_left_alone(opened, tmp_path) -> None:
    path = tmp_path / "s"
    (first,) = opened(f"unix:{path}")
    path.unlink()
    opened(f"unix:{path}")
    first.close()
    assert path.exists()
