"""A worker: the messages that it receives from its supervisor, and the messages that it sends."""

import dataclasses
import json
import os
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.protocol import Factory
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.config.schema import Settings
from rtservice.config.sources import load_settings
from rtservice.hosting.aliases import ALIASES
from rtservice.interfaces import IStartable
from rtservice.net.listen_types import open_description
from rtservice.net.listener import Listener
from rtservice.net.tls import TLSError
from rtservice.pool import worker
from rtservice.pool.control import decode_value, encode, split_word
from rtservice.pool.start_message import adopt_listener, describe
from rtservice.pool.worker import Worker
from rtservice.pool.worker_counters import encode_counters
from rtservice.pool.worker_messages import Record, Records, WorkerMessages
from rtservice.process.counters import PHASES, CounterKey
from rtservice.process.slices import in_slices
from rtservice.process.state import State
from rtservice.process_settings import runtime_settings, share
from rtservice.steps import Steps, finish
from tests.support.fake_reactor import FakeReactor
from tests.support.unprintable import Unprintable

DEFAULTS = load_settings({}, {}, None, ALIASES)


def start(**given: Any) -> bytes:
    described = describe(DEFAULTS, [], options=(), directory="/")
    return encode("start", {**described, "slot": 0, "slots": 2, **given})


# --- the division of limits ---


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("total", [1, 2, 15, 16, 17, 1000, 1001])
def test_shares_add_up_to_the_total_and_are_at_least_one(total, slots) -> None:
    shares = [share(total, slot, slots) for slot in range(slots)]
    assert sum(shares) == max(total, slots)
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("slots", [1, 3, 4])
def test_limits_are_divided_among_workers(slots) -> None:
    current = dataclasses.replace(Settings(), max_connections=10, max_connections_per_peer=10)
    limits = [runtime_settings(current, slot=slot, slots=slots).limits for slot in range(slots)]
    assert sum(worker_limits.max_connections for worker_limits in limits) == 10
    assert {worker_limits.max_connections_per_peer for worker_limits in limits} == {{1: 10, 3: 4, 4: 3}[slots]}


def test_limit_per_peer_of_zero_stays_disabled_in_a_worker() -> None:
    assert runtime_settings(Settings(), slot=1, slots=3).limits.max_connections_per_peer == 0


def test_default_connection_limit_of_a_worker_is_its_descriptor_limit() -> None:
    whole = runtime_settings(Settings()).limits.max_connections
    assert runtime_settings(Settings(), slot=1, slots=3).limits.max_connections == whole


def test_workers_do_not_watch_certificates() -> None:
    current = dataclasses.replace(Settings(), watch_certificates=True)
    assert runtime_settings(current).watch_certificates
    assert not runtime_settings(current, slot=0, slots=2).watch_certificates


# --- listeners passed from the supervisor to a worker ---


@pytest.fixture
def adopted() -> Iterator[Callable[..., list[Listener]]]:
    """Return a function that opens descriptions for two slots and returns the listeners adopted for the second slot."""
    made: list[Listener] = []

    def adopt(*descriptions: str, before: Callable[[], None] = lambda: None) -> list[Listener]:
        opened = [listener for text in descriptions for listener in open_description(text, backlog=10, slots=2)]
        made.extend(opened)
        described = json.loads(json.dumps(describe(DEFAULTS, opened, options=(), directory="/")))
        before()
        found = []
        for given, listener in zip(described["listeners"], opened, strict=True):
            descriptor = os.dup(listener.of_slot(1).fileno())
            os.set_inheritable(descriptor, True)
            os.set_blocking(descriptor, True)
            found.append(finish(adopt_listener(given, descriptor)))
        made.extend(found)
        return found

    yield adopt
    for listener in made:
        listener.close()


def test_worker_adopts_its_socket_with_the_name_of_the_listener(adopted) -> None:
    [listener] = adopted("proxy:tcp:0:interface=127.0.0.1")
    assert listener.name.startswith("proxy:tcp:127.0.0.1:")
    assert listener.proxied
    assert listener.tls is None
    assert not listener.socket.getblocking()
    # Child processes of the worker must not inherit it.
    assert not listener.socket.get_inheritable()
    assert listener.shared


