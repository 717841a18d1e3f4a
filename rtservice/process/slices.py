"""Long work in slices, with a pause after each in which the reactor serves clients."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from rtservice.net.tls import Steps

_Result = TypeVar("_Result")

# Seconds that a slice may take, beyond which it goes only as far as the step that it is in; and seconds until the next,
# so that the work never takes more than about half of the process's time.
SLICE, PAUSE = 0.002, 0.002


def in_slices(
    steps: Steps[_Result],
    clock: Any,
    *,
    size: float = SLICE,
    pause: float = PAUSE,
    seconds: Callable[[], float] = perf_counter,
) -> Deferred[_Result]:
    """Take the steps of some work; fires with its result, or with what it raises.

    The first slice is done before this returns, and may be all. `clock` is an IReactorTime that calls the others;
    `seconds` is what a slice is measured by. To cancel the Deferred ends the work where it is: its generator is closed.
    """
    due: list[Any] = []

    def cancel(_: object) -> None:
        for call in due:
            call.cancel()
        steps.close()

    done: Deferred[_Result] = Deferred(cancel)

    def go_on() -> None:
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
            due.append(clock.callLater(pause, go_on))

    go_on()
    return done
