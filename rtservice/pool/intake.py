"""Takes what a worker sends in bounded portions, so that no worker keeps the supervisor from its other work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

# What is taken in one turn of the reactor, and in one beat, in the units of `cost`: about 30 µs each. A worker that
# sends more is not read until the next turn, or the next beat; its pipe is full then, and it drops records.
A_TURN, A_BEAT = 100, 5000


class Item(Protocol):
    """Something that was received."""

    @property
    def cost(self) -> int: ...


class Decoder(Protocol):
    """Bytes in, items out. `next` gives None when there is no complete one."""

    def feed(self, data: bytes) -> None: ...
    def next(self) -> Any: ...


class Intake:
    """One pipe of a worker.

    `take` is called with each item, and `fail` once with whatever `next` or `take` raises, after which nothing more is
    taken. `pause` and `resume` have the pipe not be read, and be read again.
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
        self._spent = 0  # in this beat
        self._paused = False
        self._closed = False
        self._done: Callable[[], None] | None = None
        self._call: Any = None  # the delayed call that goes on

    def feed(self, data: bytes) -> None:
        """Take some of what was received, and the rest later."""
        if not self._closed:
            self._decoder.feed(data)
            if not self._paused:
                self._go_on()

    def beat(self) -> None:
        """Go on, if the last beat was too short. To be called once per beat."""
        self._spent = 0
        if self._paused and self._call is None and not self._closed:
            self._go_on()

    def finish(self, done: Callable[[], None]) -> None:
        """Take the rest, turn by turn, and call `done`. Nothing is fed any more."""
        self._done = done
        if self._closed:
            self._finished()
        elif self._call is None:
            self._go_on()

    def close(self) -> None:
        """Take no more. What was received and not taken is dropped."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()
            self._call = None
        self._finished()

    def _go_on(self) -> None:
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
        if self._may_go_on():
            self._call = self._clock.callLater(0, self._go_on)

    def _may_go_on(self) -> bool:
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