def test_worker_uses_certificates_that_it_cannot_read_from_disk(adopted, certificates, tmp_path) -> None:
    for name in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(certificates[name], tmp_path)
    description = (
        f"ssl:0:interface=127.0.0.1:privateKey={tmp_path}/server.key:certKey={tmp_path}/server.pem"
        f":clientCA={tmp_path}/ca.pem:minimum=1.3:alpn=h2,http/1.1"
    )
    [listener] = adopted(description, before=lambda: shutil.rmtree(tmp_path))
    assert listener.tls is not None
    assert listener.tls.minimum_version is ssl.TLSVersion.TLSv1_3
    assert listener.tls.verify_mode is ssl.CERT_REQUIRED
    assert [certificate.names for certificate in listener.certificates] == [("localhost",)]


def test_worker_uses_a_certificate_directory_that_it_cannot_read(adopted, certificates, tmp_path) -> None:
    directory = tmp_path / "certificates"
    directory.mkdir()
    for name in ("server.pem", "server.key"):
        shutil.copy(certificates[name], directory)
    [listener] = adopted(
        f"ssl:unix:{tmp_path}/rt.sock:certificates={directory}", before=lambda: shutil.rmtree(directory)
    )
    assert [certificate.path for certificate in listener.certificates] == [f"{directory}/server.pem"]
    assert listener.tls is not None
    assert listener.tls.sni_callback is not None


def test_start_message_contains_the_kind_of_each_socket_and_its_file(tmp_path, monkeypatch) -> None:
    opened = [
        *open_description("tcp:0:interface=127.0.0.1", backlog=10, slots=2),
        *open_description(f"unix:{tmp_path}/rt.sock", backlog=10, slots=2),
        Listener(socket.socket(), "tcp:passed", shared=True),
    ]
    try:
        described = describe(DEFAULTS, opened, options=(), directory="/")["listeners"]
        assert [described_listener["kind"] for described_listener in described] == ["slot", "own", "passed"]
        assert [described_listener["file"] for described_listener in described] == [None, opened[1].file, None]
    finally:
        for listener in opened:
            listener.close()


def test_worker_has_the_settings_of_its_supervisor() -> None:
    given = {"max-connections": "7", "greeting": r"\x00\xff", "proxy-from": ("10.0.0.0/8,::1",), "log-level": "debug"}
    current = load_settings(
        {name: value if isinstance(value, str) else value[0] for name, value in given.items()}, {}, None, ALIASES
    )
    described = json.loads(json.dumps(describe(current, [], options=(), directory="/")))
    assert load_settings(described["settings"], {}, None, ALIASES).settings == current.settings
    assert described["sources"] == current.sources


def test_removed_key_file_raises_an_error_in_the_supervisor(certificates, tmp_path) -> None:
    for name in ("server.pem", "server.key"):
        shutil.copy(certificates[name], tmp_path)
    files = f"privateKey={tmp_path}/server.key:certKey={tmp_path}/server.pem"
    [listener] = open_description(f"ssl:0:interface=127.0.0.1:{files}", backlog=10)
    try:
        (tmp_path / "server.key").unlink()
        with pytest.raises(TLSError, match=r"server\.key"):
            describe(DEFAULTS, [listener], options=(), directory="/")
    finally:
        listener.close()


# --- the control channel in the worker ---


class Channel(StringTransportWithDisconnection):
    """The channel of a worker; the output is decoded like in the supervisor."""

    @property
    def disconnected(self) -> bool:
        return not self.connected

    def __init__(self, protocol: Any) -> None:
        super().__init__(protocol)
        self.checked = WorkerMessages(slot=0, listeners=(), access=True)

    def messages(self) -> list[tuple[str, Any]]:
        """Return the messages sent since the last call, and check that the supervisor accepts each."""
        lines = self.value().splitlines()
        self.records: list[Record] = []
        self.checked.feed(self.value())
        self.clear()
        found = []
        for line in lines:
            word, text = split_word(line)
            found.append((word, decode_value(word, text)))
            message = self.checked.next()
            assert message is not None
            if isinstance(message, Records):
                self.records += message.records
        return found


