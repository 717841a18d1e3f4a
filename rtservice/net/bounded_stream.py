"""What the TLS streams of both libraries do to keep the cost of a peer within `rtservice.net.tls_bounds`.

What was read and is more than OpenSSL may get in one event is the *rest*: it is taken in later turns of the reactor,
and nothing is read meanwhile. A peer that does not read what TLS itself has to send is *held*: nothing is read until
that has left, and the connection is aborted if it makes no progress.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.main import CONNECTION_DONE

from rtservice.net.connection import DONE, LOST, Connection, Stage
from rtservice.net.tls_bounds import ANSWER_TIMEOUT, ANSWERS_NOT_READ


class BoundedStream(Stage):
    """A stream that reads for a TLS library."""

    __slots__ = ("_deadline", "_scheduled", "held", "reading")

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.reading = True  # the protocol has not paused it
        self.held = False
        self._scheduled = False  # a call that takes the rest
        self._deadline: Any = None  # the delayed call that checks whether a peer that is held makes progress

    # --- for subclasses to say ---

    def has_rest(self) -> bool:
        """Return whether there is something to take without a read, for a protocol that reads."""
        raise NotImplementedError

    def take_rest(self) -> Any:
        """Take the rest, or as much of it as is for this turn. Returns what doRead does."""
        raise NotImplementedError

    def progress(self) -> Any:
        """Return something that differs once the peer has read more."""
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
        """Read nothing until what is left has been taken."""
        self.connection.reactor.removeReader(self)
        self.take_rest_later()

    def take_rest_later(self) -> None:
        """Take the rest in the next turn of the reactor."""
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

    # --- what TLS itself has to send ---

    def hold(self) -> None:
        """Read nothing more from a peer that does not read what TLS has to tell it."""
        if not self.held:
            self.held = True
            self.connection.reactor.removeReader(self)
            if self._deadline is None:  # or that of its handshake, which ends this too
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
        """Read on: what TLS had to send has left."""
        self.held = False
        self.stop()
        if self.reading:
            self.resume()

    def stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
