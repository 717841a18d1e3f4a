"""A listener with one socket per process (slot): the distribution of clients, and adding and removing slots."""

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest

from rtservice.net import listener as listener_module
from rtservice.net import tcp
from rtservice.net.description import ListenError
from rtservice.net.listen_types import open_description, open_port
from rtservice.net.listener import RESERVE_SOCKETS, Listener
from tests.support.ipv6 import needs_ipv6

interfaces = pytest.mark.parametrize("interface", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])


@pytest.fixture
def opened() -> Iterator[Callable[..., Listener]]:
    """Open a port with a number of slots; it is closed after the test."""
    made: list[Listener] = []

    def open_slots(slots: int, interface: str = "127.0.0.1", backlog: int = 1000) -> Listener:
        [listener] = open_port(0, interface=interface, backlog=backlog, slots=slots)
        made.append(listener)
        return listener

    yield open_slots
    for listener in made:
        listener.close()


@pytest.fixture
def connect() -> Iterator[Callable[[Listener, int], list[socket.socket]]]:
    """Connect a number of clients to a listener."""
    with contextlib.ExitStack() as stack:

        def clients(listener: Listener, count: int) -> list[socket.socket]:
            address = listener.socket.getsockname()
            made = []
            for _ in range(count):
                # From another address: with equal addresses, the kernel may choose the server's port for the client.
                source = ("127.0.0.2", 0) if listener.socket.family == socket.AF_INET else None
                made.append(stack.enter_context(socket.create_connection(address[:2], 10, source)))
            return made

        yield clients


