"""The serving process: what starts, what does not, and what is left when it stops."""

import signal
import socket
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import CannotListenError, ConnectionAborted, ConnectionDone
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock, StringTransportWithDisconnection
from twisted.internet.threads import deferToThread
from twisted.logger import Logger, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.interfaces import IDrainable, IMetrics
from rtservice.net.listeners import open_description
from rtservice.process.registry import Limits
from rtservice.process.server import RuntimeSettings, Server, StartError, State, one_line
from rtservice.process.slices import in_slices
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


def server(
    listeners=(), endpoints=(), drain_timeout=0.0, factory=None, **more: Any
) -> tuple[Server, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    log = Logger(observer=events.append)
    live = RuntimeSettings(limits=Limits(max_connections=100), drain_timeout=drain_timeout)
    factory = factory or EchoFactory()
    made = Server(factory, listeners=list(listeners), endpoints=list(endpoints), live=live, log=log, **more)
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


class Unfit:
    """A listener whose socket nothing can be done with, and what it is to be rid of."""

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
    """One whose doStart raises, the second or a later time."""
    factory = Factory()
    factory.noisy = False
    times = iter(range(count))

    def start() -> None:
        if next(times, None) is None:
            raise error

    factory.doStart = start  # type: ignore[method-assign]  # it is the test's own
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
def test_nothing_that_fails_in_a_start_is_lost(monkeypatch, factory, problem) -> None:
    clock = Reactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    unfit: Any = Unfit()
    reports: list[str | None] = []
    service, events = server([unfit], factory=factory, report=reports.append)
    service.startService()
    assert [str(report)[: len(problem)] for report in reports] == [problem]
    assert service.exit_status == 1
    clock.advance(0)
    service.stopService()
    clock.advance(1)
    assert unfit.done[-2:] == ["remove file", "close"]
    assert all(event["log_level"].name == "debug" for event in events if "log_failure" in event)


def test_a_status_server_that_cannot_start_ends_the_start(monkeypatch) -> None:
    def fail_to_start(reactor: object) -> None:
        raise LookupError("no page")

    clock = Reactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    reports: list[str | None] = []
    service, events = server(report=reports.append)
    monkeypatch.setattr(service._status_server, "start", fail_to_start)
    service.startService()
    assert reports == ["the service did not start: LookupError: no page"]
    assert service.exit_status == 1
    # Nothing of the system's refuses this: who is to correct it needs the traceback.
    assert [event["log_level"].name for event in events if "log_failure" in event] == ["error"]


def test_an_exception_is_one_line_whatever_it_says_of_itself() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise SystemExit(3)

    assert one_line(Failure(ValueError("two\n  lines"))) == "ValueError: two lines"
    assert one_line(Failure(ValueError())) == "ValueError"
    assert one_line(Failure(MuteError())) == "MuteError"


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


def test_a_factory_is_stopped_when_the_last_protocol_on_a_transport_of_others_has_heard_of_its_end(timed) -> None:
    told: list[str] = []
    factory: Any = Factory()
    factory.noisy = False
    factory.protocol = type("Telling", (Protocol,), {"connectionLost": lambda one, reason: told.append("lost")})
    factory.stopFactory = lambda: told.append("stopped")
    service, _, _ = timed(factory=factory, drain_timeout=30)
    protocol = service.connections.wrap(factory, "x:1").buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = protocol
    protocol.makeConnection(transport)
    service.stopService()
    transport.loseConnection()
    assert told == ["lost", "stopped"]


@pytest.mark.parametrize("ending", [False, True])
def test_a_listener_that_breaks_ends_the_service_unless_that_is_about_to_end(timed, tmp_path, ending) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=1)
    service, _, events = timed(listener)
    if ending:
        service.stopService()
    for port in service.connections.ports:
        port.connectionLost(Failure(OSError("broken")))
    assert service.exit_status == (0 if ending else 1)
    assert any("accepts no more: broken" in str(formatEvent(event)) for event in events) is not ending


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


