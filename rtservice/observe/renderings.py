"""Cache of expensive results: computed one at a time, and kept for about a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from time import perf_counter
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

# Seconds for which a result is returned again. Below the interval of one second at which the status page and fast
# scrapers send requests, so that each gets a new result.
LIFETIME = 0.9

# Seconds of work on a result in one turn of the reactor.
_SLICE = 0.002


class Renderings:
    """Computes results for keys, one at a time, and keeps each for `LIFETIME` seconds.

    Requests for a result that is not ready wait for it. Each key's result is computed at most once in a lifetime, so
    the number of keys, which the caller must bound, bounds work and memory. The reactor has a turn between two results.
    If a computation fails, `report` is called with the exception, and the result is None.
    """

    def __init__(self, clock: Any, report: Callable[[BaseException | None], None]) -> None:
        self._clock = clock
        self._report = report
        self._kept: dict[Hashable, tuple[float, Any]] = {}  # start time of the computation, and result
        self._asked: dict[Hashable, list[Deferred[Any]]] = {}
        self._waiting: deque[tuple[Hashable, Callable[[], Coroutine[Any, Any, Any]]]] = deque()
        self._busy = False

    def get(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, Any]]) -> Deferred[Any]:
        """Return the kept result of this key, or the result of `make`."""
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
    """Divides work into slices of `_SLICE` seconds. The work awaits `pause` often; events are handled in between."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._began = perf_counter()

    async def pause(self) -> None:
        """Let the reactor handle other events if the slice has ended."""
        if perf_counter() - self._began >= _SLICE:
            turn: Deferred[None] = Deferred()
            self._clock.callLater(0, turn.callback, None)
            await turn
            self._began = perf_counter()
