"""The start of a serving process, and its failures."""

import socket
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.interfaces import IStartable
from rtservice.process.start_errors import StartError, one_line
from rtservice.process.state import State
from tests.support.fake_reactor import FakeReactor
from tests.support.recorded import recorded
from tests.support.served import Endpoint, server


def test_endpoint_that_cannot_listen_fails_the_start_and_is_named() -> None:
    service, events = server(endpoints=[("x:1", Endpoint(fail(CannotListenError("x", 1, OSError("no way")))))])
    with pytest.raises(StartError, match=r"--listen x:1: .*no way"):
        service.privilegedStartService()
    assert "no way" in events[-1]["problem"]


def test_a_start_error_is_reported_by_twistd_and_printed_without_traceback() -> None:
    assert issubclass(StartError, Exception)
    assert issubclass(StartError, SystemExit)


def test_late_endpoint_failure_stops_the_process_with_exit_status_1(monkeypatch) -> None:
    from twisted.internet import reactor

    stops: list[int] = []
    monkeypatch.setattr(reactor, "stop", lambda: stops.append(1))
    result: Deferred = Deferred()
    service, events = server(endpoints=[("x:1", Endpoint(result))])
    service.privilegedStartService()
    assert (service.exit_status, stops) == (0, [])
    result.errback(OSError("too late"))
    assert (service.exit_status, stops) == (1, [1])
    assert "--listen x:1: too late" in events[-1]["problem"]


class UnusableListener:
    """A listener whose socket is closed; it records its cleanup."""

    name = "tcp:192.0.2.1:7"
    proxied = False
    tls = None
    shared = False
    initial_fingerprint = ()
    certificates = ()

    def __init__(self) -> None:
        self.done: list[str] = []
        self.socket = socket.socket()
        self.socket.close()

    def remove_file(self) -> None:
        self.done.append("remove file")

    def close(self) -> None:
        self.done.append("close")


def failing_factory(count: int, error: BaseException) -> Factory:
    """Return a factory whose doStart succeeds `count` times, then raises."""
    factory = Factory()
    factory.noisy = False
    times = iter(range(count))

    def start() -> None:
        if next(times, None) is None:
            raise error

    factory.doStart = start  # type: ignore[method-assign]  # replaced by the test
    return factory


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (None, "tcp:192.0.2.1:7 did not start: OSError: "),
        (failing_factory(0, KeyboardInterrupt()), "Factory did not start: KeyboardInterrupt"),
        (failing_factory(0, SystemExit(0)), "Factory did not start: SystemExit: 0"),
    ],
    ids=["socket", "interrupt", "exit"],
)
def test_every_failure_during_the_start_is_reported(monkeypatch, factory, problem) -> None:
    clock = FakeReactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    unusable: Any = UnusableListener()
    reports: list[str | None] = []
    service, events = server([unusable], factory=factory, report=reports.append)
    service.startService()
    assert [str(report)[: len(problem)] for report in reports] == [problem]
    assert service.exit_status == 1
    clock.advance(0)
    service.stopService()
    clock.advance(1)
    assert (unusable.done[0], unusable.done[-1]) == ("remove file", "close")
    assert all(event["log_level"].name == "debug" for event in events if "log_failure" in event)


def test_status_server_that_cannot_start_fails_the_start(monkeypatch) -> None:
    def fail_to_start(reactor: object, site: object) -> None:
        raise LookupError("no page")

    clock = FakeReactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    reports: list[str | None] = []
    service, events = server(report=reports.append)
    monkeypatch.setattr(service._status_server, "start", fail_to_start)
    service.startService()
    assert reports == ["the service did not start: LookupError: no page"]
    assert service.exit_status == 1
    # This is not an error of the system: its traceback is needed to correct it.
    assert [event["log_level"].name for event in events if "log_failure" in event] == ["error"]


def test_exception_is_formatted_as_one_line_even_if_str_fails() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise SystemExit(3)

    assert one_line(Failure(ValueError("two\n  lines"))) == "ValueError: two lines"
    assert one_line(Failure(ValueError())) == "ValueError"
    assert one_line(Failure(MuteError())) == "MuteError"


def test_endpoint_connections_are_recorded_and_the_endpoint_is_stopped() -> None:
    endpoint = Endpoint(Deferred())
    service, events = server(endpoints=[("x:1", endpoint)])
    service.startService()  # like `twist`, which does not call privilegedStartService
    endpoint.result.callback(endpoint)
    assert recorded(events, "listener.listening", listener="x:1 (an address)")
    assert recorded(events[-1:], "service.serving")
    protocol = endpoint.factory.buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = protocol
    protocol.makeConnection(transport)
    assert len(service.backend.connections.open) == 1
    transport.loseConnection()
    assert events[-1]["listener"] == "x:1"
    assert not service.backend.connections.open
    service.stopService()
    assert endpoint.stopped == 1


def test_endpoint_that_listens_at_once_needs_no_reactor() -> None:
    endpoint = Endpoint(Deferred())
    endpoint.result = succeed(endpoint)
    service, events = server(endpoints=[("x:1", endpoint)])
    service.privilegedStartService()
    assert recorded(events[-1:], "listener.listening", listener="x:1 (an address)")


@implementer(IStartable)
class WaitingFactory(Factory):
    """Starts when `started` fires."""

    noisy = False

    def __init__(self) -> None:
        self.started: Deferred[None] = Deferred()

    def start(self) -> Deferred[None]:
        return self.started


def test_late_endpoint_does_not_make_the_service_ready_before_its_factory_has_started(monkeypatch) -> None:
    clock = FakeReactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    endpoint, factory = Endpoint(Deferred()), WaitingFactory()
    reports: list[str | None] = []
    service, _ = server(endpoints=[("x:1", endpoint)], factory=factory, report=reports.append)
    service.startService()
    endpoint.result.callback(endpoint)
    assert (reports, service.backend.state) == ([], State.STARTING)
    factory.started.callback(None)
    assert (reports, service.backend.state) == ([None], State.SERVING)
    service.stopService()
    clock.advance(1)


def test_status_server_stops_before_the_factory(monkeypatch) -> None:
    class StoppingFactory(Factory):
        noisy = False

        def stopFactory(self) -> None:
            stopped.append("factory")

    clock = FakeReactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    stopped: list[str] = []
    service, _ = server(factory=StoppingFactory())
    monkeypatch.setattr(service._status_server, "stop", lambda: stopped.append("status server"))
    service.startService()
    service.stopService()
    clock.advance(1)
    assert stopped[:2] == ["status server", "factory"]
