"""The supervisor links workers that use the hub, and kills those that cannot be linked."""

import errno
import os
import signal
import socket
from typing import Any

import pytest

from rtservice.hub.roster import Gone, NewLink, Welcome, receive
from rtservice.pool import mesh_links
from rtservice.pool.control import LINK_CHANNEL, encode
from rtservice.pool.mesh_links import LinkChannel, MeshLinks
from tests.support.fake_reactor import FakeReactor


class End:
    """A worker's end of a link channel."""

    def __init__(self, channel: LinkChannel) -> None:
        self.socket = socket.socket(fileno=channel.inherited.detach())
        self.socket.setblocking(False)

    def read(self) -> list[Any]:
        """Return all datagrams."""
        found: list[Any] = []
        while True:
            try:
                datagram = receive(self.socket)
            except BlockingIOError:
                return found
            if datagram is None:
                return [*found, None]
            found.append(datagram)


@pytest.fixture
def channels() -> Any:
    made = [LinkChannel(FakeReactor()) for _ in range(3)]
    ends = [End(channel) for channel in made]
    yield list(zip(made, ends, strict=True))
    for channel, end in zip(made, ends, strict=True):
        channel.close()
        end.socket.close()


def is_closed(link: NewLink) -> bool:
    with link.socket:
        link.socket.settimeout(5)
        return link.socket.recv(1) == b""


def test_each_worker_is_linked_with_those_that_joined_before(channels) -> None:
    (first, first_end), (second, second_end), (third, third_end) = channels
    mesh = MeshLinks()
    assert not mesh.add(first)
    assert first_end.read() == [Welcome(1, 0)]
    assert not mesh.add(second)
    assert not mesh.add(third)
    welcome, to_first = second_end.read()[:2]
    assert welcome == Welcome(2, 1)
    to_second, to_third = first_end.read()
    assert (to_first.peer, to_second.peer, to_third.peer) == (1, 2, 3)
    welcome, *others = third_end.read()
    assert welcome == Welcome(3, 2)
    assert [other.peer for other in others] == [1, 2]
    to_first.socket.sendall(b"hello")
    assert to_second.socket.recv(100) == b"hello"
    # The supervisor has no copy: the end of one worker is an end of file for the other.
    to_first.socket.close()
    assert is_closed(to_second)
    for link in (to_third, *others):
        link.socket.close()


def test_other_workers_are_notified_when_a_worker_has_ended(channels) -> None:
    (first, _), (second, second_end), _ = channels
    mesh = MeshLinks()
    mesh.add(first)
    mesh.add(second)
    mesh.remove(first)
    _, link, gone = second_end.read()
    assert gone == Gone(1)
    link.socket.close()
    mesh.remove(second)
    assert second_end.read() == [None]


def test_links_that_a_worker_does_not_take_are_sent_later(channels) -> None:
    (first, first_end), (second, second_end), (third, _) = channels
    mesh = MeshLinks()
    mesh.add(first)
    while not first._unsent:  # the socket is full
        first.send(b"\x02" + bytes(16))
    assert first._reactor.writers == {first}
    mesh.add(second)
    first_end.read()
    assert first.doWrite() is None
    assert not first._reactor.writers
    [*_, link] = first_end.read()
    _, other = second_end.read()
    link.socket.sendall(b"hello")
    assert other.socket.recv(10) == b"hello"
    link.socket.close()
    other.socket.close()
    third.close()


def test_links_of_a_worker_that_is_killed_before_it_takes_them_end(channels) -> None:
    (first, _), (second, second_end), _ = channels
    mesh = MeshLinks()
    mesh.add(first)
    while not first._unsent:
        first.send(b"\x02" + bytes(16))
    mesh.add(second)
    mesh.remove(first)
    _, link, gone = second_end.read()
    assert is_closed(link)
    assert gone == Gone(1)