# --- the lifecycle ---


@pytest.mark.parametrize("now", State)
@pytest.mark.parametrize("then", State)
def test_a_process_goes_one_way(now, then) -> None:
    service, _ = server()
    service.state = now
    forward = [State.STARTING, State.SERVING, State.DRAINING, State.STOPPED]
    steps = forward.index(then) - forward.index(now)
    # One at a time; a start that is broken off has nothing to drain, if it came to nothing.
    if steps == 1 or (now is State.STARTING and steps > 0):
        service._move(then)
        assert service.state is then
    else:
        with pytest.raises(RuntimeError, match=f"^a process that is {now.value} cannot become {then.value}$"):
            service._move(then)
        assert service.state is now


@pytest_twisted.inlineCallbacks
def test_a_process_starts_serves_drains_and_stops_with_its_last_connection(tmp_path):
    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    address = listener.socket.getsockname()
    service, events = server([listener], drain_timeout=30)
    assert service.state is State.STARTING
    service.startService()
    assert service.state is State.SERVING
    with socket.create_connection(address, timeout=20) as client:
        answer = yield deferToThread(client.recv, 100)
        assert answer == b"Hello from the server!"
        done = service.stopService()
        again = service.stopService()
        assert service.state is State.DRAINING
        client.sendall(b"still here")
        answer = yield deferToThread(client.recv, 100)
        assert answer == b"still here"
        assert (done.called, again.called) == (False, False)
    yield done
    yield again
    assert service.state is State.STOPPED
    assert str(formatEvent(events[-1])).startswith("drained: 1 ended, 0 aborted, ")
    yield service.stopService()


@implementer(IDrainable)
class Polite(Protocol):
    def drain(self) -> None:
        self.transport.write(b"bye")
        self.transport.loseConnection()


@pytest_twisted.inlineCallbacks
def test_a_protocol_can_say_goodbye_also_to_who_was_still_in_the_queue():
    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    address = listener.socket.getsockname()
    service, events = server([listener], drain_timeout=30)
    service.factory = Factory.forProtocol(Polite)
    service.startService()
    with socket.create_connection(address, timeout=20) as early:
        while not service.connections.open:
            yield deferToThread(lambda: None)
        with socket.create_connection(address, timeout=20) as queued:
            done = service.stopService()
            for client in (early, queued):
                answer = yield deferToThread(client.recv, 100)
                end = yield deferToThread(client.recv, 100)
                assert (answer, end) == (b"bye", b"")
            yield done
    assert str(formatEvent(events[-1])).startswith("drained: 2 ended, 0 aborted, ")


# --- the same, by a clock of the test's ---


class Reactor(MemoryReactorClock):
    """Runs already, and takes our descriptors without asking for a real one."""

    stops = 0

    def callWhenRunning(self, call: Callable, *arguments: Any) -> None:
        call(*arguments)

    def stop(self) -> None:
        self.stops += 1

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)


class Held:
    """A connection as the register sees one; what is asked of it is written down."""

    unsent = bytes_in = bytes_out = 0
    seen, still_since, opened = -1, 0.0, 0.0
    disconnecting = peer_finished = False
    error = None
    port = SimpleNamespace(name="test")

    def __init__(self, service: Server, phase: str = "open", protocol: Any = None) -> None:
        self.service = service
        self.phase = phase
        self.protocol = protocol
        self.asked: list[str] = []
        service.connections.opened(self)

    def getPeer(self) -> None:
        return None

    def close(self, why: str) -> None:
        self.asked.append(f"close: {why}")
        self.disconnecting = True

    def abort(self, why: str) -> None:
        self.asked.append(f"abort: {why}")
        self.service.reactor.callLater(0, self.closes, ConnectionAborted())

    def abortConnection(self) -> None:
        self.abort("abort")

    def closes(self, reason: Exception | None = None) -> None:
        self.service.connections.closed(self, Failure(reason or ConnectionDone()))