@pytest.fixture
def connected() -> tuple[Worker, Channel, FakeReactor]:
    """A worker that has not received a message."""
    reactor = FakeReactor()
    made = Worker(reactor)
    channel = Channel(made)
    channel.protocol = made
    made.makeConnection(channel)
    return made, channel, reactor


def test_worker_sends_ready_then_heartbeats(connected, monkeypatch) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    made.dataReceived(start())
    said = channel.messages()
    assert [word for word, _ in said] == ["beat", "ready"]
    counters = said[0][1]
    assert counters["open"] == 0
    assert counters["memory"] > 1 << 20
    reactor.advance(1)
    assert [word for word, _ in channel.messages()] == ["beat"]
    made.dataReceived(encode("drain", ["slot"]))
    reactor.pump([1] * 5)
    assert reactor.stops
    assert channel.messages()[-1][0] == "beat"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"settings": {"max-connections": "many"}}, "max-connections"),
        ({"settings": {"no-such": "1"}}, "no-such"),
        ({"listeners": [{"kind": "own"}]}, "KeyError"),
    ],
)
def test_worker_that_cannot_start_reports_the_reason_and_exits(connected, given, reason) -> None:
    made, channel, reactor = connected
    made.dataReceived(start(**given))
    [problem] = [value for word, value in channel.messages() if word == "failed"]
    assert reason in problem
    assert made.status == 1
    assert reactor.stops == 1


class FailingFactory(Factory):
    """Raises an exception when it is started."""

    noisy = False

    def startFactory(self) -> None:
        raise LookupError("no database")


@implementer(IStartable)
class SlowFactory(Factory):
    """Never finishes its start."""

    noisy = False

    def start(self) -> Deferred[None]:
        return Deferred()


def test_worker_that_fails_after_ready_stops_without_reporting_a_failed_start(connected, monkeypatch) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    monkeypatch.setattr(worker, "globalLogPublisher", made.observe)
    made.dataReceived(start())
    channel.messages()
    made.failed("unix:/s cannot accept any more: broken")
    assert [word for word, _ in channel.messages()] == ["records"]
    [record] = channel.records
    assert record.text == "service failed, stopping: unix:/s cannot accept any more: broken"
    assert reactor.stops
    assert made.status == 0


def test_worker_that_fails_and_is_drained_reports_one_reason(connected, monkeypatch) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    monkeypatch.setattr(worker, "make_factory", lambda *given, **more: FailingFactory())
    made.dataReceived(start() + encode("drain", ["slot"]))
    assert [value for word, value in channel.messages() if word == "failed"] == [
        "FailingFactory did not start: LookupError: no database"
    ]
    assert made.status == 1


def test_worker_drained_before_its_factory_has_started_reports_a_failed_start(connected, monkeypatch) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    monkeypatch.setattr(worker, "make_factory", lambda *given, **more: SlowFactory())
    made.dataReceived(start())
    assert "ready" not in [word for word, _ in channel.messages()]
    made.dataReceived(encode("drain", ["slot"]))
    assert ("failed", "stopped before every listener was ready") in channel.messages()
    assert made.status == 1
    assert reactor.stops


# --- messages while it loads certificates ---