def test_a_worker_that_has_stopped_its_hub_is_not_linked(channels) -> None:
    (first, first_end), (second, second_end), _ = channels
    mesh = MeshLinks()
    mesh.add(first)
    first_end.socket.close()
    mesh.add(second)
    assert first.closed
    _, link = second_end.read()
    assert is_closed(link)


def test_a_worker_that_has_ended_cannot_join(channels) -> None:
    (first, _), (second, second_end), _ = channels
    mesh = MeshLinks()
    mesh.remove(first)
    mesh.add(first)
    mesh.add(second)
    assert second_end.read() == [Welcome(1, 0)]


# --- in the pool ---


def asks(process: Any) -> End:
    """Let a process ask for its links."""
    end = End.__new__(End)
    end.socket = process.link_end
    end.socket.setblocking(False)
    process.says("mesh")
    return end


def test_workers_of_a_pool_are_linked_until_their_processes_end(world) -> None:
    running = world(2)
    first, second = running.serve()
    assert LINK_CHANNEL in first.descriptors
    first_end, second_end = asks(first), asks(second)
    assert first_end.read()[0] == Welcome(1, 0)
    welcome, link = second_end.read()
    assert welcome == Welcome(2, 1)
    link.socket.close()
    first.exits(killed=signal.SIGKILL)  # before its pipes are closed
    assert second_end.read() == [Gone(1)]


def test_a_worker_that_another_one_reports_is_killed(world) -> None:
    running = world(2)
    first, second = running.serve()
    asks(first)
    asks(second)
    first.says("peer", {"incarnation": 2, "problem": "does not read its link"})
    assert second.killed
    assert not first.killed
    [event] = running.recorded("worker.unlinked")
    assert event["pid"] == second.pid
    assert event["problem"] == f"worker 0 (pid {first.pid}) reports that it does not read its link"


@pytest.mark.parametrize("incarnation", [0, 1, 3])
def test_a_report_about_no_other_worker_has_no_effect(world, incarnation) -> None:
    running = world(2)
    first, second = running.serve()
    asks(first)
    asks(second)
    first.says("peer", {"incarnation": incarnation, "problem": "does not read its link"})
    assert not first.killed
    assert not second.killed


def test_a_worker_is_killed_if_there_are_no_descriptors_for_its_links(world, monkeypatch) -> None:
    running = world(2)
    first, second = running.serve()
    asks(first)

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(mesh_links.socket, "socketpair", refuse)
    asks(second)
    monkeypatch.undo()
    assert second.killed
    assert not first.killed
    assert running.recorded("worker.unlinked", pid=second.pid, problem="no socket can be created: Too many open files")


def test_a_worker_that_does_not_read_its_link_channel_is_killed(world, monkeypatch) -> None:
    running = world(2)
    first, second = running.serve()
    asks(first)
    channel = first.protocol.link_channel
    while not channel.full:
        channel.send(b"\x02" + bytes(16))
    asks(second)
    assert first.killed
    assert not second.killed


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (encode("mesh", 1), "a message 'mesh' with an invalid value"),
        (encode("mesh") * 2, "a second message 'mesh'"),
        (encode("peer"), "a message 'peer' that is not an object of incarnation and problem"),
        (encode("peer", {"incarnation": -1, "problem": ""}), "a message 'peer' with an invalid value"),
        (encode("peer", {"incarnation": 1, "problem": 1}), "a message 'peer' with an invalid value"),
        (encode("peer", {"incarnation": 1, "problem": "x" * 201}), "a message 'peer' with an invalid value"),
        (encode("peer", {"incarnation": 1, "problem": ""}), "an unexpected message 'peer'"),
        (encode("mesh") + encode("peer", {"incarnation": 9, "problem": ""}) * 101, "an unexpected message 'peer'"),
    ],
)
def test_a_message_that_violates_the_protocol_ends_the_worker(world, message, problem) -> None:
    running = world(2)
    first, _ = running.serve()
    first.writes(message)
    running.reactor.advance(0)
    assert first.killed
    assert running.recorded("worker.violation", problem=problem)
