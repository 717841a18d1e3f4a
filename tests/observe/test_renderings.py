"""The cache of expensive results: one computation at a time, shared by all requests."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from rtservice.observe.renderings import LIFETIME, Renderings


class Harness:
    """Renderings with results that the test completes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reported: list[Any] = []
        self.computations: list[tuple[Any, Deferred]] = []
        self.results: list[Any] = []
        self._renderings = Renderings(self.clock, self.reported.append)

    def request(self, key: Any) -> None:
        async def compute() -> Any:
            computed: Deferred[Any] = Deferred()
            self.computations.append((key, computed))
            return await computed

        self._renderings.get(key, compute).addCallback(lambda result: self.results.append((key, result)))


@pytest.fixture
def harness() -> Harness:
    return Harness()


def test_one_result_is_computed_at_a_time_with_a_reactor_turn_between(harness) -> None:
    for key in "abca":
        harness.request(key)
    assert [key for key, _ in harness.computations] == ["a"]
    harness.computations[0][1].callback(1)
    assert harness.results == [("a", 1), ("a", 1)]
    assert [key for key, _ in harness.computations] == ["a"]
    harness.clock.advance(0)
    assert [key for key, _ in harness.computations] == ["a", "b"]
    harness.computations[1][1].callback(2)
    harness.clock.advance(0)
    harness.computations[2][1].callback(3)
    assert harness.results[2:] == [("b", 2), ("c", 3)]


def test_a_result_is_cached_for_its_lifetime_from_the_start_of_its_computation(harness) -> None:
    harness.request("a")
    harness.clock.advance(LIFETIME / 2)
    harness.computations[0][1].callback(1)
    harness.clock.advance(LIFETIME / 4)
    harness.request("a")
    assert harness.results == [("a", 1)] * 2
    harness.clock.advance(LIFETIME / 2)
    harness.request("a")
    assert len(harness.computations) == 2


def test_expired_results_are_removed_from_the_cache(harness) -> None:
    for key in range(1000):
        harness.request(key)
        harness.computations[-1][1].callback(None)
        harness.clock.advance(LIFETIME)
    assert len(harness._renderings._kept) <= 2


def test_a_failure_is_reported_once_and_the_next_result_is_computed(harness) -> None:
    harness.request("a")
    harness.request("a")
    harness.request("b")
    harness.computations[0][1].errback(ZeroDivisionError())
    assert harness.results == [("a", None), ("a", None)]
    assert [type(problem) for problem in harness.reported] == [ZeroDivisionError]
    harness.clock.advance(0)
    harness.computations[1][1].callback(2)
    assert harness.results[-1] == ("b", 2)
