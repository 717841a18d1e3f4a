"""Run long work in slices, with a pause after each in which the reactor handles other events."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from rtservice.steps import Steps

_Result = TypeVar("_Result")

# Seconds of a slice, which ends after the step in progress, and seconds until the next slice. So the work takes at most
# about half of the process's time.
SLICE, PAUSE = 0.002, 0.002


def in_slices(
    steps: Steps[_Result],
    clock: Any,
    *,
    size: float = SLICE,
    pause: float = PAUSE,
    seconds: Callable[[], float] = perf_counter,
) -> Deferred[_Result]:
    """Run the steps of some work in slices. The Deferred fires with its result or its exception.

    The first slice runs before this returns, and may complete the work. `clock` is an IReactorTime that schedules the
    others. `size` and `pause` are in seconds; `seconds` measures slices. Cancelling the Deferred stops the work: its
    generator is closed.
    """
    due: list[Any] = []

    def cancel(_: object) -> None:
        for call in due:
            call.cancel()
        steps.close()

    done: Deferred[_Result] = Deferred(cancel)

    def run_slice() -> None:
        due.clear()
        end = seconds() + size
        try:
            while True:
                next(steps)
                if seconds() >= end:
                    break
        except StopIteration as result:
            done.callback(result.value)
        except BaseException:
            done.errback(Failure())
        else:
            due.append(clock.callLater(pause, run_slice))

    run_slice()
    return done