@pytest.fixture
def loading(connected, monkeypatch, tmp_path) -> Iterator[tuple[Worker, Channel, FakeReactor]]:
    """A worker whose certificates take ten slices to load."""
    made, channel, reactor = connected
    reactor.addReader = reactor.removeReader = lambda reader: None
    [listener] = open_description(f"unix:{tmp_path}/s", backlog=10)

    def adopting(given: dict[str, Any], descriptor: int) -> Steps[Listener]:
        for _ in range(10):
            yield
        return listener

    monkeypatch.setattr("twisted.internet.reactor", reactor)
    monkeypatch.setattr(worker, "adopt_listener", adopting)
    slow = {"size": 0.0, "pause": 0.1}
    monkeypatch.setattr(worker, "in_slices", lambda steps, clock, **how: in_slices(steps, clock, **{**how, **slow}))
    channel.checked = WorkerMessages(slot=0, listeners=[listener.name], access=True)
    made.dataReceived(start(listeners=[{"kind": "slot", "file": None}], slots=2))
    assert channel.messages() == []
    yield made, channel, reactor
    listener.close()


def test_worker_loads_its_certificates_in_slices_before_it_is_ready(loading) -> None:
    made, channel, reactor = loading
    reactor.pump([0.1] * 9)
    assert channel.messages() == []
    reactor.advance(0.1)
    assert [word for word, _ in channel.messages()] == ["beat", "ready"]
    made.dataReceived(encode("drain", []))
    reactor.pump([1] * 5)
    assert reactor.stops


@pytest.mark.parametrize(
    "message", [encode("abort_drain"), encode("drain", []), b"garbage\n"], ids=["abort_drain", "drain", "garbage"]
)
@pytest.mark.parametrize("slices", [0, 5])
def test_worker_stops_loading_if_it_has_to_end_at_once(loading, message, slices) -> None:
    made, channel, reactor = loading
    reactor.pump([0.1] * slices)
    made.dataReceived(message)
    reactor.pump([1] * 6)
    assert reactor.stops
    assert "ready" not in [word for word, _ in channel.messages()]
    assert reactor.getDelayedCalls() == []


def test_worker_that_has_to_serve_its_backlog_finishes_loading_then_drains(loading) -> None:
    made, _, reactor = loading
    made.dataReceived(encode("drain", ["slot"]))
    assert not reactor.stops
    reactor.pump([0.1] * 10)
    assert made._server is not None
    assert made._server.state in (State.DRAINING, State.STOPPED)
    reactor.pump([1] * 5)
    assert reactor.stops
    made.dataReceived(encode("abort_drain"))  # too late, has no effect


def test_aborted_drain_cancels_loading(loading) -> None:
    made, _, reactor = loading
    made.dataReceived(encode("drain", ["slot"]))
    made.dataReceived(encode("abort_drain"))
    reactor.pump([1] * 6)
    assert reactor.stops
    assert made._server is None


def test_loading_worker_removes_its_socket_files_when_its_supervisor_dies(connected, monkeypatch, tmp_path) -> None:
    made, _, reactor = connected
    monkeypatch.setattr(worker, "adopt_listener", lambda given, descriptor: iter([None] * 10))
    monkeypatch.setattr(worker, "in_slices", lambda steps, clock, **how: in_slices(steps, clock, size=0.0, pause=0.1))
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.touch()
    successors = files[2]
    described = [{"kind": "own", "file": [str(file), file.stat().st_ino + (file == successors)]} for file in files]
    made.dataReceived(start(listeners=[{"kind": "slot", "file": None}, *described]))
    assert made._server is None
    made._orphaned()
    assert list(tmp_path.iterdir()) == [successors]
    made.dataReceived(encode("abort_drain"))
    reactor.pump([1] * 6)


def test_share_received_while_loading_applies_from_the_start(loading) -> None:
    made, _, reactor = loading
    made.dataReceived(encode("share", 5))
    reactor.pump([0.1] * 10)
    assert made._server.settings == runtime_settings(Settings(), slot=0, slots=5)
    made.dataReceived(encode("drain", []))
    reactor.pump([1] * 5)


def test_worker_whose_supervisor_dies_before_the_start_message_stops(connected) -> None:
    _, channel, reactor = connected
    channel.loseConnection()
    assert reactor.stops == 1


