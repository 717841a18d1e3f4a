"""The serving process: what starts, what does not, and what is left when it stops."""

import socket
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.logger import Logger, formatEvent

from rtservice.host.connections import Limits
from rtservice.host.server import Live, Server, StartError
from rtservice.net.listeners import open_description
from rtservice.protocols.echo import EchoFactory


class Endpoint:
    """Listens as its result says."""

    def __init__(self, result: Deferred) -> None:
        self.result = result
        self.stopped = 0

    def listen(self, factory: Factory) -> Deferred:
        self.factory = factory
        return self.result

    def getHost(self) -> str:
        return "an address"

    def stopListening(self) -> None:
        self.stopped += 1


def server(listeners=(), endpoints=()) -> tuple[Server, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    log = Logger(observer=events.append)
    live = Live(limits=Limits(max_connections=100), drain_timeout=0)
    made = Server(EchoFactory(), listeners=list(listeners), endpoints=list(endpoints), live=live, log=log)
    return made, events


def test_an_endpoint_that_cannot_listen_stops_the_start_with_its_description() -> None:
    service, events = server(endpoints=[("x:1", Endpoint(fail(CannotListenError("x", 1, OSError("no way")))))])
    with pytest.raises(StartError, match=r"--listen x:1: .*no way"):
        service.privilegedStartService()
    assert "no way" in str(formatEvent(events[-1]))


def test_a_start_error_is_reported_by_twistd_and_printed_without_traceback() -> None:
    assert issubclass(StartError, Exception)
    assert issubclass(StartError, SystemExit)


def test_an_endpoint_that_fails_later_stops_the_process_with_a_status(monkeypatch) -> None:
    from twisted.internet import reactor

    stops: list[int] = []
    monkeypatch.setattr(reactor, "stop", lambda: stops.append(1))
    result: Deferred = Deferred()
    service, events = server(endpoints=[("x:1", Endpoint(result))])
    service.privilegedStartService()
    assert (service.exit_status, stops) == (0, [])
    result.errback(OSError("too late"))
    assert (service.exit_status, stops) == (1, [1])
    assert "--listen x:1: too late" in str(formatEvent(events[-1]))


def test_an_endpoint_serves_with_records_and_is_stopped() -> None:
    endpoint = Endpoint(Deferred())
    service, events = server(endpoints=[("x:1", endpoint)])
    service.startService()  # as `twist` does, without the privileged half
    endpoint.result.callback(endpoint)
    assert formatEvent(events[-1]) == "listening on x:1 (an address)"
    protocol = endpoint.factory.buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = protocol
    protocol.makeConnection(transport)
    assert len(service.connections.open) == 1
    transport.loseConnection()
    assert events[-1]["listener"] == "x:1"
    assert not service.connections.open
    service.stopService()
    assert endpoint.stopped == 1


@pytest_twisted.inlineCallbacks
def test_stopping_closes_the_socket_and_removes_its_file(tmp_path):
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener])
    service.startService()
    assert formatEvent(events[0]) == f"listening on unix:{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")
        yield service.stopService()
    assert not (tmp_path / "s").exists()
    assert listener.socket.fileno() == -1


@pytest_twisted.inlineCallbacks
def test_a_socket_file_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener])
    service.startService()

    def refuse(file: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(listener._file), "remove", refuse)
    yield service.stopService()
    assert any("its socket file stays: Permission denied" in str(formatEvent(event)) for event in events)


def test_an_endpoint_that_listens_at_once_needs_no_reactor() -> None:
    endpoint = Endpoint(Deferred())
    endpoint.result = succeed(endpoint)
    service, events = server(endpoints=[("x:1", endpoint)])
    service.privilegedStartService()
    assert formatEvent(events[-1]) == "listening on x:1 (an address)"