def accept_all(sock: socket.socket) -> int:
    """Accept all clients in the backlog of a socket; return their number."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.accept()[0].close()
            count += 1
    return count


def queued(listener: Listener) -> list[int]:
    return [accept_all(sock) for sock in listener.slot_sockets]


@interfaces
def test_each_slot_has_a_separate_socket_on_the_same_address(opened, interface) -> None:
    listener = opened(3, interface)
    assert len({sock.fileno() for sock in listener.slot_sockets}) == 3
    assert len({sock.getsockname() for sock in listener.slot_sockets}) == 1
    assert [listener.of_slot(slot) for slot in range(3)] == listener.slot_sockets
    assert listener.socket is listener.slot_sockets[0]
    assert not any(
        sock.getblocking() or sock.get_inheritable() for sock in (*listener.slot_sockets, *listener.reserve_sockets)
    )


def leave_out_last(listener) -> None:
    listener.balance_over(range(len(listener.slot_sockets) - 1))


@interfaces
def test_clients_are_distributed_over_all_slots(opened, connect, interface) -> None:
    listener = opened(4, interface)
    connect(listener, 400)
    found = queued(listener)
    assert sum(found) == 400
    # Each slot has 100 clients on average, with a standard deviation of 9.
    assert all(50 <= count <= 150 for count in found), found


@interfaces
def test_the_last_slot_can_be_left_out_and_keeps_its_queued_clients(opened, connect, interface) -> None:
    listener = opened(3, interface)
    connect(listener, 90)
    leave_out_last(listener)
    connect(listener, 90)
    first, second, last = listener.slot_sockets
    assert 10 <= accept_all(last) <= 60  # a third of the first ninety
    connect(listener, 90)
    assert accept_all(last) == 0
    assert accept_all(first) + accept_all(second) > 180


@interfaces
def test_dropping_a_slot_that_was_left_out_loses_no_client(opened, connect, interface) -> None:
    listener = opened(3, interface)
    connect(listener, 60)
    leave_out_last(listener)
    accepted = accept_all(listener.slot_sockets[2])
    listener.remove_slot()
    assert len(listener.slot_sockets) == 2
    connect(listener, 100)
    found = queued(listener)
    assert sum(found) == 60 - accepted + 100
    assert all(count > 20 for count in found), found


def test_slots_can_be_removed_until_one_remains(opened, connect) -> None:
    listener = opened(4)
    for left in (3, 2, 1):
        leave_out_last(listener)
        listener.remove_slot()
        connect(listener, 60)
        found = queued(listener)
        assert len(found) == left
        assert sum(found) == 60
        assert all(found), found


def test_an_added_slot_receives_its_share_of_clients(opened, connect) -> None:
    listener = opened(1)
    connect(listener, 10)
    spares = len(listener.reserve_sockets)
    listener.add_slot()
    assert len(listener.reserve_sockets) == spares - 1
    connect(listener, 100)
    found = queued(listener)
    assert sum(found) == 110
    assert found[1] > 20


def test_a_slot_can_be_added_after_one_was_removed(opened, connect) -> None:
    listener = opened(3)
    leave_out_last(listener)
    listener.remove_slot()
    listener.add_slot()
    listener.balance_over([0, 1, 2])
    connect(listener, 150)
    found = queued(listener)
    assert sum(found) == 150
    assert all(count > 20 for count in found), found


def test_slots_can_be_added_after_all_spares_are_used(opened, connect) -> None:
    listener = opened(1)
    for _ in range(RESERVE_SOCKETS + 2):
        listener.add_slot()
    assert listener.reserve_sockets == []
    count = 40 * len(listener.slot_sockets)
    connect(listener, count)
    found = queued(listener)
    assert sum(found) == count
    assert all(found), found


def test_spare_sockets_receive_no_clients(opened, connect) -> None:
    listener = opened(2)
    connect(listener, 50)
    for spare in listener.reserve_sockets:
        with pytest.raises(OSError, match="Invalid argument") as refused:  # a spare does not listen
            spare.accept()
        assert refused.value.errno == errno.EINVAL
    assert sum(queued(listener)) == 50


def test_undoing_a_failed_slot_addition_loses_no_client(opened, connect) -> None:
    listener = opened(2)
    listener.add_slot()
    listener.remove_slot()  # without leaving it out first
    connect(listener, 100)
    found = queued(listener)
    assert sum(found) == 100
    assert all(count > 20 for count in found), found


def test_a_slot_that_cannot_be_bound_is_an_error_naming_the_address(opened, monkeypatch) -> None:
    listener = opened(1)
    for spare in listener.reserve_sockets:
        spare.close()
    listener.reserve_sockets.clear()

    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listener_module, "bind", refuse)
    with pytest.raises(ListenError, match=r"cannot listen on 127\.0\.0\.1:\d+: permission denied"):
        listener.add_slot()
    assert len(listener.slot_sockets) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user")
@interfaces
def test_an_unprivileged_user_can_add_as_many_slots_as_there_are_spares(opened, connect, interface) -> None:
    listener = opened(1, interface)
    os.seteuid(65534)
    try:
        for _ in range(RESERVE_SOCKETS):
            listener.add_slot()
        with pytest.raises(ListenError) as refused:
            listener.add_slot()
        listener.remove_slot()
        listener.add_slot()  # the spare that was returned
    finally:
        os.seteuid(0)
    assert str(refused.value) == (
        f"{listener.name} has no reserve socket left: 8 were bound at the start, before privileges were dropped; "
        "restart with more --workers"
    )
    count = 40 * len(listener.slot_sockets)
    connect(listener, count)
    assert sum(queued(listener)) == count


def test_a_slot_that_cannot_listen_leaves_no_socket_open(opened, monkeypatch) -> None:
    listener = opened(1)
    [spare] = listener.reserve_sockets[-1:]

    def refuse(sock, backlog):
        raise ListenError("cannot listen")

    monkeypatch.setattr(listener_module, "start_listening", refuse)
    with pytest.raises(ListenError):
        listener.add_slot()
    assert spare.fileno() == -1
    assert len(listener.slot_sockets) == 1


@interfaces
def test_a_port_shared_by_another_listener_is_rejected(interface) -> None:
    family = socket.AF_INET6 if ":" in interface else socket.AF_INET
    with socket.socket(family) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((interface, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on .*{port}: address already in use"):
            open_port(port, interface=interface, backlog=10, slots=2)


def test_two_services_with_slots_get_different_ports(opened) -> None:
    port = opened(2).socket.getsockname()[1]
    with pytest.raises(ListenError, match="address already in use"):
        open_port(port, interface="127.0.0.1", backlog=10, slots=2)


@needs_ipv6
def test_both_address_families_have_slots_on_the_same_port() -> None:
    listeners = open_port(0, interface="", backlog=10, slots=2)
    try:
        assert [len(listener.slot_sockets) for listener in listeners] == [2, 2]
        assert len({sock.getsockname()[1] for listener in listeners for sock in listener.slot_sockets}) == 1
        families = [listener.socket.family for listener in listeners]
        assert families == [socket.AF_INET, socket.AF_INET6]
    finally:
        for listener in listeners:
            listener.close()


def test_every_slot_has_the_configured_backlog(opened) -> None:
    listener = opened(2, backlog=1)
    listener.add_slot()
    address = listener.socket.getsockname()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(60)]
        for client in clients:
            client.setblocking(False)
            assert client.connect_ex(address) in (0, errno.EINPROGRESS)
        _, connected, _ = select.select([], clients, [], 0)
        # Linux queues one more than the backlog; with a full queue, clients retransmit their SYN.
        assert len(connected) <= 6
        assert sum(queued(listener)) <= 6


def test_close_closes_all_sockets(opened) -> None:
    listener = opened(2)
    sockets = [listener.socket, *listener.slot_sockets, *listener.reserve_sockets]
    listener.close()
    assert [sock.fileno() for sock in sockets] == [-1] * len(sockets)


def test_a_bind_error_leaves_no_socket_open(monkeypatch) -> None:
    made: list[socket.socket] = []
    bind = tcp.bind

    def bind_some(*arguments, **keywords):
        if len(made) == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(bind(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(tcp, "bind", bind_some)
    with pytest.raises(ListenError, match="too many open files"):
        open_port(0, interface="127.0.0.1", backlog=10, slots=4)
    assert [sock.fileno() for sock in made] == [-1] * 3


def test_all_slots_share_one_unix_socket(tmp_path) -> None:
    [listener] = open_description(f"unix:{tmp_path}/rt.sock", backlog=10, slots=3)
    try:
        assert [listener.of_slot(slot) for slot in range(3)] == [listener.socket] * 3
        listener.add_slot()
        listener.balance_over([0, 1])
        listener.remove_slot()
        assert listener.socket.fileno() != -1
        inode = (tmp_path / "rt.sock").stat().st_ino
        assert listener.file == (f"{tmp_path}/rt.sock", inode)
    finally:
        listener.close()
    assert not (tmp_path / "rt.sock").exists()
    assert listener.file is None


def test_queued_clients_survive_the_end_of_their_worker(opened, connect) -> None:
    listener = opened(2)
    connect(listener, 40)
    for sock in listener.slot_sockets:
        sock.dup().close()  # as at the end of a worker
    assert sum(queued(listener)) == 40