def test_worker_whose_supervisor_dies_removes_only_its_socket_files(connected, tmp_path) -> None:
    made, channel, _ = connected
    for name in ("ours", "successors"):
        (tmp_path / name).touch()
    inode = (tmp_path / "ours").stat().st_ino
    made._files = [(f"{tmp_path}/ours", inode), (f"{tmp_path}/successors", inode), (f"{tmp_path}/gone", inode)]
    channel.loseConnection()
    assert os.listdir(tmp_path) == ["successors"]


@pytest.mark.parametrize("finish", [["slot", "own"], ["slot"], []])
def test_draining_worker_keeps_files_that_its_supervisor_already_removed(connected, tmp_path, finish) -> None:
    made, channel, _ = connected
    (tmp_path / "s").touch()  # a file of the successor with the same inode number, which can be reused
    made._files = [(f"{tmp_path}/s", (tmp_path / "s").stat().st_ino)]
    made._ready = True
    made._server = SimpleNamespace(drain=Deferred)
    made.dataReceived(encode("drain", finish))
    channel.loseConnection()
    assert os.listdir(tmp_path) == (["s"] if "own" in finish else [])


def test_worker_asked_to_end_requests_its_replacement(connected) -> None:
    made, channel, reactor = connected
    made.ask_for_replacement()
    assert channel.messages() == [("leave", None)]
    assert not reactor.stops


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"\xff\n", b"no\n", b"share {\n", b"share 0\n", b"rows {}\n", b"rows null\n"),
        *(b"x" * (64 << 20) + b"y", b"share " + b"[" * 100_000 + b"\n", start()),
    ],
    ids=lambda garbage: repr(garbage[:20]),
)
def test_worker_drains_and_stops_when_its_supervisor_sends_an_invalid_message(connected, monkeypatch, garbage) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    made.dataReceived(start())
    channel.messages()
    made.dataReceived(garbage)
    made.dataReceived(garbage)
    made.dataReceived(encode("rows", {"id": 1, "sort": "-age", "count": 5}))
    reactor.pump([1] * 5)
    assert reactor.stops
    said = channel.messages()
    assert {word for word, _ in said} <= {"records", "beat"}
    assert said[-1][0] == "beat"


def test_worker_that_receives_an_invalid_first_message_stops(connected) -> None:
    made, channel, reactor = connected
    made.dataReceived(b"garbage\n")
    assert channel.messages() == []
    assert reactor.stops == 1


def test_heartbeat_with_many_counters_is_sent_in_several_messages(connected, monkeypatch) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    channel.checked = WorkerMessages(slot=0, listeners=[f"tcp:{number}" for number in range(300)], access=True)
    made.dataReceived(start())
    channel.messages()
    more = {CounterKey(name, "", f"tcp:{number}"): 1 for number in range(300) for name in ("in", "out")}
    counters = made._server.counters
    monkeypatch.setattr(made._server, "counters", lambda: counters() | more)
    reactor.advance(1)
    beats = [value for word, value in channel.messages() if word == "beat"]
    assert len(beats) == 4
    sent = {name: count for beat in beats for name, count in beat.items()}
    assert encode_counters(more).items() <= sent.items()


def test_number_of_rows_is_reduced_to_fit_one_message(connected, monkeypatch) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    name = "unix:/" + "\U0001f600" * 100
    channel.checked = WorkerMessages(slot=0, listeners=[name], access=True)
    channel.checked.ask(1, 500)
    made.dataReceived(start())
    channel.messages()
    row = ["x" * 64, name, PHASES[2], 1.0, None, 1, 2]
    monkeypatch.setattr(made._server.connections, "rows", lambda sort, count: succeed([row] * count))
    made.dataReceived(encode("rows", {"id": 1, "sort": "-age", "count": 500}))
    [(_, answer)] = channel.messages()
    assert 100 < len(answer["rows"]) < 500


def test_request_for_rows_is_answered_if_the_connections_cannot_be_listed(connected, monkeypatch) -> None:
    made, channel, _ = connected
    monkeypatch.setattr("twisted.internet.reactor", made._reactor)
    made.dataReceived(start())
    channel.messages()
    channel.checked.ask(1, 500)
    monkeypatch.setattr(made._server.connections, "rows", lambda sort, count: fail(LookupError("no")))
    made.dataReceived(encode("rows", {"id": 1, "sort": "-age", "count": 500}))
    assert ("rows", {"id": 1, "rows": []}) in channel.messages()


