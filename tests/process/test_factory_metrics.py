"""Counters that a factory adds to the metrics."""

from typing import Any

import pytest
from twisted.internet.protocol import Factory
from zope.interface import implementer

from rtservice.interfaces import IMetrics
from rtservice.process.counters import OPEN_CONNECTIONS, CounterKey
from rtservice.process.service import ServiceProcess
from rtservice.process.state import State
from tests.support.served import server


@implementer(IMetrics)
class Counting(Factory):
    """Returns the counters that the test sets, or raises; `serving` is True between its start and its stop."""

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


def counters_of_factory(service: ServiceProcess) -> dict[CounterKey, float]:
    return {key: count for key, count in service.backend.counters().items() if key.name == "protocol"}


def test_factory_metrics_are_read_only_between_its_start_and_stop(timed) -> None:
    service, _, _ = timed(factory=Counting({"a_total": 1}))
    service.backend.factory.counts = {"a_total": 2, "b": 0.5}
    service.stopService()
    assert service.backend.state is State.STOPPED
    service.backend.factory.counts = {"a_total": 3}
    assert counters_of_factory(service) == {CounterKey("protocol", "a_total"): 2, CounterKey("protocol", "b"): 0.5}
    not_started, _ = server(factory=Counting(RuntimeError("not yet")))
    assert counters_of_factory(not_started) == {}


@pytest.mark.parametrize(
    ("counts", "event"),
    [
        (RuntimeError("mine"), "factory.failed"),
        ([("a", 1)], "factory.failed"),
        ({"a b": 1}, "factory.metrics_rejected"),
    ],
)
def test_invalid_factory_metrics_are_logged_once_and_the_previous_values_kept(timed, counts, event) -> None:
    service, _, events = timed(factory=Counting({"a_total": 1}))
    assert counters_of_factory(service) == {CounterKey("protocol", "a_total"): 1}
    before = len(events)
    for each in (counts, counts, {"a_total": 2}, counts):
        service.backend.factory.counts = each
        service.backend.counters()
    # Logged again after valid metrics in between.
    assert [(record["event"], record["factory"]) for record in events[before:]] == [(event, "Counting")] * 2
    assert counters_of_factory(service).get(CounterKey("protocol", "a_total"), 2) == 2
    assert service.backend.counters()[OPEN_CONNECTIONS] == 0
