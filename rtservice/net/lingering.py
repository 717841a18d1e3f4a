"""The last stage of a connection: its unsent output is sent, then it is closed."""

from __future__ import annotations

from typing import Any

from twisted.internet import main
from twisted.python.failure import Failure

from rtservice.net.connection import BUFFER_SIZE, DONE, Connection, Stage
from rtservice.net.phases import CLOSING

# A closed connection whose output is still under way is kept while something moves within each of these many seconds,
# and for this many of them at the most.
_STEP, _STEPS = 1.0, 30


class Lingering(Stage):
    """The end of a connection whose last output is under way: FIN is sent, and input is read and dropped.

    It ends when the peer has finished, when nothing moves any more, or after half a minute. The protocol is told after
    that.
    """

    __slots__ = ("_before", "_deadline", "_moved", "_phase", "_steps")

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._before = connection._stage
        self._phase = connection.phase
        self._steps = _STEPS  # how often it may still wait
        self._moved: tuple[int, int] | None = None  # what had moved when it last looked
        self._deadline: Any = None

    def begin(self) -> None:
        """Take the place of the stage below the connection."""
        connection = self.connection
        connection._writable = connection._sending = False
        connection.enter(CLOSING, self)
        self._check()
        if not connection.disconnected:
            connection.reactor.addReader(self)

    def flush(self) -> None:
        self.connection._corked = False  # nothing is sent any more

    def pause(self) -> None:
        """Read on: with input unread at the end, the kernel would drop the last output."""

    def doRead(self) -> Any:
        connection = self.connection
        try:
            data = connection._recv(BUFFER_SIZE)  # below TLS
        except BlockingIOError:
            return None
        except OSError as problem:
            connection.error = connection.error or problem.with_traceback(None)
            return main.CONNECTION_LOST
        connection.bytes_in += len(data)
        return None if data else main.CONNECTION_DONE

    def _check(self) -> None:
        self._deadline = None
        connection = self.connection
        moved = connection.bytes_in, connection._in_flight()
        if moved == self._moved or not self._steps:
            connection.connectionLost(DONE)
        else:
            self._steps -= 1
            self._moved = moved
            self._deadline = connection.reactor.callLater(_STEP, self._check)

    def readConnectionLost(self, reason: Failure) -> None:
        self.connection.connectionLost(DONE)

    def stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def ended(self, reason: Failure) -> Failure:
        # The record and the protocol see the phase that the connection came to before its end.
        self.connection.phase = self._phase
        return reason if self._before is None else self._before.ended(reason)