class Told:
    """A protocol that counts how often it is told of a drain."""

    def __init__(self) -> None:
        self.drains = 0

    def drain(self) -> None:
        self.drains += 1


@pytest.fixture
def timed(monkeypatch) -> Callable[..., tuple[Server, Reactor, list[dict[str, Any]]]]:
    """Makes a server that serves, on the clock of a reactor of the test's."""

    def start(*listeners: Any, **live: Any) -> tuple[Server, Reactor, list[dict[str, Any]]]:
        clock = Reactor()
        monkeypatch.setattr("twisted.internet.reactor", clock)
        service, events = server(listeners, **live)
        service.startService()
        assert service.state is State.SERVING
        return service, clock, events

    return start


def last(events: list[dict[str, Any]]) -> str:
    return str(formatEvent(events[-1]))


def test_a_drain_ends_with_the_last_connection_and_counts_what_has_ended_since(timed) -> None:
    service, clock, events = timed(drain_timeout=30)
    Held(service).closes()
    first, second = Held(service), Held(service)
    done = service.stopService()
    assert last(events) == "draining: 2 connections have 30 s to end"
    clock.advance(20)
    first.closes()
    clock.advance(9.5)
    assert (done.called, first.asked, second.asked) == (False, [], [])
    second.closes(ConnectionAborted())  # by its protocol
    assert done.called
    assert last(events) == "drained: 1 ended, 1 aborted, 29.5 s"
    assert clock.getDelayedCalls() == []


def test_a_drain_without_connections_is_done_at_once(timed) -> None:
    service, clock, events = timed(drain_timeout=30)
    assert service.stopService().called
    assert last(events) == "drained: 0 ended, 0 aborted, 0.0 s"
    assert clock.getDelayedCalls() == []


def test_a_listener_that_has_finished_is_closed_while_connections_go_on(timed, tmp_path) -> None:
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


def test_a_listener_that_somebody_else_holds_keeps_its_queue(timed, tmp_path) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    listener.shared = True
    service, _, _ = timed(listener, drain_timeout=30)
    (port,) = service.connections.ports
    other = listener.socket.dup()
    with socket.socket(socket.AF_UNIX) as client, other:
        client.connect(f"{tmp_path}/s")
        held = Held(service)
        service.stopService()
        assert not port.listening
        assert listener.socket.fileno() == -1  # also while connections go on
        held.closes()
        assert service.state is State.STOPPED
        near, _ = other.accept()
        near.close()


def test_each_drainable_protocol_is_told_once_also_one_that_opens_later(timed) -> None:
    service, clock, _ = timed(drain_timeout=30)
    protocols = [implementer(IDrainable)(type("Telling", (Told,), {}))() for _ in range(3)]
    deaf = Told()  # has the method, and does not say so
    somebody_else = Told()  # as Twisted's layer of TLS is, until its handshake is done
    held = [
        Held(service, protocol=protocols[0]),
        Held(service, protocol=deaf),
        Held(service, "tls", protocol=somebody_else),
    ]
    service.stopService()
    assert protocols[0].drains == 1
    held.append(Held(service, protocol=protocols[1]))
    held[2].phase, held[2].protocol = "open", protocols[2]
    clock.pump([1] * 10)
    assert [protocol.drains for protocol in protocols] == [1, 1, 1]
    assert deaf.drains == 0
    assert [one.asked for one in held] == [[]] * 4
    for one in held:
        one.closes()


def test_a_protocol_that_fails_in_drain_loses_its_connection_alone(timed) -> None:
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
    assert last(events) == "drained: 1 ended, 1 aborted, 0.0 s"


