"""A reload of a serving process, in slices."""

import signal
import socket
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from rtservice.net.listen_types import open_description
from rtservice.process.admission import Limits
from rtservice.process.server import RuntimeSettings
from rtservice.process.service import ServiceProcess
from rtservice.process.slices import in_slices
from rtservice.process.state import State
from tests.support.recorded import recorded
from tests.support.served import Held, server


def test_applied_settings_take_effect_at_once(timed, tmp_path) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, clock, events = timed(listener, drain_timeout=30)
    (port,) = service.backend.connections.ports
    held = [Held(service) for _ in range(3)]
    assert port in clock.getReaders()
    service.backend.apply(
        RuntimeSettings(limits=Limits(max_connections=3, idle_timeout=60), handshake_timeout=3, drain_timeout=2)
    )
    assert port.handshake_timeout == 3
    assert port not in clock.getReaders()  # the connection limit is reached
    clock.pump([5] * 11)
    assert held[0].asked == []
    clock.pump([5] * 2)
    assert [connection.asked for connection in held] == [["close: idle"]] * 3
    service.backend.apply(RuntimeSettings(limits=Limits(max_connections=100), drain_timeout=5))
    assert port in clock.getReaders()
    service.stopService()
    assert recorded(events[-1:], "drain.started", count=3, seconds=5)
    for connection in held:
        connection.closes()


def reloading(
    monkeypatch, steps, *listeners, **settings
) -> tuple[ServiceProcess, list[dict[str, Any]], Callable[[], None]]:
    """Return a server whose reload runs these steps, one per slice; its events; and a function that sends SIGHUP."""
    service, events = server(listeners, reload=SimpleNamespace(steps=steps), **settings)
    monkeypatch.setattr("rtservice.process.service.in_slices", partial(in_slices, size=0.0, pause=0.0))
    service.startService()
    return service, events, lambda: signal.raise_signal(signal.SIGHUP)


@pytest_twisted.inlineCallbacks
def test_clients_are_served_during_a_reload(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    address = listener.socket.getsockname()
    answered, begun, ended = [], Deferred(), Deferred()

    def steps():
        reactor.callLater(0, begun.callback, None)
        while len(answered) < 3:  # forever, if the connections were not served
            yield
        reactor.callLater(0, ended.callback, None)

    service, _, send_sighup = reloading(monkeypatch, steps, listener)
    with socket.create_connection(address, timeout=20) as client:
        yield deferToThread(client.recv, 100)
        send_sighup()
        yield begun
        for number in range(3):
            assert not ended.called
            client.sendall(b"%d" % number)
            answered.append((yield deferToThread(client.recv, 100)))
        yield ended
    assert answered == [b"0", b"1", b"2"]
    yield service.stopService()


@pytest_twisted.inlineCallbacks
def test_signals_during_a_reload_cause_one_more_reload(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    trace, both, open_gate = [], Deferred(), []

    def steps():
        trace.append("begins")
        if len([entry for entry in trace if entry == "begins"]) == 1:
            while not open_gate:
                yield
        else:
            yield
        trace.append("ends")
        if trace.count("ends") == 2:
            reactor.callLater(0, both.callback, None)

    service, _, send_sighup = reloading(monkeypatch, steps, listener)
    send_sighup()
    for _ in range(3):  # each in a later turn of the reactor
        yield deferLater(reactor, 0, send_sighup)
    assert trace == ["begins"]
    open_gate.append(True)
    yield both
    yield deferLater(reactor, 0, lambda: None)  # a third reload would begin in the turn in which the second one ends
    assert trace == ["begins", "ends"] * 2
    yield service.stopService()


@pytest_twisted.inlineCallbacks
def test_stop_during_a_reload_cancels_the_reload_and_drains(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    begun, closed = [], []

    def steps():
        begun.append(True)
        try:
            while True:
                yield
        finally:
            closed.append(True)

    service, events, send_sighup = reloading(monkeypatch, steps, listener)
    send_sighup()
    yield deferLater(reactor, 0, send_sighup)
    yield service.stopService()
    assert closed == [True]
    assert service.backend.state is State.STOPPED
    assert begun == [True]
    assert recorded(events, "task.cancelled", task="reload")


@pytest_twisted.inlineCallbacks
def test_unexpected_reload_failure_is_logged_and_the_next_reload_succeeds(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    notified, tries = [], []

    def steps():
        tries.append(True)
        yield
        if len(tries) == 1:
            raise LookupError("unexpected")

    notifier = SimpleNamespace(
        reloading=lambda: notified.append("reloading"),
        ready=lambda status: notified.append("ready"),
        stopping=lambda status: notified.append("stopping"),
        extend_timeout=lambda seconds: None,
        connected=False,
        watchdog_interval=None,
    )
    service, events, send_sighup = reloading(monkeypatch, steps, listener, notifier=notifier)
    assert notified.pop() == "ready"
    for count in (1, 2):
        send_sighup()
        while notified.count("ready") < count:
            yield deferLater(reactor, 0)
    assert notified == ["reloading", "ready"] * 2
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [LookupError]
    yield service.stopService()
