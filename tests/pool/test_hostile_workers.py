"""Workers that send invalid messages or floods to the supervisor."""

import io
import signal
from typing import Any

import pytest
from twisted.logger import LegacyLogObserverWrapper, LogLevel, formatEvent
from twisted.python.log import textFromEventDict

from rtservice.pool.control import BEAT, CONTROL_OUT, encode
from rtservice.pool.worker_process import WorkerPhase
from rtservice.process.counters import ENDED, OPEN_CONNECTIONS

INVALID = [
    b"\xff\xfe rubbish \x00\n",
    b"hello\n",
    b"beat [1]\n",
    b'beat {"open": "x"}\n',
    b"beat {\n",
    b"records [[]]\n",
    b"ready null\n",
    b'failed "after all"\n',
    b'access ["start=1 worker=1\\n"]\n',
    b'rows {"id": 1, "rows": []}\n',
    b"x" * 300_000,
]


@pytest.mark.parametrize("invalid", INVALID, ids=lambda invalid: repr(invalid[:24]))
def test_only_the_worker_that_sends_an_invalid_message_is_killed_and_replaced(world, invalid) -> None:
    running = world()
    first, second = running.serve()
    second.writes(invalid)
    assert second.signals == [signal.SIGKILL]
    [violation] = running.recorded("worker.violation")
    assert (violation["slot"], violation["pid"]) == (1, 1001)
    assert len(violation["problem"]) < 180
    second.says("beat", {"open": 10})
    second.writes(invalid)
    assert len(running.recorded("worker.violation")) == 1
    second.dies(9)
    running.pass_time(1)
    running.processes[-1].says("ready")
    assert first.signals == []
    assert running.pool.status == "serving: 2 of 2 workers ready, 0 connections open"


def test_only_the_worker_whose_record_cannot_be_handled_is_killed(world, monkeypatch) -> None:
    running = world()
    first, second = running.serve()
    monkeypatch.setattr(running.pool, "publish", lambda event: 1 / 0)
    second.logs("hello")
    monkeypatch.undo()
    assert second.killed
    assert not first.killed
    assert running.recorded("worker.message_failed", slot=1, pid=1001)[0]["problem"].startswith("ZeroDivisionError")


def test_format_strings_from_a_worker_are_not_evaluated(world) -> None:
    running = world(1)
    [only] = running.serve()
    text = "{a:>2000000000} {a.__class__} %(a)2000000000d %s"
    only.writes(encode("records", [["warn", "{x}", 5.0, text, "{y}", {"a": 1, "log": "{z}"}]]))
    event = running.events[-1]
    assert formatEvent(event) == text
    assert event["log_format"] == "{log_text}"
    assert textFromEventDict(legacy(event)) == text + "\n{y}"
    assert event.pop("log_failure").getTraceback() == "{y}"


def legacy(event: dict[str, Any]) -> dict[str, Any]:
    """Return the event that an observer of twisted.python.log receives."""
    found: list[dict[str, Any]] = []
    LegacyLogObserverWrapper(found.append)(dict(event))  # type: ignore[arg-type]  # a function is an observer
    return found[0]


def test_failure_from_a_worker_contains_its_traceback_as_text(world) -> None:
    running = world(1)
    [only] = running.serve()
    traceback = "Traceback:\n  at x\x1b\nbuiltins.ValueError: no"
    only.writes(encode("records", [["critical", "a", 5.0, "it failed", traceback, {}]]))
    failure = running.events[-1].pop("log_failure")
    assert failure.getErrorMessage() == "builtins.ValueError: no"
    assert failure.getTraceback() == failure.getBriefTraceback() == "Traceback:\n  at x\\x1b\nbuiltins.ValueError: no"
    assert failure.getTracebackObject() is None
    file = io.StringIO()
    failure.printTraceback(file)
    assert file.getvalue() == failure.getTraceback()


def test_worker_that_repeatedly_sends_invalid_messages_is_replaced_with_backoff(world) -> None:
    running = world()
    first, _ = running.serve()
    waits = []
    for _ in range(4):
        running.processes[-1].writes(b"rubbish\n")
        running.processes[-1].dies(9)
        waits.append(round(running.pool.slots[1].respawn.getTime() - running.reactor.seconds(), 3))
        running.reactor.advance(waits[-1])
        running.processes[-1].says("ready")
    assert waits == [0.1, 0.2, 0.4, 0.8]
    assert first.signals == []


def test_only_heartbeats_reset_the_hang_timeout(world) -> None:
    running = world()
    _, second = running.serve()
    for _ in range(30):
        second.logs("still here")
        second.writes(b"a line", 1)
        running.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2]


def test_workers_that_repeatedly_request_replacement_are_replaced_with_backoff(world) -> None:
    running = world(1)
    running.serve()
    counts = []
    for _ in range(100):
        for process in running.alive():
            if process.protocol.phase is WorkerPhase.STARTING:
                process.says("ready")
            if "drain" in process.words():
                process.dies()
            else:
                process.says("leave")
        running.pass_time(1)
        counts.append(len(running.processes))
    assert counts[0] == 2
    assert 5 < counts[-1] < 15  # not 100
    assert running.pool.slots[0].ready


def test_early_replacement_request_is_delayed_by_the_backoff(world) -> None:
    running = world(1)
    running.serve()
    for _ in range(5):  # 0.1, 0.2, 0.4, 0.8, 1.6
        running.processes[-1].says("leave")
        running.pass_time(1)
        running.processes[-1].says("ready")
        running.processes[-2].dies()
        running.pass_time(1)
    last = running.processes[-1]
    last.says("leave")
    assert last.words() == ["start"]
    running.pass_time(4)
    running.processes[-1].says("ready")
    assert last.words() == ["start", "drain"]