def test_after_the_drain_timeout_what_is_buffered_is_sent_for_as_long_as_it_moves(timed) -> None:
    service, clock, events = timed(drain_timeout=10)
    reading, silent, shaking, closing = (Held(service, phase) for phase in ("open", "open", "tls", "closing"))
    reading.unsent = silent.unsent = 1000
    done = service.stopService()
    clock.pump([0.5] * 19)
    assert [one.asked for one in (reading, silent, shaking, closing)] == [[]] * 4
    clock.advance(0.5)
    assert (reading.asked, silent.asked) == (["close: drained"], ["close: drained"])
    assert (shaking.asked, closing.asked) == (["abort: drained"], [])  # it has nothing to flush; it ends by itself
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
    assert last(events) == "drained: 2 ended, 2 aborted, 17.0 s"
    assert clock.getDelayedCalls() == []


def test_what_still_moves_half_a_minute_after_the_drain_timeout_is_cut_off(timed) -> None:
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
    assert last(events).startswith("drained: 0 ended, 1 aborted, 30")


@pytest.mark.parametrize("after", [0, 5, 12], ids=["at-once", "while-waiting", "while-flushing"])
def test_hurry_ends_a_drain(timed, after) -> None:
    service, clock, events = timed(drain_timeout=10)
    held = [Held(service, phase) for phase in ("open", "tls", "closing")]
    held[0].unsent = 1
    done = service.stopService()
    clock.pump([1] * after)
    service.abort_drain()
    assert held[0].asked[-1] == "abort: cut off"
    clock.advance(0)
    assert done.called
    assert last(events) == f"drained: 0 ended, 3 aborted, {after:.1f} s"
    assert clock.getDelayedCalls() == []


def test_a_signal_that_is_sent_again_at_once_neither_hurries_nor_leaves(timed, monkeypatch) -> None:
    handlers: dict[int, Callable] = {}
    left: list[bool] = []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    service, clock, _ = timed(
        drain_timeout=30, reload=lambda: None, stop=lambda: service.stopService(), leave=lambda: left.append(True)
    )
    clock.callFromThread = lambda call, *arguments: call(*arguments)
    held = Held(service)
    for _ in range(4):
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        clock.advance(0.125)
    assert service.state is State.DRAINING
    assert held.asked == []
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert held.asked == ["abort: cut off"]
    clock.advance(0.25)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        assert not left
        handlers[number](number, None)
    assert left == [True]
    assert service.exit_status == 128 + signal.SIGTERM


def test_a_service_that_is_stopped_before_it_serves_never_does(monkeypatch, tmp_path) -> None:
    waiting: list[Callable] = []
    clock = Reactor()
    monkeypatch.setattr(clock, "callWhenRunning", waiting.append)
    monkeypatch.setattr("twisted.internet.reactor", clock)
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener], drain_timeout=30)
    service.startService()
    assert service.state is State.STARTING
    assert service.stopService().called
    assert service.state is State.STOPPED
    (serve,) = waiting
    serve()
    assert service.connections.ports == []
    assert not (tmp_path / "s").exists()
    assert not any("listening" in str(formatEvent(event)) for event in events)
    assert clock.getDelayedCalls() == []


def test_a_service_that_never_started_closes_its_listeners(tmp_path) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, events = server([listener])
    assert service.stopService().called
    assert service.state is State.STOPPED
    assert not (tmp_path / "s").exists()
    assert events == []


def test_a_listener_that_fails_late_ends_the_service_without_a_drain(timed, tmp_path, monkeypatch) -> None:
    results: list[Deferred] = [Deferred(), Deferred()]
    clock = Reactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    reports: list[Any] = []
    service, _ = server([listener], [(f"x:{i}", Endpoint(result)) for i, result in enumerate(results)], 30)
    service._report = reports.append
    service.startService()
    held = Held(service)
    for result in results:
        result.errback(OSError("too late"))
    assert (clock.stops, service.exit_status) == (1, 1)  # a reactor that stops twice says that it is a mistake
    assert reports == ["--listen x:0: too late"]
    done = service.stopService()
    assert held.asked == ["abort: cut off"]
    clock.advance(0)
    assert done.called
    assert service.state is State.STOPPED
    assert not (tmp_path / "s").exists()


