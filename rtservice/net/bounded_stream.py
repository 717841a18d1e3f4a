"""Base class of both TLS streams: keeps the cost of a peer within the bounds of `rtservice.net.tls_bounds`.

The *rest* is input beyond what OpenSSL may process in one event. It is processed in later turns of the reactor, and
reading pauses meanwhile. A peer that does not read the messages of TLS itself is *held*: reading pauses until they are
sent, and the connection is aborted if the peer makes no progress.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.main import CONNECTION_DONE

from rtservice.net.connection import DONE, LOST, Connection, Stage
from rtservice.net.tls_bounds import ANSWER_TIMEOUT, ANSWERS_NOT_READ


class BoundedStream(Stage):
    """A stage that reads for a TLS library, with bounded work for each event."""

    __slots__ = ("_deadline", "_scheduled", "held", "reading")

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.reading = True  # the protocol has not paused reading
        self.held = False
        self._scheduled = False  # a call of take_rest is scheduled
        self._deadline: Any = None  # the delayed call that checks whether a held peer makes progress

    # --- implemented by subclasses ---

    def has_rest(self) -> bool:
        """Return whether input is left that needs no read from the socket."""
        raise NotImplementedError

    def take_rest(self) -> Any:
        """Process the rest, up to the bound for one event. Returns what doRead returns."""
        raise NotImplementedError

    def progress(self) -> Any:
        """Return a value that changes when the peer reads."""
        raise NotImplementedError

    # --- the rest ---

    def pause(self) -> None:
        self.reading = False
        super().pause()

    def resume(self) -> None:
        self.reading = True
        if self.held:
            return
        if self.has_rest():
            self.take_rest_later()
        else:
            super().resume()

    def leave_rest(self) -> None:
        """Pause reading until the rest is processed."""
        self.connection.reactor.removeReader(self)
        self.take_rest_later()

    def take_rest_later(self) -> None:
        """Process the rest in the next turn of the reactor."""
        if not self._scheduled:
            self._scheduled = True
            self.connection.reactor.callLater(0, self._take_rest_now)

    def _take_rest_now(self) -> None:
        self._scheduled = False
        connection = self.connection
        if not self.reading or self.held or connection.disconnecting or connection.disconnected:
            return
        try:
            why = self.take_rest()
        except BaseException:
            connection._failed()
            return
        if why is None:
            if self.reading and not self.held and not self.has_rest():
                super().resume()
        elif why is CONNECTION_DONE:
            connection.reactor.removeReader(self)
            self.readConnectionLost(DONE)
        else:
            connection.connectionLost(LOST)

    # --- messages of TLS itself that wait to be sent ---

    def hold(self) -> None:
        """Pause reading: the peer does not read the messages of TLS itself."""
        if not self.held:
            self.held = True
            self.connection.reactor.removeReader(self)
            if self._deadline is None:  # a handshake deadline, if set, also bounds this
                self._check_later()

    def _check_later(self) -> None:
        self._deadline = self.connection.reactor.callLater(ANSWER_TIMEOUT, self._check, self.progress())

    def _check(self, before: Any) -> None:
        self._deadline = None
        if self.progress() == before:
            self.connection.abort(ANSWERS_NOT_READ)
        else:
            self._check_later()

    def release(self) -> None:
        """Resume reading: the messages of TLS itself are sent."""
        self.held = False
        self.stop()
        if self.reading:
            self.resume()

    def stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
