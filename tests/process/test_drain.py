"""Graceful shutdown of a serving process, on a clock that the test advances."""

import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted
from zope.interface import implementer

from rtservice.interfaces import IDrainable
from rtservice.net.listen_types import open_description
from rtservice.net.phases import CLOSING, OPEN, TLS
from rtservice.process.state import State
from tests.support.fake_reactor import FakeReactor
from tests.support.recorded import recorded
from tests.support.served import Endpoint, Held, Told, server


def test_drain_ends_with_the_last_connection_and_counts_connections_ended_since_its_start(timed) -> None:
    service, clock, events = timed(drain_timeout=30)
    Held(service).closes()
    first, second = Held(service), Held(service)
    done = service.stopService()
    assert recorded(events[-1:], "drain.started", count=2, seconds=30)
    clock.advance(20)
    first.closes()
    clock.advance(9.5)
    assert (done.called, first.asked, second.asked) == (False, [], [])
    second.closes(ConnectionAborted())  # by its protocol
    assert done.called
    assert recorded(events[-1:], "drain.done", ended=1, aborted=1, seconds=29.5)
    assert clock.getDelayedCalls() == []


def test_drain_without_connections_is_done_at_once(timed) -> None:
    service, clock, events = timed(drain_timeout=30)
    assert service.stopService().called
    assert recorded(events[-1:], "drain.done", ended=0, aborted=0, seconds=0.0)
    assert clock.getDelayedCalls() == []


def test_listener_is_closed_while_connections_remain_open(timed, tmp_path) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, clock, _ = timed(listener, drain_timeout=30)
    held = Held(service)
    done = service.stopService()
    assert not (tmp_path / "s").exists()
    clock.pump([0.1] * 5)
    assert listener.socket.fileno() == -1
    assert not done.called
    held.closes()
    assert done.called


def test_backlog_of_a_shared_listener_is_kept(timed, tmp_path) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    listener.shared = True
    service, _, _ = timed(listener, drain_timeout=30)
    (port,) = service.backend.connections.ports
    other = listener.socket.dup()
    with socket.socket(socket.AF_UNIX) as client, other:
        client.connect(f"{tmp_path}/s")
        held = Held(service)
        service.stopService()
        assert not port.listening
        assert listener.socket.fileno() == -1  # also while connections are open
        held.closes()
        assert service.backend.state is State.STOPPED
        near, _ = other.accept()
        near.close()


def test_each_drainable_protocol_is_notified_once_also_if_it_opens_later(timed) -> None:
    service, clock, _ = timed(drain_timeout=30)
    protocols = [implementer(IDrainable)(type("Drainable", (Told,), {}))() for _ in range(3)]
    not_drainable = Told()  # has the method, but does not declare IDrainable
    tls_layer = Told()  # like the TLS layer of Twisted during the handshake
    held = [
        Held(service, protocol=protocols[0]),
        Held(service, protocol=not_drainable),
        Held(service, TLS, protocol=tls_layer),
    ]
    service.stopService()
    assert protocols[0].drains == 1
    held.append(Held(service, protocol=protocols[1]))
    held[2].phase, held[2].protocol = OPEN, protocols[2]
    clock.pump([1] * 10)
    assert [protocol.drains for protocol in protocols] == [1, 1, 1]
    assert not_drainable.drains == 0
    assert [connection.asked for connection in held] == [[]] * 4
    for connection in held:
        connection.closes()


def test_only_the_connection_of_a_protocol_that_fails_in_drain_is_aborted(timed) -> None:
    service, clock, events = timed(drain_timeout=30)
    bad, good = implementer(IDrainable)(Told)(), implementer(IDrainable)(Told)()
    bad.drain = lambda: 1 / 0
    failing, other = Held(service, protocol=bad), Held(service, protocol=good)
    done = service.stopService()
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]
    assert (failing.asked, other.asked, good.drains) == (["abort: abort"], [], 1)
    clock.advance(0)
    other.closes()
    assert done.called
    assert recorded(events[-1:], "drain.done", ended=1, aborted=1, seconds=0.0)


def test_buffered_data_is_sent_after_the_drain_timeout_while_the_peer_reads(timed) -> None:
    service, clock, events = timed(drain_timeout=10)
    reading, silent, handshaking, closing = (Held(service, phase) for phase in (OPEN, OPEN, TLS, CLOSING))
    reading.unsent = silent.unsent = 1000
    done = service.stopService()
    clock.pump([0.5] * 19)
    assert [connection.asked for connection in (reading, silent, handshaking, closing)] == [[]] * 4
    clock.advance(0.5)
    assert (reading.asked, silent.asked) == (["close: drained"], ["close: drained"])
    assert (handshaking.asked, closing.asked) == (["abort: drained"], [])  # nothing to flush; it is already closing
    for _ in range(4):
        clock.advance(1)
        reading.bytes_out += 1
    assert silent.asked == ["close: drained"]
    for _ in range(3):
        clock.advance(1)
        reading.bytes_out += 1
    assert silent.asked == ["close: drained", "abort: stopped reading"]
    assert reading.asked == ["close: drained"]
    reading.closes()
    assert not done.called
    closing.closes()
    assert done.called
    assert recorded(events[-1:], "drain.done", ended=2, aborted=2, seconds=17.0)
    assert clock.getDelayedCalls() == []


