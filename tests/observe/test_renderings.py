"""Expensive results: one at a time, once in a while, for however many ask."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from rtservice.observe.renderings import LIFETIME, Renderings


class Kitchen:
    """Renderings whose results are made when a test says so."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reported: list[Any] = []
        self.making: list[tuple[Any, Deferred]] = []
        self.given: list[Any] = []
        self._renderings = Renderings(self.clock, self.reported.append)

    def ask(self, key: Any) -> None:
        async def make() -> Any:
            made: Deferred[Any] = Deferred()
            self.making.append((key, made))
            return await made

        self._renderings.get(key, make).addCallback(lambda result: self.given.append((key, result)))


@pytest.fixture
def kitchen() -> Kitchen:
    return Kitchen()


def test_one_result_is_made_at_a_time_and_each_after_a_turn_of_the_reactor(kitchen) -> None:
    for key in "abca":
        kitchen.ask(key)
    assert [key for key, _ in kitchen.making] == ["a"]
    kitchen.making[0][1].callback(1)
    assert kitchen.given == [("a", 1), ("a", 1)]
    assert [key for key, _ in kitchen.making] == ["a"]
    kitchen.clock.advance(0)
    assert [key for key, _ in kitchen.making] == ["a", "b"]
    kitchen.making[1][1].callback(2)
    kitchen.clock.advance(0)
    kitchen.making[2][1].callback(3)
    assert kitchen.given[2:] == [("b", 2), ("c", 3)]


def test_a_result_is_kept_for_about_a_second_from_when_it_was_begun(kitchen) -> None:
    kitchen.ask("a")
    kitchen.clock.advance(LIFETIME / 2)
    kitchen.making[0][1].callback(1)
    kitchen.clock.advance(LIFETIME / 4)
    kitchen.ask("a")
    assert kitchen.given == [("a", 1)] * 2
    kitchen.clock.advance(LIFETIME / 2)
    kitchen.ask("a")
    assert len(kitchen.making) == 2


def test_what_nobody_asks_for_any_more_is_not_kept(kitchen) -> None:
    for key in range(1000):
        kitchen.ask(key)
        kitchen.making[-1][1].callback(None)
        kitchen.clock.advance(LIFETIME)
    assert len(kitchen._renderings._kept) <= 2


def test_a_failure_is_reported_once_and_the_next_result_is_made(kitchen) -> None:
    kitchen.ask("a")
    kitchen.ask("a")
    kitchen.ask("b")
    kitchen.making[0][1].errback(ZeroDivisionError())
    assert kitchen.given == [("a", None), ("a", None)]
    assert [type(problem) for problem in kitchen.reported] == [ZeroDivisionError]
    kitchen.clock.advance(0)
    kitchen.making[1][1].callback(2)
    assert kitchen.given[-1] == ("b", 2)