def test_start_failure_of_a_worker_is_reported_in_a_short_text(connected) -> None:
    made, channel, _ = connected
    made.dataReceived(start(settings={"x" * 1_000_000: "1"}))
    [problem] = [value for word, value in channel.messages() if word == "failed"]
    assert len(problem) <= 4096


def test_access_log_lines_are_sent_in_messages_within_the_limits(connected) -> None:
    made, channel, reactor = connected
    for _ in range(250):
        made._access(f"start=1 peer={'x' * 2000} worker=0\n")
        made._access('start=1 peer="' + r"\x00" * 300 + '" worker=0\n')
    reactor.advance(0.1)
    assert sum(len(lines) for word, lines in channel.messages() if word == "access") == 500
    for _ in range(1000):
        made._access("start=1 worker=0\n")
    reactor.advance(0.1)
    assert [len(lines) for _, lines in channel.messages()] == [100] * 10


# --- log records ---


def record(made: Worker, text: str, **fields: Any) -> None:
    Logger(namespace="its.own", observer=made.observe).info(text, **fields)  # type: ignore[arg-type]  # a function is an observer


def only_record(channel: Channel, reactor: FakeReactor) -> Record:
    """Return the only record sent, as decoded by the supervisor."""
    reactor.advance(0.1)
    [(word, _)] = channel.messages()
    assert word == "records"
    [only] = channel.records
    return only


def test_a_record_is_sent_as_finished_text_with_its_fields(connected) -> None:
    made, channel, reactor = connected
    record(made, "{peer} went", peer="1.2.3.4", seconds=1.5)
    only = only_record(channel, reactor)
    assert (only.text, only.level, only.namespace) == ("1.2.3.4 went", LogLevel.info, "its.own")
    assert only.fields == {"peer": "1.2.3.4", "seconds": 1.5}


def test_a_traceback_is_sent_with_its_record(connected) -> None:
    made, channel, _ = connected
    try:
        raise ValueError("no")
    except ValueError:
        record(made, "it raised", log_failure=Failure())
    channel.messages()
    [only] = channel.records
    assert only.text == "it raised"
    assert "ValueError: no" in only.traceback


@pytest.mark.parametrize(
    "value", ["x" * 1_000_000, b"\xff\x00", object(), {1, 2}, float("nan"), Unprintable(), "\ud800"]
)
def test_record_with_any_value_is_sent_as_one_accepted_message(connected, value) -> None:
    made, channel, reactor = connected
    record(made, "about {value}", value=value)
    assert only_record(channel, reactor).text.startswith(("about ", "MESSAGE LOST"))


def test_self_referencing_record_is_sent_as_text(connected) -> None:
    made, channel, reactor = connected
    loop: list[Any] = []
    loop.append(loop)
    record(made, "about {value}", value=loop)
    assert only_record(channel, reactor).text == "about [[...]]"


def test_records_are_sent_in_order_and_an_error_at_once(connected) -> None:
    made, channel, _ = connected
    record(made, "first")
    assert channel.messages() == []
    Logger(namespace="its.own", observer=made.observe).error("second")  # type: ignore[arg-type]  # a function is an observer
    channel.messages()
    assert [sent.text for sent in channel.records] == ["first", "second"]


def test_records_that_the_supervisor_does_not_read_are_dropped_and_counted(connected, monkeypatch) -> None:
    made, channel, reactor = connected
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    monkeypatch.setattr(worker, "globalLogPublisher", made.observe)
    made.dataReceived(start())
    channel.messages()
    made.pauseProducing()
    for _ in range(3):
        record(made, "hello")
    assert channel.messages() == []
    made.resumeProducing()
    assert only_record(channel, reactor).text == "log records dropped: 3"
