"""A mesh of workers in one process, with real sockets: what each event does to messages, members and claims."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.python.failure import Failure

from rtservice.hub import link as link_module
from rtservice.hub.frames import FrameKind, encode_frame
from rtservice.interfaces import HubFull, HubUnavailable
from tests.support.mesh_world import MeshWorker, MeshWorld


class Receiver:
    """Records what it receives."""

    def __init__(self, worker: MeshWorker, topic: str = "room") -> None:
        self.got: list[Any] = []
        self.subscription = results(worker.hub.subscribe(topic, self))

    def received(self, topic: str, message: bytes) -> None:
        self.got.append(message)

    def gap(self, topic: str) -> None:
        self.got.append(None)


def results(deferred: Any) -> list[Any]:
    """Return a list that gets the result."""
    found: list[Any] = []
    deferred.addBoth(found.append)
    return found


def failed(found: list[Any], kind: type[Exception]) -> bool:
    [failure] = found
    return isinstance(failure, Failure) and failure.check(kind) is not None


@pytest.fixture
def world() -> Iterator[MeshWorld]:
    world = MeshWorld()
    yield world
    world.close()


def test_operations_wait_until_the_worker_is_linked(world) -> None:
    worker = world.spawn()
    receiver = Receiver(worker)
    published, joined = results(worker.hub.publish("room", b"1")), results(worker.hub.join("room", b"ann"))
    members, claim = results(worker.hub.members("room")), results(worker.hub.claim("nick", b"ann"))
    assert not any((receiver.subscription, published, joined, members, claim, worker.hub.up))
    world.settle()
    assert all((receiver.subscription, published, joined, members, claim, worker.hub.up))
    assert receiver.got == [b"1"]
    assert members[0].members == (b"ann",)


def test_a_message_goes_only_to_workers_that_want_its_topic(world) -> None:
    first, second, third = world.spawn_all(3)
    receiver = Receiver(second)
    world.settle()
    first.hub.publish("room", b"1")
    first.hub.publish("other", b"2")
    world.settle()
    assert receiver.got == [b"1"]
    assert [worker.hub.counters()["received"] for worker in (first, second, third)] == [0, 1, 0]
    receiver.subscription[0].cancel()
    world.settle()
    first.hub.publish("room", b"3")
    world.settle()
    assert second.hub.counters()["received"] == 1


def test_messages_of_one_turn_are_sent_with_one_call(world, monkeypatch) -> None:
    first, second = world.spawn_all(2)
    receiver = Receiver(second)
    world.settle()
    for number in range(100):
        first.hub.publish("room", b"%d" % number)
    [writer] = first.reactor.writers
    first.reactor.call(writer, "doWrite")
    assert not first.reactor.writers
    world.settle()
    assert receiver.got == [b"%d" % number for number in range(100)]


def test_a_subscription_is_active_when_each_worker_knows_it(world) -> None:
    first, second = world.spawn_all(2)
    receiver = Receiver(first)
    for _ in range(5):
        first.reactor.turn()
    assert not receiver.subscription
    second.reactor.turn()
    second.hub.publish("room", b"1")  # it knows the topic, although the subscription is not active yet
    world.settle()
    assert receiver.subscription
    assert receiver.got == [b"1"]


def test_a_worker_that_does_not_answer_delays_a_subscription_by_two_seconds(world) -> None:
    first, hung = world.spawn_all(2)
    receiver = Receiver(first)
    joined = results(first.hub.join("room", b"ann"))
    first.reactor.turn()
    first.reactor.advance(1.9)
    assert not receiver.subscription
    assert not joined
    first.reactor.advance(0.2)
    assert receiver.subscription
    assert joined
    hung.hub.publish("room", b"lost")  # it has not read the subscription
    assert receiver.got == []
    world.settle()
    hung.hub.publish("room", b"1")
    world.settle()
    assert receiver.got == [None, b"1"]


def test_a_worker_that_stops_before_it_has_answered_causes_a_gap(world) -> None:
    first, slow = world.spawn_all(2)
    receiver = Receiver(first)
    first.reactor.turn()
    first.reactor.advance(3)
    assert receiver.subscription
    slow.hub.publish("room", b"lost")
    world.stop(slow)
    world.settle()
    assert receiver.got == [None]


def test_a_worker_is_up_without_one_that_does_not_answer(world) -> None:
    first, hung = world.spawn_all(2)
    receiver = Receiver(hung)
    world.settle()
    third = world.spawn()
    late = Receiver(third)
    for _ in range(5):
        first.reactor.turn()
        third.reactor.turn()
    claim = results(third.hub.claim("nick", b"ann"))
    third.reactor.advance(1.9)
    assert not third.hub.up
    third.reactor.advance(0.2)
    assert third.hub.up
    third.hub.publish("room", b"lost")
    third.reactor.advance(2.1)
    assert late.subscription
    assert not claim  # claims need the answers of all
    world.settle()
    assert None in receiver.got
    assert None in late.got
    assert b"lost" not in receiver.got
    assert claim[0] is not None
    third.hub.publish("room", b"1")
    hung.hub.publish("room", b"2")
    world.settle()
    assert receiver.got[-2:] in ([b"1", b"2"], [b"2", b"1"])
    assert set(late.got[-3:]) >= {b"1", b"2"}


def test_a_worker_that_dies_causes_a_gap_and_loses_its_members_and_claims(world) -> None:
    first, second = world.spawn_all(2)
    receiver = Receiver(second)
    first.hub.join("room", b"ann")
    claim = results(first.hub.claim("nick", b"ann"))
    world.settle()
    assert claim[0] is not None
    first.hub.publish("room", b"not sent")
    world.kill(first)
    world.settle()
    assert receiver.got == [None]
    members, again = results(second.hub.members("room")), results(second.hub.claim("nick", b"bob"))
    assert members[0].total == 0
    assert again[0] is not None


def test_a_worker_that_stops_sends_everything_and_causes_no_gap(world) -> None:
    first, second = world.spawn_all(2)
    receiver = Receiver(second)
    first.hub.join("room", b"ann")
    world.settle()
    for number in range(1000):
        first.hub.publish("room", b"%d" % number)
    world.stop(first)
    world.settle()
    assert receiver.got == [b"%d" % number for number in range(1000)]
    assert results(second.hub.members("room"))[0].total == 0


def test_a_stop_waits_two_seconds_for_a_worker_that_does_not_read(world) -> None:
    first, hung = world.spawn_all(2)
    receiver = Receiver(hung)
    world.settle()
    for _ in range(3):
        first.hub.publish("room", bytes(1024 * 1024))
    waiting = results(first.hub.subscribe("other", receiver))
    stopped = results(first.hub.stop())
    for _ in range(10):
        first.reactor.turn()
    assert not stopped
    assert failed(waiting, HubUnavailable)
    first.reactor.advance(2)
    assert stopped == [None]
    assert not first.reactor.readers
    assert not first.reactor.writers
    world.kill(first)
    world.settle()
    assert receiver.got[-1] is None


def test_an_operation_in_progress_fails_when_the_hub_stops(world) -> None:
    worker = world.spawn()
    receiver = Receiver(worker)
    found = [
        receiver.subscription,
        results(worker.hub.join("room", b"ann")),
        results(worker.hub.members("room")),
        results(worker.hub.publish("room", b"1")),
        results(worker.hub.claim("nick", b"ann")),
    ]
    world.stop(worker)
    assert all(failed(each, HubUnavailable) for each in found)


def test_too_many_messages_before_the_start_are_rejected(world) -> None:
    worker = world.spawn()
    accepted = [results(worker.hub.publish("room", bytes(1024 * 1024))) for _ in range(4)]
    assert failed(results(worker.hub.publish("room", b"1")), HubFull)
    world.settle()
    assert accepted == [[None]] * 4


def test_a_claim_without_an_answer_fails_and_is_released(world) -> None:
    _, first, second = world.spawn_all(3)
    claim = results(first.hub.claim("nick", b"ann"))
    for _ in range(5):
        first.reactor.turn()
    first.reactor.advance(9.9)
    assert not claim
    first.reactor.advance(0.2)
    assert failed(claim, HubUnavailable)
    world.settle()
    again = results(second.hub.claim("nick", b"bob"))
    world.settle()
    assert again[0] is not None


def test_messages_for_a_worker_that_does_not_read_are_dropped_with_a_gap(world) -> None:
    first, slow = world.spawn_all(2)
    receiver, other = Receiver(slow), Receiver(slow, "other")
    world.settle()
    for _ in range(8):
        first.hub.publish("room", bytes(1024 * 1024))
        first.reactor.turn()
    first.hub.publish("other", b"1")
    dropped = first.hub.counters()["dropped"]
    assert 0 < dropped < 8
    world.settle()
    first.hub.publish("room", b"last")
    world.settle()
    assert receiver.got == [bytes(1024 * 1024)] * (8 - dropped) + [None, b"last"]
    assert other.got == [b"1"]


def test_a_worker_that_reads_no_control_frames_is_reported_once(world, monkeypatch) -> None:
    first, hung = world.spawn_all(2)
    monkeypatch.setattr(link_module, "MOST_CONTROL", 100_000)
    members = [results(first.hub.join("room", bytes(1024))) for _ in range(400)]
    assert first.reports == [(2, "does not read its link")]
    first.reactor.advance(0)
    assert all(members)  # it delays nothing
    world.kill(hung)
    world.settle()
    assert first.hub.counters()["links"] == 0
    assert first.reports == [(2, "does not read its link")]


def test_a_worker_that_sends_an_invalid_frame_is_reported_and_not_heard_until_its_end(world) -> None:
    first, mad = world.spawn_all(2)
    receiver = Receiver(first)
    claim = results(mad.hub.claim("nick", b"mad"))
    world.settle()
    assert claim[0] is not None
    link = mad.carrier._peers[1].link
    link.send(b"\xff" * 14)
    mad.hub.publish("room", b"1")
    world.settle()
    assert first.reports == [(2, "sent a frame of the unknown kind 255")]
    assert receiver.got == []
    assert results(first.hub.claim("nick", b"ann")) == [None]  # it lives, and holds its claims
    world.kill(mad)
    world.settle()
    assert receiver.got == [None]
    assert results(first.hub.claim("nick", b"ann"))[0] is not None


def test_the_end_of_a_process_is_noticed_although_its_child_has_copies_of_its_sockets(world) -> None:
    first, forked = world.spawn_all(2)
    receiver = Receiver(first)
    world.settle()
    copies = [os.dup(reader.fileno()) for reader in forked.reactor.readers]
    forked.hub.publish("room", b"1")
    forked.reactor.turn()
    world.kill(forked)
    world.settle()
    assert receiver.got == [b"1", None]
    assert first.hub.counters()["links"] == 0
    for copy in copies:
        os.close(copy)


def test_a_socket_that_a_worker_has_not_taken_ends_with_it(world) -> None:
    first = world.spawn_all(1)[0]
    second = world.spawn()
    for _ in range(5):
        second.reactor.turn()
    assert not second.hub.up
    world.kill(first)  # it never received the socket
    for _ in range(5):
        second.reactor.turn()
    assert second.hub.up
    assert results(second.hub.claim("nick", b"ann"))[0] is not None


def test_a_worker_that_stops_is_not_linked_with_new_ones(world) -> None:
    first = world.spawn_all(1)[0]
    first.hub.stop()
    second = world.spawn()
    for _ in range(5):
        second.reactor.turn()
    assert second.hub.up


def test_a_large_snapshot_is_sent_in_portions(world) -> None:
    first = world.spawn_all(1)[0]
    for number in range(10_000):
        first.hub.join("room", b"%d" % number)
    world.settle()
    second = world.spawn()
    first.reactor.turn()
    [writer] = first.reactor.writers
    first.hub.join("room", b"later")
    first.reactor.call(writer, "doWrite")
    assert first.reactor.writers
    assert not second.hub.up
    world.settle()
    members = results(second.hub.members("room"))
    assert members[0].total == 10_001
    assert len(members[0].members) == 1000


def test_a_worker_without_a_descriptor_for_a_link_fails(world, monkeypatch) -> None:
    world.spawn_all(1)
    second = world.spawn()
    receive = socket.socket.recvmsg

    def truncated(sock: Any, *arguments: Any) -> Any:
        data, _, flags, address = receive(sock, data_size := arguments[0], 0, *arguments[2:])
        assert len(data) <= data_size
        return data, [], flags, address

    class Truncating(socket.socket):
        recvmsg = truncated

    second.carrier._roster._channel = Truncating(fileno=second.carrier._roster._channel.detach())
    second.reactor.removeReader(second.carrier._roster)
    second.reactor.addReader(second.carrier._roster)
    second.reactor.turn()
    second.reactor.turn()
    assert second.failures == ["no free descriptor for a link to another worker; raise the limit of open files"]


def test_an_answer_without_a_question_is_ignored(world) -> None:
    first, second = world.spawn_all(2)
    [peer] = first.carrier._peers.values()
    for kind in (FrameKind.SYNCED, FrameKind.GRANT, FrameKind.DENY, FrameKind.HELD_END, FrameKind.SNAPSHOT_READ):
        peer.link.send(encode_frame(kind, 99))
    peer.link.send(encode_frame(FrameKind.LEAVE, 99, "room"))
    peer.link.send(encode_frame(FrameKind.RELEASE, 99, "nick"))
    world.settle()
    assert second.hub.counters()["links"] == 1
    assert results(second.hub.claim("nick", b"ann")) is not None
