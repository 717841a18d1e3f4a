"""Results that are expensive to make: one at a time, and each kept for about a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from time import perf_counter
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

# Seconds that a result is given out. Just below the second in which the status page and impatient scrapers ask again,
# so that each of their answers is new.
LIFETIME = 0.9

# Seconds that a result may be worked on in one turn of the reactor.
_SLICE = 0.002


class Renderings:
    """Makes results for keys, one at a time, and keeps each for `LIFETIME` seconds.

    Requests for a result that is not ready wait for it. Each key's result is made at most once in a lifetime, so the
    work and the memory are bounded by the number of keys, which the caller has to bound. The reactor has a turn between
    two results. `report` is called with the exception when a result cannot be made; such a result is None.
    """

    def __init__(self, clock: Any, report: Callable[[BaseException | None], None]) -> None:
        self._clock = clock
        self._report = report
        self._kept: dict[Hashable, tuple[float, Any]] = {}  # when it was begun, and the result
        self._asked: dict[Hashable, list[Deferred[Any]]] = {}
        self._waiting: deque[tuple[Hashable, Callable[[], Coroutine[Any, Any, Any]]]] = deque()
        self._busy = False

    def get(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, Any]]) -> Deferred[Any]:
        """The result of `make`, or the one that is kept for this key."""
        now = self._clock.seconds()
        self._kept = {kept: entry for kept, entry in self._kept.items() if 0 <= now - entry[0] < LIFETIME}
        if key in self._kept:
            return succeed(self._kept[key][1])
        answer: Deferred[Any] = Deferred()
        if key in self._asked:
            self._asked[key].append(answer)
        else:
            self._asked[key] = [answer]
            self._waiting.append((key, make))
            if not self._busy:
                self._next()
        return answer

    def _next(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            key, make = self._waiting.popleft()
            began = self._clock.seconds()
            Deferred.fromCoroutine(make()).addBoth(self._made, key, began)

    def _made(self, result: Any, key: Hashable, began: float) -> None:
        if isinstance(result, Failure):
            self._report(result.value)
            result = None
        self._kept[key] = began, result
        self._clock.callLater(0, self._next)
        for answer in self._asked.pop(key):
            answer.callback(result)


class Slices:
    """Divides work into slices of `_SLICE` seconds: await `pause` often, and other events are handled between them."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._began = perf_counter()

    async def pause(self) -> None:
        """Let the reactor handle other events, if the slice is over."""
        if perf_counter() - self._began >= _SLICE:
            turn: Deferred[None] = Deferred()
            self._clock.callLater(0, turn.callback, None)
            await turn
            self._began = perf_counter()
