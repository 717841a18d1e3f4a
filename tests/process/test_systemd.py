"""Notifications to the service manager, read from its socket."""

import os
import time
from collections.abc import Callable, Iterator

import pytest
from twisted.logger import formatEvent, globalLogPublisher

from rtservice.process.systemd import Notifier, from_environment
from tests.support.service_manager import ServiceManager


def notifier_of(manager: ServiceManager, **variables: str) -> Notifier:
    """Return the notifier of a process that the manager started."""
    return from_environment({"NOTIFY_SOCKET": manager.address, **variables})


@pytest.fixture
def manager(tmp_path) -> Iterator[ServiceManager]:
    made = ServiceManager(f"{tmp_path}/notify", busy=True)
    yield made
    made.close()


@pytest.fixture
def logged() -> Iterator[Callable[[], list[str]]]:
    """Return the texts logged since the start of the test."""
    events: list = []
    globalLogPublisher.addObserver(events.append)
    yield lambda: [str(formatEvent(event)) for event in events]
    globalLogPublisher.removeObserver(events.append)


def test_each_call_is_one_datagram(manager) -> None:
    notifier = notifier_of(manager)
    notifier.ready("serving on tcp:0.0.0.0:8080")
    notifier.status("3 connections")
    notifier.stopping("draining 3 connections")
    notifier.extend_timeout(7.5)
    notifier.watchdog()
    assert manager.received() == [
        "READY=1\nSTATUS=serving on tcp:0.0.0.0:8080",
        "STATUS=3 connections",
        "STOPPING=1\nSTATUS=draining 3 connections",
        "EXTEND_TIMEOUT_USEC=7500000",
        "WATCHDOG=1",
    ]


def test_reloading_includes_its_start_time_on_the_monotonic_clock(manager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier_of(manager).reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    (datagram,) = manager.received()
    first, _, second = datagram.partition("\nMONOTONIC_USEC=")
    assert first == "RELOADING=1"
    assert before <= int(second) <= after


def test_abstract_socket_address_is_supported() -> None:
    manager = ServiceManager(f"@rtservice-test-{os.getpid()}", busy=True)
    notifier_of(manager).ready("x")
    assert manager.received() == ["READY=1\nSTATUS=x"]
    manager.close()


def test_status_is_one_line_within_the_length_limit_of_systemd(manager) -> None:
    notifier = notifier_of(manager)
    notifier.status("two\nREADY=1 \x1b[31m \udcff é")
    notifier.status("𝄞" * 5000)
    assert manager.received() == [r"STATUS=two\nREADY=1 \x1b[31m \udcff é", f"STATUS={'𝄞' * 1000}"]


def test_children_inherit_neither_the_variables_nor_the_socket(manager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "2", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = from_environment(environ)
    assert environ == {"HOME": "/"}
    assert notifier._socket is not None
    assert not notifier._socket.get_inheritable()


def test_without_a_service_manager_nothing_is_sent_or_logged(logged) -> None:
    notifier = from_environment({"WATCHDOG_USEC": "30000000"})
    assert notifier.watchdog_interval is None
    notifier.ready("x")
    notifier.watchdog()
    assert logged() == []


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_interval_is_half_the_timeout_if_it_applies_to_this_process(manager, variables, interval) -> None:
    assert notifier_of(manager, **variables).watchdog_interval == interval


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("/nonexistent/notify", "cannot be used: No such file or directory"),
        ("/" + "long" * 40, "cannot be used: AF_UNIX path too long"),
        ("vsock:2:1234", "neither a path nor an abstract name"),
    ],
)
def test_unusable_notify_socket_is_logged_once_as_a_warning(address, problem, logged) -> None:
    notifier = from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000000"})
    notifier.ready("x")
    notifier.stopping("x")
    assert notifier.watchdog_interval is None
    (text,) = logged()
    assert repr(address) in text
    assert problem in text


def test_full_notify_socket_drops_status_texts_but_delivers_state_changes(manager) -> None:
    notifier = notifier_of(manager)
    for number in range(10_000):  # more than net.unix.max_dgram_qlen
        notifier.status(str(number))
    notifier.ready("up")
    notifier.watchdog()
    notifier.stopping("down")
    waiting = manager.received()
    assert len(waiting) < 10_000
    assert waiting == [f"STATUS={number}" for number in range(len(waiting))]
    notifier.watchdog()
    assert manager.received() == ["READY=1\nSTATUS=up", "STOPPING=1\nSTATUS=down", "WATCHDOG=1"]


def test_lost_service_manager_is_logged_once_as_a_warning(manager, logged) -> None:
    notifier = notifier_of(manager)
    manager.close()
    for _ in range(3):
        notifier.watchdog()
    assert logged() == ["notifications to the service manager stopped: Connection refused"]