def test_connection_still_sending_30_seconds_after_the_drain_timeout_is_aborted(timed) -> None:
    service, clock, events = timed(drain_timeout=0)
    endless = Held(service)
    endless.unsent = 1
    done = service.stopService()
    clock.advance(0)
    for _ in range(30):
        assert endless.asked == ["close: drained"]
        endless.bytes_out += 1
        clock.advance(1)
    clock.advance(0)
    assert endless.asked == ["close: drained", "abort: cut off"]
    assert done.called
    assert recorded(events[-1:], "drain.done", ended=0, aborted=1)
    assert events[-1]["seconds"] // 1 == 30


@pytest.mark.parametrize("after", [0, 5, 12], ids=["at-once", "while-waiting", "while-flushing"])
def test_abort_ends_a_drain(timed, after) -> None:
    service, clock, events = timed(drain_timeout=10)
    held = [Held(service, phase) for phase in (OPEN, TLS, CLOSING)]
    held[0].unsent = 1
    done = service.stopService()
    clock.pump([1] * after)
    service.backend.abort()
    assert held[0].asked[-1] == "abort: cut off"
    clock.advance(0)
    assert done.called
    assert recorded(events[-1:], "drain.done", ended=0, aborted=3, seconds=round(after, 1))
    assert clock.getDelayedCalls() == []


def test_stop_signal_repeated_at_once_neither_aborts_the_drain_nor_exits(timed, monkeypatch) -> None:
    handlers: dict[int, Callable] = {}
    exits: list[bool] = []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    service, clock, _ = timed(drain_timeout=30, exit_now=lambda: exits.append(True))
    clock.stop = service.stopService
    clock.callFromThread = lambda call, *arguments: call(*arguments)
    held = Held(service)
    for _ in range(4):
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        clock.advance(0.125)
    assert service.backend.state is State.DRAINING
    assert held.asked == []
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert held.asked == ["abort: cut off"]
    clock.advance(0.25)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        assert not exits
        handlers[number](number, None)
    assert exits == [True]
    assert service.exit_status == 128 + signal.SIGTERM


def test_service_stopped_before_it_serves_does_not_start_serving(monkeypatch, tmp_path) -> None:
    waiting: list[Callable] = []
    clock = FakeReactor()
    monkeypatch.setattr(clock, "callWhenRunning", waiting.append)
    monkeypatch.setattr("twisted.internet.reactor", clock)
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener], drain_timeout=30)
    service.startService()
    assert service.backend.state is State.STARTING
    assert service.stopService().called
    assert service.backend.state is State.STOPPED
    (serve,) = waiting
    serve()
    assert service.backend.connections.ports == []
    assert not (tmp_path / "s").exists()
    assert not recorded(events, "listener.listening")
    assert clock.getDelayedCalls() == []


def test_service_that_never_started_closes_its_listeners(tmp_path) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener])
    assert service.stopService().called
    assert service.backend.state is State.STOPPED
    assert not (tmp_path / "s").exists()
    assert events == []


def test_late_endpoint_failure_stops_the_service_without_a_drain(timed, tmp_path, monkeypatch) -> None:
    results: list[Deferred] = [Deferred(), Deferred()]
    clock = FakeReactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    reports: list[Any] = []
    endpoints = [(f"x:{i}", Endpoint(result)) for i, result in enumerate(results)]
    service, _ = server([listener], endpoints, 30, report=reports.append)
    service.startService()
    held = Held(service)
    for result in results:
        result.errback(OSError("too late"))
    assert (clock.stops, service.exit_status) == (1, 1)  # a second stop of a reactor raises
    assert reports == ["--listen x:0: too late"]
    done = service.stopService()
    assert held.asked == ["abort: cut off"]
    clock.advance(0)
    assert done.called
    assert service.backend.state is State.STOPPED
    assert not (tmp_path / "s").exists()


def test_endpoint_that_starts_listening_after_the_stop_is_stopped(monkeypatch) -> None:
    clock = FakeReactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    early, late = Endpoint(Deferred()), Endpoint(Deferred())
    service, _ = server(endpoints=[("x:1", early), ("x:2", late)])
    service.startService()
    assert service.stopService().called
    early.result.callback(early)
    assert early.stopped == 1
    late.result.errback(OSError("too late"))  # ignored after the stop
    assert (service.exit_status, clock.stops) == (0, 0)