def test_an_endpoint_that_listens_when_the_service_has_stopped_is_stopped(monkeypatch) -> None:
    clock = Reactor()
    monkeypatch.setattr("twisted.internet.reactor", clock)
    early, late = Endpoint(Deferred()), Endpoint(Deferred())
    service, _ = server(endpoints=[("x:1", early), ("x:2", late)])
    service.startService()
    assert service.stopService().called
    early.result.callback(early)
    assert early.stopped == 1
    late.result.errback(OSError("too late"))  # which is nobody's concern any more
    assert (service.exit_status, clock.stops) == (0, 0)


def test_what_is_applied_holds_from_then_on(timed, tmp_path) -> None:
    (listener,) = open_description(f"unix:{tmp_path}/s", backlog=10)
    service, clock, events = timed(listener, drain_timeout=30)
    (port,) = service.connections.ports
    held = [Held(service) for _ in range(3)]
    assert port in clock.getReaders()
    service.apply(
        RuntimeSettings(limits=Limits(max_connections=3, idle_timeout=60), handshake_timeout=3, drain_timeout=2)
    )
    assert port.handshake_timeout == 3
    assert port not in clock.getReaders()  # as many as may be are there
    clock.pump([5] * 11)
    assert held[0].asked == []
    clock.pump([5] * 2)
    assert [one.asked for one in held] == [["close: idle"]] * 3
    service.apply(RuntimeSettings(limits=Limits(max_connections=100), drain_timeout=5))
    assert port in clock.getReaders()
    service.stopService()
    assert last(events) == "draining: 3 connections have 5 s to end"
    for one in held:
        one.closes()


@implementer(IMetrics)
class Counting(Factory):
    """Has counted what a test says, or fails; `serving` is what it has between its start and its stop."""

    noisy = False
    serving = None

    def __init__(self, counts: Any) -> None:
        self.counts = counts

    def startFactory(self) -> None:
        self.serving = True

    def stopFactory(self) -> None:
        self.serving = None

    def metrics(self) -> Any:
        assert self.serving
        if isinstance(self.counts, Exception):
            raise self.counts
        return self.counts


def of_factory(service: Server) -> dict[str, float]:
    return {name: count for name, count in service.counters().items() if name.startswith("protocol")}


def test_what_a_factory_counts_is_asked_for_from_its_start_to_its_end(timed) -> None:
    service, _, _ = timed(factory=Counting({"a_total": 1}))
    service.factory.counts = {"a_total": 2, "b": 0.5}
    service.stopService()
    assert service.state is State.STOPPED
    service.factory.counts = {"a_total": 3}
    assert of_factory(service) == {"protocol\ta_total\t": 2, "protocol\tb\t": 0.5}
    not_started, _ = server(factory=Counting(RuntimeError("not yet")))
    assert of_factory(not_started) == {}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (RuntimeError("mine"), "Counting failed in metrics"),
        ([("a", 1)], "Counting failed in metrics"),
        ({"a b": 1}, "Counting counts what cannot be shown: 'a b' is no name"),
    ],
)
def test_a_factory_that_counts_badly_is_logged_once_and_keeps_what_it_had(timed, counts, said) -> None:
    service, _, events = timed(factory=Counting({"a_total": 1}))
    assert of_factory(service) == {"protocol\ta_total\t": 1}
    before = len(events)
    for each in (counts, counts, {"a_total": 2}, counts):
        service.factory.counts = each
        service.counters()
    told = [str(formatEvent(event)) for event in events[before:]]
    assert [one[: len(said)] for one in told] == [said, said]  # once more after it was well
    assert of_factory(service).get("protocol\ta_total\t", 2) == 2
    assert service.counters()["open"] == 0


