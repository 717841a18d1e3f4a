"""One HTTP connection of the status server: one request at a time, within deadlines and bounded memory.

Twisted's HTTPChannel parses requests and formats responses, but answers all requests of one read at once. Here it gets
the head of one request at a time, once that is complete, and the next one after the response is sent:

    READING --complete head--> ANSWERING --sent--> IDLE --a byte--> READING
                                   `--sent, next request received--> READING

Each state has a deadline. From each state a connection may become CLOSING or CLOSED.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from time import monotonic, perf_counter
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web import http

# Limits of the request line and the headers together, in bytes and lines. Browsers send about 1 KiB and 20 lines.
MAX_HEAD, MAX_LINES = 8192, 100

# Limit of the digits of a Content-Length. int() raises for more than 4,300.
_MAX_LENGTH_DIGITS = 18

# Requests of all connections that are answered in one turn of the reactor, and seconds after which no other is begun;
# each takes 0.2 to 0.7 ms. The others wait, so that the service's own connections have their turn.
ANSWERS_PER_TURN, TURN = 16, 0.002

# A connection without an answer in this many seconds has priority over those that send requests repeatedly.
_FRESH = 1.0

_END = b"\r\n\r\n"


class ChannelState(Enum):
    """The state of an HTTP connection, by what it waits for."""

    READING = "reading"  # the first request, or the rest of a request
    ANSWERING = "answering"  # the answer, or that the client reads it
    IDLE = "idle"  # another request
    CLOSING = "closing"  # that the client reads the last answer
    CLOSED = "closed"


_MOVES = {
    ChannelState.READING: {ChannelState.ANSWERING, ChannelState.CLOSING, ChannelState.CLOSED},
    ChannelState.ANSWERING: {ChannelState.READING, ChannelState.IDLE, ChannelState.CLOSING, ChannelState.CLOSED},
    ChannelState.IDLE: {ChannelState.READING, ChannelState.CLOSING, ChannelState.CLOSED},
    ChannelState.CLOSING: {ChannelState.CLOSED},
    ChannelState.CLOSED: set[ChannelState](),
}

# Seconds in a state until the connection is closed. The deadline of a request counts from its first byte, or from the
# beginning of the connection; further bytes do not extend it.
DEADLINES = {
    ChannelState.READING: 10.0,
    ChannelState.ANSWERING: 30.0,
    ChannelState.IDLE: 30.0,
    ChannelState.CLOSING: 10.0,
}


class Turns:
    """Schedules the answers of channels: a bounded number in one turn of the reactor, and each channel once.

    Fresh channels have priority, except for one place in each turn: a health check does not wait for clients that send
    requests as fast as they can.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._fresh: deque[Channel] = deque()
        self._again: deque[Channel] = deque()
        self._served: set[Channel] = set()
        self._spent = 0.0  # seconds, in this turn
        self._call: IDelayedCall | None = None

    def take(self, channel: Channel) -> None:
        """Call the channel's `answer` now, or in a later turn if this turn is full."""
        if channel in self._served or self._is_over():
            self.queue(channel)
        else:
            self._serve(channel)
            self._schedule()

    def queue(self, channel: Channel) -> None:
        """Call the channel's `answer` in a later turn."""
        (self._fresh if channel.fresh else self._again).append(channel)
        self._schedule()

    def _schedule(self) -> None:
        if self._call is None:
            self._call = self._clock.callLater(0, self._turn)

    def _is_over(self) -> bool:
        return len(self._served) >= ANSWERS_PER_TURN or self._spent >= TURN

    def _serve(self, channel: Channel) -> None:
        self._served.add(channel)
        began = perf_counter()
        channel.answer()
        self._spent += perf_counter() - began

    def _turn(self) -> None:
        self._call = None
        self._served.clear()
        self._spent = 0.0
        # Channels that are queued during this turn wait for the next one.
        fresh, again = len(self._fresh), len(self._again)
        # At least one of either kind, then the fresh ones first.
        for waiting, count in ((self._fresh, min(fresh, 1)), (self._again, min(again, 1))):
            for _ in range(count):
                self._serve(waiting.popleft())
        for waiting, count in ((self._fresh, fresh - 1), (self._again, again - 1)):
            while count > 0 and not self._is_over():
                self._serve(waiting.popleft())
                count -= 1
        if self._served:
            self._schedule()


