"""The last stage of a connection: waits until the last output is delivered, then closes."""

from __future__ import annotations

from typing import Any

from twisted.internet import main
from twisted.python.failure import Failure

from rtservice.net.connection import BUFFER_SIZE, DONE, Connection, Stage
from rtservice.net.phases import CLOSING

# A lingering connection is kept while bytes are received or acknowledged in each interval of _STEP seconds, for at most
# _STEPS intervals.
_STEP, _STEPS = 1.0, 30


class Lingering(Stage):
    """The stage of a connection that closes with undelivered output: FIN is sent, input is read and discarded.

    It ends at the peer's FIN, when nothing more is received or acknowledged, or after 30 seconds. The protocol's
    connectionLost is called after that.
    """

    __slots__ = ("_before", "_deadline", "_moved", "_phase", "_steps")

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._before = connection._stage
        self._phase = connection.phase
        self._steps = _STEPS  # remaining intervals
        self._moved: tuple[int, int] | None = None  # bytes received and in flight at the last check
        self._deadline: Any = None

    def begin(self) -> None:
        """Replace the stage below the connection."""
        connection = self.connection
        connection._writable = connection._sending = False
        connection.enter(CLOSING, self)
        self._check()
        if not connection.disconnected:
            connection.reactor.addReader(self)

    def flush(self) -> None:
        self.connection._corked = False  # there is nothing to send

    def pause(self) -> None:
        """Continue to read: closing with unread input would make the kernel discard the last output."""

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
        # Logs and the protocol see the phase before CLOSING.
        self.connection.phase = self._phase
        return reason if self._before is None else self._before.ended(reason)
