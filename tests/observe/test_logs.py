"""Formats of records, log levels, and outputs that fail, block or recover."""

import errno
import fcntl
import json
import math
import os
import re
import socket
import threading
from datetime import datetime

import pytest
from twisted.logger import Logger, LogLevel, formatEventAsClassicLogText, globalLogPublisher
from twisted.python import log as legacy
from twisted.python.failure import Failure

from rtservice.events import ACCEPT_PAUSED
from rtservice.observe import lines, logs
from rtservice.observe.lines import LineWriter, Stream
from rtservice.observe.logs import AccessLog, Levels, Log, Observer, utc_time


class RaisesOnStr:
    """An object that cannot be converted to text."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def failure(text: str = "wrong") -> Failure:
    try:
        raise ValueError(text)
    except ValueError:
        return Failure()


def legacy_event(*message, **fields):
    """Return the event that twisted.python.log emits for these arguments."""
    seen = []
    globalLogPublisher.addObserver(seen.append)
    try:
        legacy.theLogPublisher.msg(*message, **fields)
    finally:
        globalLogPublisher.removeObserver(seen.append)
    return seen[-1]


def event(template="it is {what}", level=LogLevel.info, **fields):
    seen = []
    Logger("name.space", observer=seen.append).emit(level, template, what="so", **fields)
    return seen[0] | {"log_time": 1795559892.000417}


itself: list[object] = []
itself.append(itself)

EVENTS = {
    "usual": event(),
    "level": event(level=LogLevel.error),
    "lines": event("a\nb\r\nc"),
    "call": event("{f()}", f=lambda: "called"),
    "attributes": event("{a.real} {b[x]} {b[x]!r} {a:05d}", a=1, b={"x": "y"}),
    "broken template": event("{"),
    "missing field": event("{missing}"),
    "positional": event("{}"),
    "no template": event(None),
    "empty": event(""),
    "bytes template": event(b"caf\xc3\xa9"),
    "raises on str": event("{thing}", thing=RaisesOnStr()),
    "failure": event(log_failure=failure()),
    "system": event(log_system="a system"),
    "system raises on str": event(log_system=RaisesOnStr()),
    "no time": event() | {"log_time": None},
    "half a second": event() | {"log_time": 1795559892.5},
    "before 1970": event() | {"log_time": -0.5},
    "no level": {key: value for key, value in event().items() if key != "log_level"},
    "nothing": {},
    "legacy": legacy_event("old", "style", system="sys"),
    "legacy failure": legacy_event(failure=failure(), isError=1, why="because"),
    "legacy format": legacy_event(format="%(a)s", a=b"\xff"),
    "control bytes": event("\x1b[31m\u2028\x9b\x85\0{what}"),
    "lone surrogate": event("\udc80 {what} \U0001f600", key="\ud800\\udc00", deep={"\udfff": ["\udfff"]}),
    "standard names": event() | {"time": 1, "level": 2, "namespace": 3, "message": 4, "traceback": 5, "slot": 6},
    "values": event(a=[1, None, True, {"x": (1.5, b"\xff")}], b=math.nan, c={1: 2}, d={(1, 2): 3}, e=itself, f={1}),
}


@pytest.mark.parametrize("given", EVENTS.values(), ids=EVENTS.keys())
def test_the_classic_format_equals_twisteds(given) -> None:
    assert logs._classic(dict(given)) == (formatEventAsClassicLogText(dict(given)) or "")


@pytest.mark.parametrize("given", EVENTS.values(), ids=EVENTS.keys())
def test_each_record_is_one_line_of_ascii_json(given) -> None:
    line = logs._json_line(dict(given))
    assert line.isascii()
    assert len(line.splitlines()) == 1

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(line, parse_constant=reject)
    assert [*read][:4] == ["time", "level", "namespace", "message"]
    datetime.fromisoformat(read["time"])
    json.dumps(read, ensure_ascii=False).encode()  # no lone surrogate


@pytest.mark.parametrize("given", EVENTS.values(), ids=EVENTS.keys())
def test_text_lines_are_printable_and_continuation_lines_are_indented(given) -> None:
    first, *more = logs._text_line(dict(given)).removesuffix("\n").split("\n")
    assert first.isprintable()
    assert all(line.startswith("    ") and line.isprintable() for line in more)


def test_json_has_the_standard_fields_and_the_fields_of_the_record() -> None:
    assert json.loads(logs._json_line(EVENTS["standard names"])) == {
        **{"time": "2026-11-24T22:38:12.000417Z", "level": "info", "namespace": "name.space", "message": "it is so"},
        **{"slot": 6, "what": "so"},
        **{"time_": 1, "level_": 2, "namespace_": 3, "message_": 4, "traceback_": 5},
    }
    values = json.loads(logs._json_line(EVENTS["values"]))
    assert values["a"] == [1, None, True, {"x": [1.5, "\\xff"]}]
    assert (values["b"], values["c"], values["d"], values["f"]) == ("nan", {"1": 2}, "{(1, 2): 3}", "{1}")
    assert values["e"] == "[[...]]"
    # A field that equals the message is omitted.
    assert "record" not in json.loads(logs._json_line(event("{record}", record="all of it")))


def test_json_has_the_name_and_the_fields_of_a_declared_event() -> None:
    records: list = []
    ACCEPT_PAUSED.log(Logger("rtservice.net.port", observer=records.append), listener="tcp:1", problem="no memory")
    read = json.loads(logs._json_line({**records[0], "slot": 3}))
    del read["time"]
    assert read == {
        **{"level": "error", "namespace": "rtservice.net.port", "message": "accepting on tcp:1 paused: no memory"},
        **{"event": "accept.paused", "slot": 3, "listener": "tcp:1", "problem": "no memory"},
    }
    assert list(read)[3:5] == ["event", "slot"]


def test_json_does_not_repeat_a_text_that_is_a_field_event() -> None:
    assert "event" not in json.loads(logs._json_line(event("{event}", event="all of it")))
    assert json.loads(logs._json_line(event("{slot}", slot=3)))["slot"] == 3


def test_json_keeps_a_field_event_of_a_hosted_protocol() -> None:
    assert json.loads(logs._json_line(event("hi", event={"a": 1})))["event"] == {"a": 1}


def test_json_has_a_traceback_as_a_field() -> None:
    for name, message in (("failure", "it is so"), ("legacy failure", "because")):
        read = json.loads(logs._json_line(EVENTS[name]))
        assert read["message"] == message
        assert read["traceback"].startswith("Traceback (most recent call last)")
        assert read["traceback"].endswith("ValueError: wrong\n")
        assert "failure" not in read


def test_text_shows_time_level_origin_and_message() -> None:
    assert logs._text_line(event(slot=3)) == "2026-11-24T22:38:12.000417Z info     name.space worker 3: it is so\n"
    shown = logs._text_line(EVENTS["failure"])
    assert shown.startswith("2026-11-24T22:38:12.000417Z info     name.space: it is so\n    Traceback")
    assert shown.endswith("\n    builtins.ValueError: wrong\n")
    assert r": \x1b[31m\u2028\x9b\x85\x00so" in logs._text_line(EVENTS["control bytes"])
    coloured = logs._text_line(EVENTS["level"], coloured=True)
    assert coloured != logs._text_line(EVENTS["level"])
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == logs._text_line(EVENTS["level"])


@pytest.mark.parametrize(
    ("when", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (1795559892.9999999, "2026-11-24T22:38:13.000000Z"),
        (-0.25, "1969-12-31T23:59:59.750000Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(when, text) -> None:
    assert utc_time(when) == text


# --- levels ---


def test_the_longest_matching_namespace_sets_the_level() -> None:
    levels = Levels({"rtservice": "info", "rtservice.net": "debug", "twisted": "warn"})

    def lowest_level(namespace: str) -> str:
        return next(level.name for level in LogLevel.iterconstants() if levels.allow(namespace, level))

    names = ["rtservice", "rtservice.net.port", "rtservice.network", "twisted.web", "twistedish", "user"]
    assert [lowest_level(name) for name in names] == ["info", "debug", "info", "warn", "debug", "debug"]
    levels.change({"rtservice": "error"})
    assert [lowest_level(name) for name in names] == ["error", "error", "error", "debug", "debug", "debug"]
    for number in range(5000):
        assert levels.allow(f"made up {number}", None)


def test_log_skips_events_below_its_level_and_equals_twisteds_logger_above() -> None:
    seen, theirs = [], []
    log = Log(Levels({"rtservice": "warn"}), seen.append)
    log.info("{a}", a=1)
    assert seen == []
    log.warn("{a}", a=1)
    log.failure("{a}", failure(), a=2)
    other = Logger("rtservice", observer=theirs.append)
    other.warn("{a}", a=1)
    other.failure("{a}", failure(), a=2)
    for ours, twisteds in zip(seen, theirs, strict=True):
        assert set(ours) == set(twisteds)
        assert {key: ours[key] for key in ("a", "log_level", "log_namespace", "log_source", "log_format")} == {
            key: twisteds[key] for key in ("a", "log_level", "log_namespace", "log_source", "log_format")
        }


# --- writing lines ---


class Output:
    """Accepts `room` bytes, then raises `error`."""

    title = "an output"
    trouble = ""

    def __init__(self) -> None:
        self.taken = b""
        self.writes = 0
        self.room = 1 << 30
        self.error = errno.EAGAIN
        self.turned = 0

    def write(self, data) -> int:
        self.writes += 1
        part = bytes(data[: self.room])
        if not part:
            raise OSError(self.error, os.strerror(self.error))
        self.room -= len(part)
        self.taken += part
        return len(part)

    def reopen(self) -> None: ...

    def retry(self) -> None: ...

    def in_place(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_lines_are_batched_only_while_the_reactor_runs(reactor) -> None:
    output = Output()
    under_test = LineWriter(output)
    under_test.put("a\n")
    assert output.taken == b"a\n"
    under_test.start(reactor)
    under_test.put("b\n")
    under_test.put("c\n")
    assert output.taken == b"a\n"
    reactor.advance(0.1)
    assert (output.taken, output.writes) == (b"a\nb\nc\n", 2)
    assert reactor.getDelayedCalls() == []  # no timer runs while there is nothing to write
    under_test.put("d\n")
    for call in reactor.at_end:
        call()
    under_test.put("e\n")
    assert output.taken == b"a\nb\nc\nd\ne\n"


def test_an_error_and_a_large_batch_are_written_immediately(reactor) -> None:
    output = Output()
    under_test = LineWriter(output)
    under_test.start(reactor)
    observer = Observer(lambda event: f"{event['log_level'].name}\n", under_test, Levels({}))
    observer({"log_level": LogLevel.warn})
    assert output.taken == b""
    observer({"log_level": LogLevel.error})
    assert output.taken == b"warn\nerror\n"
    for _ in range(100):
        under_test.put("x" * 1023 + "\n")
    assert len(output.taken) == 11 + 64 * 1024


def test_a_line_of_another_thread_is_written_by_the_reactor_thread(reactor) -> None:
    output = Output()
    under_test = LineWriter(output)
    under_test.start(reactor)
    thread = threading.Thread(target=under_test.put, args=("a\n",))
    thread.start()
    thread.join()
    assert output.taken == b""
    for call in reactor.from_threads:
        call()
    assert output.taken == b"a\n"


def test_an_urgent_line_of_another_thread_does_not_wait_for_the_reactor(reactor) -> None:
    output = Output()
    under_test = LineWriter(output)
    under_test.start(reactor)
    under_test.put("a\n")
    thread = threading.Thread(target=under_test.put, args=("b\n",), kwargs={"at_once": True})
    thread.start()
    thread.join()
    assert output.taken == b"a\nb\n"


def test_a_line_logged_during_a_write_is_written_after_it() -> None:
    output = Output()
    under_test = LineWriter(output)
    write = output.write

    def write_and_log(data) -> int:
        output.write = write
        under_test.put("found by the garbage collector\n", at_once=True)
        return write(data)

    output.write = write_and_log
    under_test.put("a\n")
    assert output.taken == b"a\nfound by the garbage collector\n"


def test_a_lone_surrogate_is_written_as_an_escape() -> None:
    output = Output()
    LineWriter(output).put("a\udc80\u00e9\n")
    assert output.taken == b"a\\udc80\xc3\xa9\n"


@pytest.mark.parametrize("problem", [errno.EAGAIN, errno.ENOSPC])
def test_lines_are_buffered_during_a_short_write_failure(problem, logged, reactor) -> None:
    output = Output()
    under_test = LineWriter(output)
    under_test.start(reactor)
    output.room, output.error = 3, problem
    under_test.put("abc\n", at_once=True)
    under_test.put("def\n")
    reactor.advance(0.1)
    assert output.taken == b"abc"
    output.room = 1000
    reactor.advance(0.1)
    assert (output.taken, under_test.dropped) == (b"abc\ndef\n", 0)
    assert reactor.getDelayedCalls() == []
    full = ["an output cannot be written: No space left on device", "an output is written again, lines dropped: 0"]
    assert logged() == (full if problem == errno.ENOSPC else [])


@pytest.mark.parametrize("problem", [errno.EAGAIN, errno.ENOSPC, errno.EPIPE, errno.EBADF, errno.EIO])
def test_a_lasting_write_failure_has_a_bounded_buffer_and_a_count_of_dropped_lines(problem, logged, reactor) -> None:
    output = Output()
    under_test = LineWriter(output)
    under_test.start(reactor)
    output.room, output.error = 0, problem
    line = "x" * 1023 + "\n"
    for _ in range(5000):
        under_test.put(line)
    reactor.pump([0.1] * 100)
    assert output.writes < 200  # 100 batches, and one write per clock tick
    assert len(under_test._kept) < 1.1 * (1 << 20)
    words = "the reader is too slow" if problem == errno.EAGAIN else os.strerror(problem)
    assert logged() == [f"an output cannot be written: {words}"]
    output.room = 1 << 30
    reactor.advance(0.1)
    under_test.put("last\n")
    reactor.advance(0.1)
    assert output.taken.count(line.encode()) + under_test.dropped == 5000
    assert output.taken.endswith(b"last\n")
    assert logged()[1:] == [f"an output is written again, lines dropped: {under_test.dropped}"]
    assert under_test.dropped >= 3900


def test_a_slowly_read_pipe_is_retried_more_often(reactor) -> None:
    output = Output()
    under_test = LineWriter(output)
    under_test.start(reactor)
    output.room = 1
    under_test.put("abcdef\n", at_once=True)
    for _ in range(6):
        output.room = 1
        reactor.advance(0.01)
    assert output.taken == b"abcdef\n"


# --- outputs ---


def fill(descriptor: int) -> None:
    """Fill a pipe or socket to the last byte."""
    os.set_blocking(descriptor, False)
    for size in (1 << 16, 1):
        try:
            while True:
                os.write(descriptor, bytes(size))
        except BlockingIOError:
            pass
    os.set_blocking(descriptor, True)


@pytest.fixture(params=["pipe", "pipe of another user", "socket", "terminal"])
def stream_ends(request, monkeypatch):
    """The descriptors of a reader and a writer, and a Stream on the writer."""
    if request.param == "terminal":
        reader, writer = os.openpty()
    elif request.param == "socket":
        reader, writer = (sock.detach() for sock in socket.socketpair())
    else:
        reader, writer = os.pipe()
    with monkeypatch.context() as patch:
        if request.param == "pipe of another user":

            def reject(*arguments) -> int:
                raise PermissionError(errno.EACCES, "Permission denied")

            patch.setattr(lines.os, "open", reject)
        stream = Stream(writer, "it")
    yield reader, writer, stream
    os.close(reader)
    os.close(writer)


def test_writing_to_an_unread_stream_never_blocks(stream_ends) -> None:
    reader, writer, stream = stream_ends
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    taken = 0
    try:
        while True:
            taken += stream.write(bytearray(b"x" * 999 + b"\n"))
    except BlockingIOError:
        pass
    assert taken > 2000
    assert not lines.wait_for_room(stream, 0)
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags  # other processes share them
    received = 0
    while received < taken:
        received += os.read(reader, 1 << 16).replace(b"\r", b"").__len__()
    assert lines.wait_for_room(stream, 30)
    assert stream.write(bytearray(b"again\n")) == 6


def test_the_last_lines_of_a_process_wait_for_a_slow_reader() -> None:
    reader, writer = os.pipe()
    fill(writer)
    under_test = LineWriter(Stream(writer, "it"))
    under_test.put("last\n")
    received = b""

    def read() -> None:
        nonlocal received
        while not received.endswith(b"last\n"):
            received += os.read(reader, 1 << 16)

    thread = threading.Thread(target=read)
    thread.start()
    under_test.finish()
    thread.join(30)
    assert received.endswith(b"last\n")
    fill(writer)
    under_test.put("unread\n")
    under_test.finish()  # returns
    os.close(reader)
    os.close(writer)


# --- the access log ---


def test_an_access_log_line_has_its_fields_in_order_and_quoted_values() -> None:
    out = []
    AccessLog(out.append, slot=2)("192.0.2.1:4711", "tcp:[::]:8080", 0.0125, 5, 27, "peer finished")
    time, _, rest = out[0].partition(" ")
    assert re.fullmatch(r"start=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time)
    assert rest == (
        'peer=192.0.2.1:4711 listener=tcp:[::]:8080 seconds=0.013 in=5 out=27 reason="peer finished" worker=2\n'
    )
    AccessLog(out.append)('unix:/a b="\\x1b\u2028', "unix:s", 0, 0, 0, "")
    assert r' peer="unix:/a b=\"\\x1b\u2028" listener=unix:s ' in out[1]
    assert out[1].endswith(' reason="" worker=-\n')
