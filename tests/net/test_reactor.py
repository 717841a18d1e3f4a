"""The reactor honours Twisted's contract with each descriptor, regardless of the others in a batch of events."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet import error, main
from twisted.logger import globalLogPublisher
from twisted.python import log
from twisted.python.context import call, theContextTracker
from twisted.python.failure import Failure

if sys.platform != "linux":
    pytest.skip("the reactor needs epoll(7)", allow_module_level=True)

from rtservice.net.reactor import Reactor


class Descriptor:
    """One end of a socket pair that is readable until it reads."""

    def __init__(self, reactor: Reactor, name: str = "some descriptor") -> None:
        self.reactor = reactor
        self.name = name
        self.socket, self.peer = socket.socketpair()
        self.socket.setblocking(False)
        self.peer.send(b"x")
        self.reads = self.writes = 0
        self.lost: list[Failure] = []
        self.on_read: Callable[[], Any] = lambda: None
        self.on_write: Callable[[], Any] = lambda: None
        self.on_lost: Callable[[], Any] = lambda: None
        self.fileno = self.socket.fileno

    def doRead(self) -> Any:
        self.reads += 1
        return self.on_read()

    def doWrite(self) -> Any:
        self.writes += 1
        return self.on_write()

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)
        self.on_lost()

    def logPrefix(self) -> str:
        return self.name

    def close(self) -> None:
        self.socket.close()
        self.peer.close()


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    instance = Reactor()
    yield instance
    for reader in instance.removeAll():
        if isinstance(reader, Descriptor):
            reader.close()
    for reader in set(instance._internalReaders):
        instance._internalReaders.discard(reader)
        reader.connectionLost(None)
    instance._poller.close()


@pytest.fixture
def events() -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(seen.append)
    yield seen
    globalLogPublisher.removeObserver(seen.append)


def make(reactor: Reactor, *names: str) -> list[Descriptor]:
    made = [Descriptor(reactor, name) for name in names]
    for descriptor in made:
        reactor.addReader(descriptor)
    return made


def raise_error() -> None:
    raise ValueError("boom")


def tracebacks(events: list[dict[str, Any]]) -> list[str]:
    return [str(event["failure"].value) for event in events if event.get("failure") is not None]


def test_each_ready_descriptor_is_read_once_per_batch(reactor) -> None:
    made = make(reactor, "a", "b", "c")
    reactor.doIteration(0)
    assert [descriptor.reads for descriptor in made] == [1, 1, 1]
    reactor.doIteration(0)
    assert [descriptor.reads for descriptor in made] == [2, 2, 2]


def watched(reactor: Reactor) -> list[Any]:
    return [*reactor.getReaders(), *reactor.getWriters()]


class Replacement(Descriptor):
    """Another descriptor of the same socket."""

    def __init__(self, of: Descriptor, name: str) -> None:
        vars(self).update(vars(of))
        self.name = name
        self.reads = self.writes = 0


def test_a_replacement_descriptor_receives_the_next_events(reactor) -> None:
    (first,) = make(reactor, "first")
    second = Replacement(first, "second")
    prefixes: list[str] = []
    second.on_read = lambda: prefixes.append(theContextTracker.getContext(log.ILogContext)["system"])

    def exchange() -> None:
        reactor.exchange(first, second)

    first.on_read = exchange
    reactor.addWriter(first)
    reactor.doIteration(0)
    assert (first.reads, first.writes, second.reads) == (1, 1, 0)  # the rest of an event goes to the first descriptor
    reactor.doIteration(0)
    assert (first.reads, first.writes) == (1, 1)
    assert (second.reads, second.writes) == (1, 1)
    assert prefixes == ["second"]
    assert [each for each in watched(reactor) if isinstance(each, Descriptor)] == [second, second]
    reactor.removeWriter(second)
    reactor.removeReader(second)
    assert not any(isinstance(each, Descriptor) for each in watched(reactor))


def test_replacing_an_unregistered_descriptor_registers_nothing(reactor) -> None:
    (first,) = make(reactor, "first")
    reactor.removeReader(first)
    reactor.exchange(first, Replacement(first, "second"))
    reactor.doIteration(0)
    assert not any(isinstance(each, Descriptor) for each in watched(reactor))
    first.close()


def test_replacing_a_descriptor_makes_no_system_call(reactor, monkeypatch) -> None:
    (first,) = make(reactor, "first")
    poller, calls = reactor._poller, []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(poller, name)

    monkeypatch.setattr(reactor, "_poller", Counting())
    second = Replacement(first, "second")
    reactor.exchange(first, second)
    reactor.addReader(second)
    assert calls == []


@pytest.mark.parametrize("method", ["on_read", "on_write"])
def test_an_exception_in_a_handler_is_logged_and_ends_only_its_descriptor(reactor, events, method) -> None:
    bad, good = make(reactor, "bad", "good")
    setattr(bad, method, raise_error)
    reactor.addWriter(bad)
    reactor.doIteration(0)
    reactor.doIteration(0)
    assert [type(reason.value) for reason in bad.lost] == [ValueError]
    assert tracebacks(events) == ["boom"]
    assert (good.reads, good.lost) == (2, [])
    assert bad not in reactor.getReaders() + reactor.getWriters()


def test_an_exception_in_connection_lost_is_logged_and_the_others_continue(reactor, events) -> None:
    made = make(reactor, "a", "b", "c")
    for descriptor in made:
        descriptor.on_read, descriptor.on_lost = (lambda: main.CONNECTION_LOST), raise_error
    reactor.doIteration(0)
    assert [descriptor.reads for descriptor in made] == [1, 1, 1]
    assert tracebacks(events) == ["boom"] * 3


def test_the_return_value_of_do_read_is_the_reason_of_connection_lost(reactor) -> None:
    done, lost = make(reactor, "done", "lost")
    done.on_read = lambda: main.CONNECTION_DONE
    lost.on_read = lambda: main.CONNECTION_LOST
    reactor.doIteration(0)
    assert done.lost[0].type is error.ConnectionDone
    assert lost.lost[0].type is error.ConnectionLost


def test_a_descriptor_closed_earlier_in_the_batch_receives_no_event(reactor) -> None:
    first, second = make(reactor, "first", "second")

    def close_the_other(own: Descriptor, other: Descriptor) -> None:
        if not own.lost:
            reactor.removeReader(other)
            other.close()
            other.lost.append(Failure(error.ConnectionDone()))

    first.on_read = lambda: close_the_other(first, second)
    second.on_read = lambda: close_the_other(second, first)
    reactor.doIteration(0)
    assert first.reads + second.reads == 1


def test_a_descriptor_number_reused_within_a_batch_belongs_to_its_new_owner(reactor) -> None:
    first, second = make(reactor, "first", "second")
    new: list[Descriptor] = []

    def replace(other: Descriptor) -> None:
        if new:
            return
        number = other.fileno()
        reactor.removeReader(other)
        other.close()
        successor = Descriptor(reactor, "successor")
        if successor.fileno() != number:
            os.dup2(successor.fileno(), number)
            successor.fileno = lambda: number
        # The successor is readable: reading it is right, reading the old owner never is.
        reactor.addReader(successor)
        new.append(successor)

    first.on_read = lambda: replace(second)
    second.on_read = lambda: replace(first)
    reactor.doIteration(0)
    reactor.doIteration(0)
    assert min(first.reads, second.reads) == 0
    assert new[0].reads >= 1


def test_a_descriptor_without_a_number_is_lost_without_a_busy_loop(reactor) -> None:
    (descriptor,) = make(reactor, "one")
    number = descriptor.fileno()
    descriptor.fileno = lambda: -1
    reactor.doIteration(0)
    assert descriptor.reads == 0
    assert descriptor.lost[0].type is error.ConnectionFdescWentAway
    assert number not in reactor._selectables


def test_a_disconnected_peer_is_reported_to_readers_and_writers(reactor) -> None:
    reading, writing = Descriptor(reactor), Descriptor(reactor)
    reactor.addReader(reading)
    reactor.addWriter(writing)
    for descriptor in (reading, writing):
        descriptor.socket.recv(1)
        descriptor.peer.close()
    reading.on_read = lambda: main.CONNECTION_DONE if not reading.socket.recv(1) else None
    reactor.doIteration(0)
    assert reading.lost[0].type is error.ConnectionDone
    assert writing.lost[0].type is error.ConnectionLost


# --- the log context ---


def prefixes(reactor: Reactor) -> list[str]:
    seen: list[str] = []
    for descriptor in make(reactor, "a", "b"):
        descriptor.on_read = lambda: seen.append(theContextTracker.getContext(log.ILogContext)["system"])
    reactor.doIteration(0)
    return seen


def test_the_log_context_of_a_descriptor_is_set_only_during_its_handler(reactor) -> None:
    before = list(theContextTracker.currentContext().contexts)
    assert sorted(prefixes(reactor)) == ["a", "b"]
    assert theContextTracker.currentContext().contexts == before


def test_a_handler_inherits_the_log_context_of_the_reactors_caller(reactor) -> None:
    seen: list[Any] = []
    (descriptor,) = make(reactor, "one")
    descriptor.on_read = lambda: seen.append(theContextTracker.getContext(log.ILogContext))
    call({log.ILogContext: {"system": "outer", "request": 7}}, reactor.doIteration, 0)
    assert seen == [{"system": "one", "request": 7}]


def test_messages_logged_in_a_handler_have_its_prefix(reactor, events) -> None:
    (descriptor,) = make(reactor, "the prefix")
    descriptor.on_read = lambda: log.msg("hello")
    reactor.doIteration(0)
    assert [event["system"] for event in events if event.get("message") == ("hello",)] == ["the prefix"]


def test_a_signal_handler_may_log_while_the_reactor_waits(reactor, events) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: log.msg("signalled"))
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        (descriptor,) = make(reactor, "one")
        descriptor.on_read = lambda: descriptor.socket.recv(1)
        reactor.doIteration(0)
        while timer.is_alive():
            reactor.doIteration(0.3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [event["message"] for event in events if event.get("message")] == [("signalled",)]


def test_an_exception_in_log_prefix_is_harmless(reactor) -> None:
    seen: list[str] = []
    (descriptor,) = make(reactor, "one")
    descriptor.logPrefix = raise_error
    descriptor.on_read = lambda: seen.append(theContextTracker.getContext(log.ILogContext)["system"])
    reactor.doIteration(0)
    assert seen == ["(buggy logPrefix method)"]


def test_a_saved_log_context_stays_that_of_its_descriptor(reactor) -> None:
    kept: list[Any] = []
    (descriptor,) = make(reactor, "one")
    # As the thread pool saves it for calls in another thread.
    descriptor.on_read = lambda: kept.append(theContextTracker.currentContext().contexts[-1])
    reactor.doIteration(0)
    assert kept[0][log.ILogContext]["system"] == "one"
    assert call(kept[0], theContextTracker.getContext, log.ILogContext)["system"] == "one"


# --- write_soon ---


def test_write_soon_writes_once_before_the_reactor_waits(reactor) -> None:
    descriptor = Descriptor(reactor)
    reactor.write_soon(descriptor)
    reactor.doIteration(None)  # without events it would wait indefinitely
    assert descriptor.writes == 1
    reactor.doIteration(0)
    assert descriptor.writes == 1
    assert reactor.getWriters() == []
    descriptor.close()


def test_write_soon_during_a_write_applies_to_the_next_iteration(reactor) -> None:
    descriptor = Descriptor(reactor)
    descriptor.on_write = lambda: reactor.write_soon(descriptor)
    reactor.write_soon(descriptor)
    reactor.doIteration(None)
    assert descriptor.writes == 1
    reactor.doIteration(None)
    assert descriptor.writes == 2
    descriptor.close()


def test_a_failed_write_ends_only_its_descriptor(reactor, events) -> None:
    bad, good = Descriptor(reactor, "bad"), Descriptor(reactor, "good")
    bad.on_write = raise_error
    reactor.write_soon(bad)
    reactor.write_soon(good)
    reactor.doIteration(0)
    assert [type(reason.value) for reason in bad.lost] == [ValueError]
    assert good.writes == 1
    assert tracebacks(events) == ["boom"]
    bad.close()
    good.close()