def _refusal(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


_TIMEOUT = _refusal("408 Request Timeout")
_TOO_LARGE = _refusal("413 Content Too Large")
_HEAD_TOO_LARGE = _refusal("431 Request Header Fields Too Large")
_FAILED = _refusal("500 Internal Server Error")


class Channel(http.HTTPChannel):
    """The protocol of one connection.

    `request` is the class of its requests. Its factory has the attributes `clock` (an IReactorTime), `turns` (Turns),
    and `report`, which is called with each exception that is raised while a request is answered.

    `since` is the time.monotonic() at which the connection was made or its last answer finished.
    """

    factory: Any
    transport: Any

    def __init__(self, request: type[http.Request]) -> None:
        super().__init__()
        self.requestFactory = request
        self.since = monotonic()
        self._held = b""  # received, and not passed to HTTPChannel yet
        self._state = ChannelState.READING
        self._deadline: Any = None
        self._blocked = False  # the transport has paused this producer
        self._answered = False  # a request was answered while blocked
        self._last_answer: float | None = None  # time by the factory's clock

    @property
    def fresh(self) -> bool:
        """Whether no request was answered in the last `_FRESH` seconds."""
        return self._last_answer is None or not 0 <= self.factory.clock.seconds() - self._last_answer < _FRESH

    @property
    def complete(self) -> bool:
        """Whether it waits for its answer: the request is complete, and the client reads."""
        return self._state is ChannelState.ANSWERING and not self._blocked

    @property
    def idle(self) -> bool:
        """Whether its last request is answered, and no other has begun."""
        return self._state is ChannelState.IDLE

    def connectionMade(self) -> None:
        super().connectionMade()
        self._set_deadline()

    def _move(self, state: ChannelState) -> None:
        if state not in _MOVES[self._state]:
            raise RuntimeError(f"a channel that is {self._state.value} cannot become {state.value}")
        self._state = state
        self._set_deadline()

    def _set_deadline(self) -> None:
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._deadline = None
        if self._state in DEADLINES:
            self._deadline = self.factory.clock.callLater(DEADLINES[self._state], self._expired)

    def _expired(self) -> None:
        if self._state is ChannelState.READING and self._held:
            self.refuse(_TIMEOUT)
        elif self._state in (ChannelState.READING, ChannelState.IDLE):
            self.loseConnection()
        else:
            self.transport.abortConnection()

    # --- requests ---

    def dataReceived(self, data: bytes) -> None:
        if self._state in (ChannelState.CLOSING, ChannelState.CLOSED):
            return
        self._held += data
        if self._state is ChannelState.IDLE:
            self._move(ChannelState.READING)
        if self._state is ChannelState.READING:
            self._take_request(self.factory.turns.take)
        self._read_or_not()

    def _take_request(self, turn: Callable[[Channel], None]) -> None:
        """Schedule the answer if the head of the request is complete. `turn` is a method of Turns."""
        end = self._held.find(_END, 0, MAX_HEAD)
        if end >= 0 and self._held.count(b"\r\n", 0, end) < MAX_LINES:
            self._move(ChannelState.ANSWERING)
            turn(self)
        elif end >= 0 or len(self._held) >= MAX_HEAD:
            self.refuse(_HEAD_TOO_LARGE)

    def _read_or_not(self) -> None:
        """Pause reading while a request is answered, so that at most one read is kept."""
        if self._state in (ChannelState.READING, ChannelState.IDLE):
            self.transport.resumeProducing()
        elif self._state is ChannelState.ANSWERING:
            self.transport.pauseProducing()

    def answer(self) -> None:
        """Answer the complete request. Called by Turns."""
        if self._state is not ChannelState.ANSWERING:  # the connection has ended meanwhile
            return
        end = self._held.index(_END) + len(_END)
        head, self._held = self._held[:end], self._held[end:]
        try:
            super().dataReceived(head)
        except Exception as problem:  # input of a client must not cause a traceback
            self.failed(problem)
        self._read_or_not()

    def headerReceived(self, line: bytes) -> bool:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and len(value.strip()) > _MAX_LENGTH_DIGITS:
            self.refuse(_TOO_LARGE)
            return False
        return bool(super().headerReceived(line))

    def allHeadersReceived(self) -> None:
        if self.length != 0:  # None: chunked, of any length
            self.refuse(_TOO_LARGE)
            return
        # There is no body, so no `100 Continue`.
        self.requests[-1].requestHeaders.removeHeader(b"Expect")
        super().allHeadersReceived()

    # --- answers ---

    def requestDone(self, request: http.Request) -> None:
        super().requestDone(request)
        if self._state is ChannelState.ANSWERING:
            self._answered = True
            if not self._blocked:
                self._go_on()
            self._read_or_not()

    def _go_on(self) -> None:
        """Continue with the next request after an answer is sent."""
        self._answered = False
        self.since = monotonic()
        self._last_answer = self.factory.clock.seconds()
        self._move(ChannelState.READING if self._held else ChannelState.IDLE)
        if self._held:
            self._take_request(self.factory.turns.queue)

    def pauseProducing(self) -> None:
        """Pause: the transport has too much unsent output. Called by the transport."""
        super().pauseProducing()
        self._blocked = True

    def resumeProducing(self) -> None:
        """Resume: the transport has sent its output. Called by the transport."""
        super().resumeProducing()
        self._blocked = False
        if self._answered and self._state is ChannelState.ANSWERING:
            self._go_on()
        self._read_or_not()

    def failed(self, problem: BaseException | None) -> None:
        """Handle an exception raised while the request was answered: respond with status 500, or abort."""
        self.factory.report(problem)
        if self._state is ChannelState.ANSWERING and not (self.requests and self.requests[0].startedWriting):
            self.refuse(_FAILED)
        elif self._state is not ChannelState.CLOSED:
            self.transport.abortConnection()

    # --- the end ---

    def refuse(self, answer: bytes) -> None:
        """Send an error response outside of a request, and close."""
        self.transport.write(answer)
        self.loseConnection()

    def loseConnection(self) -> None:
        """Close once the output is sent, or at the deadline if the client does not read it."""
        if self._state not in (ChannelState.CLOSING, ChannelState.CLOSED):
            self._move(ChannelState.CLOSING)
            self._held = b""
            super().loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._move(ChannelState.CLOSED)
        self._held = b""
        super().connectionLost(reason)
