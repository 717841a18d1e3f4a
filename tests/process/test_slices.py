"""Long work runs in slices; other calls run between them."""

from collections.abc import Generator

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from rtservice.process.slices import PAUSE, SLICE, in_slices


class Work:
    """Steps that each take a number of seconds, by a clock that only these steps advance."""

    def __init__(self, steps: int, seconds: float, problem: Exception | None = None) -> None:
        self.clock = Clock()
        self.done = 0
        self.closed = False
        self.now = 0.0
        self.turns: list[int] = []  # number of steps done each time other calls ran
        self._steps, self._seconds, self._problem = steps, seconds, problem

    def begin(self) -> Deferred[str]:
        return in_slices(self._take(), self.clock, seconds=lambda: self.now)

    def _take(self) -> Generator[None, None, str]:
        try:
            for _ in range(self._steps):
                self.done += 1
                self.now += self._seconds
                yield
            if self._problem is not None:
                raise self._problem
            return "result"
        except GeneratorExit:
            self.closed = True
            raise

    def run_other_calls(self) -> None:
        """Run other calls, then the next slice."""
        self.turns.append(self.done)
        self.clock.advance(PAUSE)


def results(deferred: Deferred) -> list:
    found: list = []
    deferred.addBoth(found.append)
    return found


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_work_that_fits_into_one_slice_finishes_at_once(steps) -> None:
    work = Work(steps, SLICE / 10)
    assert results(work.begin()) == ["result"]
    assert work.clock.getDelayedCalls() == []


@pytest.mark.parametrize(("seconds", "each"), [(SLICE, 1), (10 * SLICE, 1), (SLICE / 3.5, 4), (SLICE / 100, 100)])
def test_other_calls_run_after_each_slice(seconds, each) -> None:
    work = Work(400, seconds)
    found = results(work.begin())
    while not found:
        work.run_other_calls()
    assert found == ["result"]
    assert [after - before for before, after in zip(work.turns, work.turns[1:], strict=False)] == [
        pytest.approx(each, abs=1) if each == 100 else each
    ] * (len(work.turns) - 1)
    assert len(work.turns) >= 400 // each - 2
    assert work.clock.getDelayedCalls() == []


@pytest.mark.parametrize("steps", [0, 5])
def test_exception_in_the_work_fails_the_deferred(steps) -> None:
    work = Work(steps, SLICE, ValueError("no"))
    found = results(work.begin())
    while not found:
        work.run_other_calls()
    assert found[0].check(ValueError)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_cancelled_work_stops_at_its_current_step(turns) -> None:
    work = Work(100, SLICE)
    going = work.begin()
    for _ in range(turns):
        work.run_other_calls()
    going.cancel()
    assert results(going)[0].check(CancelledError)
    assert work.closed
    assert work.done == turns + 1
    assert work.clock.getDelayedCalls() == []