def test_workers_that_report_too_much_memory_are_replaced_with_backoff(world) -> None:
    running = world(1, max_memory=100)
    running.serve()
    for _ in range(100):
        for process in running.alive():
            if process.protocol.phase is WorkerPhase.STARTING:
                process.says("ready")
            process.says("beat", {"memory": 10**15})
            if "drain" in process.words():
                process.dies()
        running.pass_time(1)
    assert 5 < len(running.processes) < 15  # not 100


def test_worker_that_does_not_answer_gets_a_bounded_number_of_requests_and_is_killed(world) -> None:
    running = world()
    first, second = running.serve()
    answers: list[Any] = []
    for _ in range(10):
        for _ in range(10):
            running.service.rows("-age", 5).addCallback(answers.append)
        for word, value in first.told[1:]:
            first.says(word, {"id": value["id"], "rows": []})
        del first.told[1:]
        running.pass_time(2)
    assert [missing for _, missing in answers] == [[1]] * 100
    assert second.words() == ["start"] + ["rows"] * 16
    assert second.signals == []
    running.pass_time(10)
    assert second.signals == [signal.SIGKILL]
    assert running.recorded("worker.unresponsive", pid=1001, seconds=30.0)
    assert first.signals == []


def test_late_answer_is_accepted_and_a_second_answer_is_a_violation(world) -> None:
    running = world(1)
    [only] = running.serve()
    answers: list[Any] = []
    running.service.rows("-age", 5).addCallback(answers.append)
    running.pass_time(5)
    assert answers == [([], [0])]
    only.says("rows", {"id": 1, "rows": []})
    assert not only.killed
    only.says("rows", {"id": 1, "rows": []})
    assert only.killed


def test_number_of_labels_of_successive_workers_is_bounded(world) -> None:
    running = world(1)
    running.serve()
    for generation in range(20):
        process = running.processes[-1]
        process.says(
            "beat", {f"closed\t{generation} {n}\t{running.listener.name}": 1 for n in range(50)} | {"ended": 50}
        )
        process.dies(9)
        running.pass_time(35)
        running.processes[-1].says("ready")
    [shown] = running.service.overview()["workers"]
    closed = [count for key, count in shown["counters"].items() if key.name == "closed"]
    assert len(closed) == 101
    assert sum(closed) == shown["counters"][ENDED] == 1000


def test_worker_that_floods_the_channel_is_paused_until_the_next_check(world) -> None:
    running = world()
    first, second = running.serve()
    for _ in range(4998):
        second.says("beat", {})
    assert not second.paused
    second.says("beat", {})
    assert second.paused == {CONTROL_OUT}
    first.says("beat", {"open": 1})
    assert not first.paused
    running.reactor.advance(BEAT)
    assert not second.paused
    second.says("beat", {})
    assert not second.paused


def test_printed_lines_are_read_in_portions_and_do_not_delay_heartbeats(world) -> None:
    running = world()
    first, second = running.serve()
    second.writes(b"\n" * 8192, 1)
    assert second.paused == {1}
    assert len(running.recorded("worker.printed")) == 100
    second.says("beat", {"open": 7})
    assert second.protocol.counters == {OPEN_CONNECTIONS: 7}
    running.reactor.advance(0)  # all turns until the limit of the beat
    assert len(running.recorded("worker.printed")) == 5000
    assert second.paused == {1}
    running.reactor.advance(BEAT)
    assert len(running.recorded("worker.printed")) == 8192
    assert second.paused == first.paused == set()


def test_output_of_a_dead_worker_is_logged_before_it_is_replaced(world) -> None:
    running = world(1)
    [only] = running.serve()
    only.writes(b"a line\n" * 1000, 2)
    only.dies(9)
    assert not running.recorded("worker.ended", exit_status=9)
    running.reactor.advance(0)
    assert len(running.recorded("worker.printed_error")) == 1000
    assert running.recorded("worker.ended", exit_status=9)
    running.pass_time(1)
    assert len(running.processes) == 2


def test_output_of_a_worker_is_logged_by_line_and_escaped(world) -> None:
    running = world(1)
    [only] = running.serve()
    only.writes(b"one\ntw", 2)
    only.writes(b"o\x1b[31m\xff\n", 2)
    assert running.texts()[-2:] == [
        "worker 0 (pid 1000) printed: one",
        "worker 0 (pid 1000) printed: two\\x1b[31m\\xff",
    ]
    only.writes(b"no end", 2)
    only.dies(9)
    assert running.recorded("worker.printed_error", line="no end")


def test_unterminated_output_line_takes_bounded_memory(world) -> None:
    running = world(1)
    [only] = running.serve()
    for _ in range(100):
        only.writes(b"x" * 8192, 1)
    assert len(only.protocol._printed[1]._buffer) <= 8192
    assert all(len(text) < 9000 for text in running.texts())


def test_record_of_a_worker_is_logged_with_its_slot_and_all_its_fields(world) -> None:
    running = world()
    _, second = running.serve()
    second.logs("{peer} went", peer="1.2.3.4", seconds=1.5)
    event = running.events[-1]
    assert formatEvent(event) == "1.2.3.4 went"
    assert (event["slot"], event["seconds"], event["log_level"]) == (1, 1.5, LogLevel.info)
    assert event["log_system"] == "its.own#info worker 1"
