"""The main process, with any backend."""

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from rtservice.process.service import ServiceProcess
from rtservice.process.state import State
from rtservice.process.status_server import StatusServer
from tests.support.fake_reactor import FakeReactor
from tests.support.launch import launch
from tests.support.notifier import Notifier


class FakeBackend:
    """A backend that the test controls."""

    listeners: tuple[Any, ...] = ()
    signals: dict[int, Callable[[], None]] = {}  # never changed
    tick_interval = 1.0
    alive = True
    replacing = watches_certificates = exits_at_once = False
    ready = True
    status = short_status = "fine"
    stopped_before_ready = "stopped too early"

    def __init__(self) -> None:
        self.state = State.STARTING
        self.calls: list[str] = []
        self.drained: Deferred[None] = Deferred()

    def prepare(self, host: ServiceProcess) -> None:
        self.host = host

    def start(self, reactor: Any) -> None:
        self.state = State.SERVING
        self.host.accepting()
        self.host.ready()

    def tick(self) -> None:
        self.calls.append("tick")

    def abort(self) -> None:
        self.calls.append("abort")

    def drain(self) -> Deferred[None]:
        self.state = State.DRAINING
        self.host.draining()
        return self.drained


class Listener:
    """A listener whose file the test changes."""

    name = "ssl:1"
    certificates = warnings = ()
    revocation = None
    initial_fingerprint = ()

    def tls_files(self) -> tuple[str, ...]:
        return ()


class RunningService:
    """A ServiceProcess that serves with a FakeBackend, and reloads without doing anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **backend: Any) -> None:
        self.clock: Any = FakeReactor()
        self.clock.callFromThread = lambda call, *arguments: call(*arguments)
        self.events: list[Any] = []
        self.reports: list[str | None] = []
        self.exits: list[bool] = []
        self.reloads: list[str] = []
        self.separate_renewal = False  # whether certificates can be renewed without a reload
        self.certificates_read = True  # what a reload returns
        self.notifier: Any = Notifier()
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}
        monkeypatch.setattr("twisted.internet.reactor", self.clock)
        monkeypatch.setattr(signal, "signal", self.handlers.__setitem__)
        self.backend: Any = FakeBackend()
        vars(self.backend).update(backend)
        log = Logger(observer=self.events.append)
        self.service = ServiceProcess(
            self.backend,
            SimpleNamespace(steps=self._steps, renewal=self._renewal),
            log=log,
            launch=launch(report=self.reports.append, exit_now=lambda: self.exits.append(True), notifier=self.notifier),
            status_server=StatusServer(log),
        )
        self.service.startService()

    def _record(self, what: str):
        self.reloads.append(what)
        yield

    def _steps(self):
        yield from self._record("reload")
        return self.certificates_read

    def _renewal(self):
        return self._record("renewal") if self.separate_renewal else None

    def send(self, number: int) -> None:
        self.handlers[number](number, None)
        self.clock.advance(1)


def test_start_is_reported_once_and_a_later_failure_stops_the_process(monkeypatch) -> None:
    running = RunningService(monkeypatch)
    assert running.reports == [None]
    assert running.notifier.said == ["READY"]
    running.service.failed("a listener is broken")
    running.service.failed("another one, too")
    assert running.reports == [None]
    assert (running.service.exit_status, running.clock.stops, running.backend.calls) == (1, 1, ["abort"])
    assert [event["event"] for event in running.events] == ["service.serving", "service.failed"]
    assert running.events[-1]["problem"] == "a listener is broken"


@pytest.mark.parametrize("at_once", [False, True])
def test_third_signal_exits_at_once_only_if_no_other_process_remains(monkeypatch, at_once) -> None:
    running = RunningService(monkeypatch, exits_at_once=at_once)
    running.clock.stop = running.service.stopService
    for _ in range(3):
        assert not running.exits
        running.send(signal.SIGTERM)
    assert running.exits == [True] * at_once
    assert running.service.exit_status == 128 + signal.SIGTERM
    assert "abort" in running.backend.calls


def test_reload_is_reported_as_finished_after_all_workers_are_replaced(monkeypatch) -> None:
    running = RunningService(monkeypatch, replacing=True)
    running.send(signal.SIGHUP)
    assert (running.reloads, running.notifier.said) == (["reload"], ["READY", "RELOADING"])
    running.send(signal.SIGHUP)
    running.backend.replacing = False
    for _ in range(2):
        running.service.reloaded()
    assert running.notifier.said == ["READY", "RELOADING", "RELOADING", "READY"]


def test_stop_signal_ends_readiness_before_the_drain_starts(monkeypatch) -> None:
    running = RunningService(monkeypatch)
    assert running.service.standing == (True, "fine")
    running.send(signal.SIGTERM)
    assert running.service.standing == (False, "fine")
    assert running.backend.state is State.SERVING
    running.send(signal.SIGHUP)
    assert running.reloads == []


@pytest.mark.parametrize(
    ("separate", "done", "said"), [(True, "renewal", []), (False, "reload", ["RELOADING", "READY"])]
)
def test_changed_certificates_are_renewed_separately_or_by_a_reload(monkeypatch, separate, done, said) -> None:
    listener = Listener()
    running = RunningService(monkeypatch, watches_certificates=True, listeners=(listener,))
    running.separate_renewal = separate
    running.clock.pump([1] * 3)
    assert running.reloads == []
    listener.tls_files = lambda: (__file__,)  # type: ignore[method-assign]  # replaced by the test
    running.clock.pump([1] * 3)
    assert running.reloads == [done]
    assert running.notifier.said == ["READY", *said]


@pytest.mark.parametrize(("certificates_read", "done"), [(True, ["reload"]), (False, ["reload", "renewal"])])
def test_certificates_that_a_failed_reload_did_not_read_are_loaded_later(monkeypatch, certificates_read, done) -> None:
    listener = Listener()
    running = RunningService(monkeypatch, watches_certificates=True, listeners=(listener,))
    running.separate_renewal = True
    running.certificates_read = certificates_read
    listener.tls_files = lambda: (__file__,)  # type: ignore[method-assign]  # replaced by the test
    running.send(signal.SIGHUP)
    running.clock.pump([1] * 3)
    assert running.reloads == done


def test_failing_periodic_check_is_logged_and_repeated(monkeypatch) -> None:
    running = RunningService(monkeypatch)
    running.backend.tick = lambda: 1 / 0
    running.clock.pump([1] * 2)
    del running.backend.tick
    running.clock.pump([1] * 2)
    assert [event["log_failure"].type for event in running.events if "log_failure" in event] == [ZeroDivisionError] * 2
    assert running.backend.calls == ["tick"] * 2


def test_watchdog_is_not_notified_while_the_backend_is_not_alive(monkeypatch) -> None:
    running = RunningService(monkeypatch)
    running.clock.pump([1] * 3)
    assert running.notifier.signs == 4
    running.backend.alive = False
    running.clock.pump([1] * 3)
    assert running.notifier.signs == 4


def test_stop_waits_for_the_backend_and_leaves_no_delayed_call(monkeypatch) -> None:
    running = RunningService(monkeypatch)
    done, again = running.service.stopService(), running.service.stopService()
    assert running.notifier.said == ["READY", "STOPPING"]
    running.clock.pump([1] * 3)
    assert (done.called, again.called) == (False, False)
    running.backend.drained.callback(None)
    assert (done.called, again.called) == (True, True)
    assert running.clock.getDelayedCalls() == []
