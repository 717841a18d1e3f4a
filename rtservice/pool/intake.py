"""Process what a worker sends in bounded portions, so that no worker can block the supervisor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

# Limits for one turn of the reactor and for one heartbeat, in units of `cost`: about 30 µs each. If a worker sends
# more, reading pauses until the next turn or heartbeat. Its pipe is full then, and it drops log records.
A_TURN, A_BEAT = 100, 5000


class Item(Protocol):
    """A received item. `cost` is in units of about 30 µs."""

    @property
    def cost(self) -> int: ...


class Decoder(Protocol):
    """Decodes bytes to items. `next` returns None if no item is complete."""

    def feed(self, data: bytes) -> None: ...
    def next(self) -> Any: ...


class Intake:
    """Input from one pipe of a worker.

    `take` is called with each item. `fail` is called once with an exception that `next` or `take` raises, after which
    nothing more is processed. `pause` and `resume` are called to pause and resume reading from the pipe. `a_turn` and
    `a_beat` are the limits for one turn and one heartbeat, in units of `cost`.
    """

    def __init__(
        self,
        clock: Any,
        decoder: Decoder,
        *,
        take: Callable[[Any], None],
        fail: Callable[[Exception], None],
        pause: Callable[[], None],
        resume: Callable[[], None],
        a_turn: int = A_TURN,
        a_beat: int = A_BEAT,
    ) -> None:
        self._clock = clock
        self._decoder = decoder
        self._take = take
        self._fail = fail
        self._pause = pause
        self._resume = resume
        self._a_turn = a_turn
        self._a_beat = a_beat
        self._spent = 0  # cost since the last heartbeat
        self._paused = False
        self._closed = False
        self._done: Callable[[], None] | None = None
        self._call: Any = None  # the delayed call that continues

    def feed(self, data: bytes) -> None:
        """Process received bytes, up to the limits, and the rest later."""
        if not self._closed:
            self._decoder.feed(data)
            if not self._paused:
                self._process()

    def beat(self) -> None:
        """Begin a new heartbeat interval, and continue with waiting items. Call it once per heartbeat."""
        self._spent = 0
        if self._paused and self._call is None and not self._closed:
            self._process()

    def finish(self, done: Callable[[], None]) -> None:
        """Process the rest, turn by turn, then call `done`. `feed` must not be called any more."""
        self._done = done
        if self._closed:
            self._finished()
        elif self._call is None:
            self._process()

    def close(self) -> None:
        """Stop, and drop items that are not processed."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()
            self._call = None
        self._finished()

    def _process(self) -> None:
        self._call = None
        left = self._a_turn if self._done is not None else min(self._a_turn, self._a_beat - self._spent)
        try:
            while left > 0:
                item = self._decoder.next()
                if item is None:
                    self._all_taken()
                    return
                left -= item.cost
                self._spent += item.cost
                self._take(item)
                if self._closed:
                    return
        except Exception as problem:
            self._closed = True
            self._fail(problem)
            self._finished()
            return
        if not self._paused:
            self._paused = True
            self._pause()
        if self._may_continue():
            self._call = self._clock.callLater(0, self._process)

    def _may_continue(self) -> bool:
        return self._spent < self._a_beat or self._done is not None

    def _all_taken(self) -> None:
        if self._done is not None:
            self._closed = True
            self._finished()
        elif self._paused:
            self._paused = False
            self._resume()

    def _finished(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            done()
