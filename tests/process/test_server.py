"""The lifecycle of a serving process, and its cleanup."""

import socket
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.interfaces import IDrainable
from rtservice.net.listen_types import open_description
from rtservice.process.foreign import ForeignFactory
from rtservice.process.state import State
from tests.support.recorded import recorded
from tests.support.served import server


def test_factory_is_stopped_after_the_last_foreign_protocol_is_disconnected(timed) -> None:
    calls: list[str] = []
    factory: Any = Factory()
    factory.noisy = False
    factory.protocol = type("Recording", (Protocol,), {"connectionLost": lambda self, reason: calls.append("lost")})
    factory.stopFactory = lambda: calls.append("stopped")
    service, _, _ = timed(factory=factory, drain_timeout=30)
    protocol = ForeignFactory(factory, "x:1", service.backend.connections, Logger()).buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = protocol
    protocol.makeConnection(transport)
    service.stopService()
    transport.loseConnection()
    assert calls == ["lost", "stopped"]


@pytest.mark.parametrize("ending", [False, True])
def test_broken_listener_stops_the_service_unless_it_is_stopping(timed, tmp_path, ending) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=1)
    service, _, events = timed(listener)
    if ending:
        service.stopService()
    for port in service.backend.connections.ports:
        port.connectionLost(Failure(OSError("broken")))
    assert service.exit_status == (0 if ending else 1)
    assert any("cannot accept any more: broken" in event.get("problem", "") for event in events) is not ending


@pytest_twisted.inlineCallbacks
def test_stopping_closes_the_socket_and_removes_its_file(tmp_path):
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener])
    service.startService()
    assert recorded(events[:1], "listener.listening", listener=f"unix:{tmp_path}/s")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")
        yield service.stopService()
    assert not (tmp_path / "s").exists()
    assert listener.socket.fileno() == -1


@pytest_twisted.inlineCallbacks
def test_unremovable_socket_file_is_logged_as_a_warning(tmp_path, monkeypatch):
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener])
    service.startService()

    def refuse(file: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(listener._file), "remove", refuse)
    yield service.stopService()
    assert recorded(events, "listener.file_kept", problem="Permission denied")


@pytest.mark.parametrize("now", State)
@pytest.mark.parametrize("then", State)
def test_process_states_change_only_forward(now, then) -> None:
    service, _ = server()
    service.backend.state = now
    forward = [State.STARTING, State.SERVING, State.DRAINING, State.STOPPED]
    steps = forward.index(then) - forward.index(now)
    # One state at a time, except from STARTING: a cancelled start has nothing to drain.
    if steps == 1 or (now is State.STARTING and steps > 0):
        service.backend._move(then)
        assert service.backend.state is then
    else:
        with pytest.raises(RuntimeError, match=f"^a process that is {now.value} cannot become {then.value}$"):
            service.backend._move(then)
        assert service.backend.state is now


@pytest_twisted.inlineCallbacks
def test_process_starts_serves_drains_and_stops_with_its_last_connection(tmp_path):
    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    address = listener.socket.getsockname()
    service, events = server([listener], drain_timeout=30)
    assert service.backend.state is State.STARTING
    service.startService()
    assert service.backend.state is State.SERVING
    with socket.create_connection(address, timeout=20) as client:
        answer = yield deferToThread(client.recv, 100)
        assert answer == b"Hello from the server!"
        done = service.stopService()
        again = service.stopService()
        assert service.backend.state is State.DRAINING
        client.sendall(b"still here")
        answer = yield deferToThread(client.recv, 100)
        assert answer == b"still here"
        assert (done.called, again.called) == (False, False)
    yield done
    yield again
    assert service.backend.state is State.STOPPED
    assert recorded(events[-1:], "drain.done", ended=1, aborted=0)
    yield service.stopService()


@implementer(IDrainable)
class SendsBye(Protocol):
    def drain(self) -> None:
        self.transport.write(b"bye")
        self.transport.loseConnection()


@pytest_twisted.inlineCallbacks
def test_drainable_protocol_also_notifies_clients_from_the_backlog():
    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    address = listener.socket.getsockname()
    service, events = server([listener], drain_timeout=30)
    service.backend.factory = Factory.forProtocol(SendsBye)
    service.startService()
    with socket.create_connection(address, timeout=20) as early:
        while not service.backend.connections.open:
            yield deferToThread(lambda: None)
        with socket.create_connection(address, timeout=20) as queued:
            done = service.stopService()
            for client in (early, queued):
                answer = yield deferToThread(client.recv, 100)
                end = yield deferToThread(client.recv, 100)
                assert (answer, end) == (b"bye", b"")
            yield done
    assert recorded(events[-1:], "drain.done", ended=2, aborted=0)