# --- a reload in slices ---


def reloading(monkeypatch, steps, *listeners, **how) -> tuple[Server, list[dict[str, Any]], Callable[[], None]]:
    """A server on these listeners that reloads by these steps, each of which is a slice; and what a SIGHUP does."""
    service, events = server(listeners, **how)
    service._reload = steps
    monkeypatch.setattr("rtservice.process.server.in_slices", partial(in_slices, size=0.0, pause=0.0))
    # The tests' own process keeps its handlers.
    monkeypatch.setattr("rtservice.process.server.signal.signal", lambda number, handler: None)
    service.startService()
    return service, events, lambda: service._hung_up(1, None)


@pytest_twisted.inlineCallbacks
def test_clients_are_served_while_a_reload_goes_on(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    address = listener.socket.getsockname()
    answered, begun, ended = [], Deferred(), Deferred()

    def steps():
        reactor.callLater(0, begun.callback, None)
        while len(answered) < 3:  # for ever, if nobody else had a turn
            yield
        reactor.callLater(0, ended.callback, None)

    service, _, hang_up = reloading(monkeypatch, steps, listener)
    with socket.create_connection(address, timeout=20) as client:
        yield deferToThread(client.recv, 100)
        hang_up()
        yield begun
        for number in range(3):
            assert not ended.called
            client.sendall(b"%d" % number)
            answered.append((yield deferToThread(client.recv, 100)))
        yield ended
    assert answered == [b"0", b"1", b"2"]
    yield service.stopService()


@pytest_twisted.inlineCallbacks
def test_signals_during_a_reload_are_one_more_reload_after_it(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    trace, both, open_gate = [], Deferred(), []

    def steps():
        trace.append("begins")
        if len([one for one in trace if one == "begins"]) == 1:
            while not open_gate:
                yield
        else:
            yield
        trace.append("ends")
        if trace.count("ends") == 2:
            reactor.callLater(0, both.callback, None)

    service, _, hang_up = reloading(monkeypatch, steps, listener)
    hang_up()
    for delay in (0, 0, 0.01):
        yield deferLater(reactor, delay, hang_up)
    assert trace == ["begins"]
    open_gate.append(True)
    yield both
    yield deferLater(reactor, 0.01, lambda: None)
    assert trace == ["begins", "ends"] * 2
    yield service.stopService()


@pytest_twisted.inlineCallbacks
def test_a_stop_during_a_reload_gives_it_up_and_drains(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    closed = []

    def steps():
        try:
            while True:
                yield
        finally:
            closed.append(True)

    service, events, hang_up = reloading(monkeypatch, steps, listener)
    hang_up()
    yield deferLater(reactor, 0, hang_up)
    yield service.stopService()
    assert closed == [True]
    assert service.state is State.STOPPED
    lines = [str(formatEvent(event)) for event in events]
    assert lines.count("SIGHUP: reloading") == 1
    assert "a reload is given up: the service stops" in lines


@pytest_twisted.inlineCallbacks
def test_a_reload_that_fails_in_a_way_nobody_thought_of_is_logged_and_the_next_one_goes_on(monkeypatch):
    from twisted.internet import reactor

    (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
    told, tries = [], []

    def steps():
        tries.append(True)
        yield
        if len(tries) == 1:
            raise LookupError("nobody thought of this")

    service, events, hang_up = reloading(monkeypatch, steps, listener)
    service._notifier = SimpleNamespace(
        reloading=lambda: told.append("reloading"),
        ready=lambda status: told.append("ready"),
        stopping=lambda status: told.append("stopping"),
        extend_timeout=lambda seconds: None,
        connected=False,
    )
    for count in (1, 2):
        hang_up()
        while told.count("ready") < count:
            yield deferLater(reactor, 0)
    assert told == ["reloading", "ready"] * 2
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [LookupError]
    yield service.stopService()
