"""The log of a service with workers, and its notifications to the service manager."""

import json
import os
import re
import signal
import textwrap

from tests.support.clients import echoes, greeted
from tests.support.deadline import DEADLINE
from tests.support.listen_options import TCP
from tests.support.load import Load, assert_no_client_lost
from tests.support.worker_signals import DIE, FAIL, FLOOD


def test_worker_records_keep_slot_level_namespace_and_traceback(workers, site) -> None:
    running = workers(TCP, **site)
    os.kill(running.of_slot(1), FAIL)
    running.wait_line("a warning with")

    def record(text: str) -> dict:
        [found] = [record for record in running.service.records if record["message"] == text]
        assert (found["namespace"], found["slot"]) == ("some.protocol", 1)
        return found

    failed = record("it failed for somebody")
    assert failed["level"] == "critical"
    assert failed["traceback"].endswith("builtins.ZeroDivisionError: division by zero\n")
    assert record("a warning with ['a', 1]")["level"] == "warn"
    assert running.stop() == 0


def test_a_custom_logger_receives_the_fields_of_worker_records(workers, site, tmp_path) -> None:
    (tmp_path / "mylogger.py").write_text(
        textwrap.dedent(
            """
            import json, sys
            from twisted.logger import ILogObserver, formatEvent
            from zope.interface import directlyProvides
            def observer():
                def emit(event):
                    fields = {k: v for k, v in event.items() if isinstance(v, (str, int, float))}
                    failure = event.get("log_failure")
                    fields["traceback"] = failure and failure.getTraceback()
                    fields["level"] = event["log_level"].name
                    print(json.dumps({**fields, "text": formatEvent(event)}), file=sys.__stdout__, flush=True)
                directlyProvides(emit, ILogObserver)
                return emit
            """
        )
    )
    path = os.pathsep.join((site["PYTHONPATH"], str(tmp_path)))
    running = workers("--listen=unix:s", twistd=("--logger=mylogger.observer",), PYTHONPATH=path)
    ready = json.loads(running.wait_line(r'"text": "worker 0 .* is ready'))
    os.kill(int(re.search(r"pid (\d+)", ready["worker"])[1]), FAIL)
    event = json.loads(running.wait_line("it failed for somebody"))
    assert (event["slot"], event["level"], event["log_namespace"]) == (0, "critical", "some.protocol")
    assert (event["peer"], event["answer"]) == ("somebody", 42)
    assert "in fails" in event["traceback"]
    assert event["traceback"].strip().endswith("builtins.ZeroDivisionError: division by zero")
    with greeted(f"{tmp_path}/s") as client:
        assert echoes(client)
    record = json.loads(running.wait_line("bytes_in"))
    assert (record["bytes_in"], record["bytes_out"], record["level"]) == (5, 27, "info")
    assert record["slot"] in (0, 1)


def test_the_last_output_of_a_worker_is_logged(workers, site) -> None:
    running = workers(TCP, **site)
    os.kill(running.of_slot(0), DIE)
    running.wait_event("worker.printed_error", slot=0, line=r"these are\x1b its last words")
    running.wait_event("worker.printed_error", slot=0, line=re.compile("^unfinished"))
    running.wait_event("worker.killed", slot=0, signal="SIGABRT")
    running.settled(2)
    assert running.stop() == 0


def test_a_flood_of_records_drops_records_and_affects_no_client(workers, site) -> None:
    running = workers(TCP, **site)
    with Load(port=running.service.port, short=4, long=4) as load:
        os.kill(running.of_slot(0), FLOOD)
        running.wait_event("log.dropped", slot=0)
        load.more(50)
        assert_no_client_lost(load.stop())
    assert len(running.lines("a flood of")) < 50_000
    assert running.stop() == 0


def test_the_service_manager_receives_one_status_for_all_workers(workers, manager, wait_for) -> None:
    running = workers("--workers=3", TCP, NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="500000")
    wait_for(lambda: manager.messages)

    def changes() -> list[str]:
        return [m for m in manager.messages if not m.startswith(("STATUS", "WATCHDOG", "EXTEND"))]

    clients = [greeted(running.service.port) for _ in range(5)]
    wait_for(lambda: "STATUS=serving: 3 of 3 workers ready, 5 connections open" in manager.messages)
    running.send(signal.SIGHUP)
    wait_for(lambda: len(changes()) == 3)
    seen = len(manager.messages)
    wait_for(lambda: manager.messages[seen:].count("WATCHDOG=1") >= 3)
    running.send(signal.SIGTERM)
    wait_for(lambda: len(changes()) == 4)
    wait_for(lambda: any(m.startswith("EXTEND_TIMEOUT_USEC=") for m in manager.messages))
    for client in clients:
        client.close()
    assert running.service.process.wait(DEADLINE) == 0
    first, reloading, again, stopping = changes()
    # A worker that has just started has sent no counters yet.
    assert re.fullmatch(r"READY=1\nSTATUS=serving: 3 of 3 workers ready, 0 connections open", first)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
    assert re.fullmatch(r"READY=1\nSTATUS=serving: 3 of 3 workers ready, [0-5] connections open", again)
    assert re.fullmatch(r"STOPPING=1\nSTATUS=draining: 3 of 3 workers ready, 5 connections open", stopping)
