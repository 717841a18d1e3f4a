"""A connection to Redis in its protocol RESP: commands, replies in their order, and messages of subscriptions.

    send ──→ joined writes of one turn ──→ Redis
    callbacks ←── replies, in the order of the commands ←┐
    on_message ←── pushes of RESP3, between replies   ←──┴── hiredis.Reader

`hiredis` parses and packs. SUBSCRIBE and UNSUBSCRIBE have no replies: each channel is confirmed by a push. These come
in the order of the commands, too, so the commands wait in the same queue. An error of such a command is a reply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol

from rtservice.escaping import escaped
from rtservice.hub.redis_url import BadHubURL

# Bytes of an incomplete reply after which the connection is aborted. The largest are a message of 1 MiB, and 1,000
# members of 1 KiB.
MAX_REPLY = 4 << 20

# Characters of an error reply that are shown.
_SHOWN = 200

_INCOMPLETE = object()


class Refused(Exception):  # noqa: N818  # it is a reply, which the caller expects
    """An error reply of Redis. Its text may repeat arguments of the command: show only `shown` of harmless commands."""

    @property
    def code(self) -> str:
        """The first word, such as `WRONGPASS`."""
        return str(self).partition(" ")[0]

    @property
    def shown(self) -> str:
        """The text, escaped and shortened."""
        return escaped(str(self)[:_SHOWN])


class ConnectionEnded(Exception):  # noqa: N818  # as Refused
    """The connection ended before the reply, for the reason in the text."""


# What is called with a reply: with its argument, and with the reply, a Refused or a ConnectionEnded.
Callback = Callable[[Any, Any], None]
Waiting = tuple[Callback, Any]


def load_hiredis() -> Any:
    """Return the module `hiredis`. Raises BadHubURL if it is missing or too old."""
    try:
        import hiredis
    except ImportError:
        raise BadHubURL("the hub on Redis needs the package hiredis: pip install 'rtservice[redis]'") from None
    if not hasattr(hiredis, "PushNotification"):
        raise BadHubURL("the hub on Redis needs hiredis 3 or later: pip install --upgrade 'rtservice[redis]'")
    return hiredis


class _Confirmations:
    """The pushes that a SUBSCRIBE or UNSUBSCRIBE waits for."""

    __slots__ = ("confirmed", "failed", "left")

    def __init__(self, left: int, confirmed: Callable[[bytes], None], failed: Waiting) -> None:
        self.left = left
        self.confirmed = confirmed
        self.failed = failed


class RedisConnection(Protocol):
    """One connection.

    `on_message` is called with the channel and the message. `ended` fires with the reason, as text, when the connection
    has ended; callbacks of commands without a reply have been called with a ConnectionEnded then.
    """

    transport: Any

    def __init__(self, hiredis: Any, reactor: Any, on_message: Callable[[bytes, bytes], None] | None = None) -> None:
        reader = hiredis.Reader(replyError=Refused, notEnoughData=_INCOMPLETE)
        self._feed, self._next = reader.feed, reader.gets
        self._pack, self._push_type, self._bad_data = (
            hiredis.pack_command,
            hiredis.PushNotification,
            hiredis.HiredisError,
        )
        self._reactor = reactor
        self._on_message = on_message
        self._waiting: deque[Waiting] = deque()
        self._output: list[bytes] = []
        self._incomplete = 0  # bytes of the incomplete reply, at most
        self._problem = ""  # why this side aborted it
        self._over = False
        self.received: float = reactor.seconds()  # the time of the last data
        self.ended: Deferred[str] = Deferred()

    def connectionMade(self) -> None:
        """Send small messages at once."""
        if hasattr(self.transport, "setTcpNoDelay"):
            self.transport.setTcpNoDelay(True)

    # --- commands ---

    def send(self, command: tuple[bytes | str | int, ...], waiting: Waiting) -> None:
        """Send a command. The callback is called with its argument and the reply."""
        if self._over:
            waiting[0](waiting[1], ConnectionEnded(self._problem))
            return
        self._waiting.append(waiting)
        output = self._output
        if not output:
            self._reactor.callLater(0, self._flush)
        output.append(self._pack(command))

    def request(self, *command: bytes | str | int) -> Deferred[Any]:
        """Send a command; fires with the reply, or fails with Refused or ConnectionEnded."""
        deferred: Deferred[Any] = Deferred()
        self.send(command, (_fire, deferred))
        return deferred

    def change(
        self, command: bytes, channels: Sequence[bytes], confirmed: Callable[[bytes], None], failed: Waiting
    ) -> None:
        """SUBSCRIBE or UNSUBSCRIBE. `confirmed` is called with each channel; or `failed`, as for `send`, on errors."""
        self.send((command, *channels), (_not_confirmed, _Confirmations(len(channels), confirmed, failed)))

    def _flush(self) -> None:
        output, self._output = self._output, []
        if not self._problem and self.transport is not None:
            self.transport.writeSequence(output)

    def abort(self, problem: str) -> None:
        """End the connection at once, for this reason."""
        if not self._problem and not self._over:
            self._problem = problem
            self.transport.abortConnection()

    # --- replies ---

    def dataReceived(self, data: bytes) -> None:
        """Handle replies and messages."""
        if self._problem:
            return
        self.received = self._reactor.seconds()
        self._incomplete += len(data)
        following, push_type, on_message, waiting = self._next, self._push_type, self._on_message, self._waiting
        try:
            self._feed(data)
            while (reply := following()) is not _INCOMPLETE:
                self._incomplete = len(data)
                if type(reply) is push_type:
                    if reply[0] == b"message" and on_message is not None:
                        on_message(reply[1], reply[2])
                    else:
                        self._confirm(reply)
                elif waiting:
                    callback, argument = waiting.popleft()
                    callback(argument, reply)
                else:
                    self.abort("a reply without a command")
                if self._problem:
                    return
        except self._bad_data as problem:
            self.abort(f"not the protocol of Redis: {escaped(str(problem))}")
        else:
            if self._incomplete > MAX_REPLY:
                self.abort(f"a reply of more than {MAX_REPLY >> 20} MiB")

    def _confirm(self, push: list[Any]) -> None:
        if push[0] not in (b"subscribe", b"unsubscribe"):
            return  # such as `invalidate`, which nothing has asked for
        expected = self._waiting[0][1] if self._waiting else None
        if not isinstance(expected, _Confirmations):
            # Redis ends subscriptions when the permissions of the user are reduced.
            self.abort("Redis ended a subscription")
            return
        expected.left -= 1
        if not expected.left:
            self._waiting.popleft()
        expected.confirmed(push[1])

    def connectionLost(self, reason: Any = None) -> None:
        """Call the callbacks of all commands without a reply."""
        problem = self._problem = self._problem or _text_of(reason.value)
        self._over = True  # callbacks may send commands
        waiting, self._waiting = self._waiting, deque()
        ended = ConnectionEnded(problem)
        for callback, argument in waiting:
            callback(argument, ended)
        self.ended.callback(problem)


def _fire(deferred: Deferred[Any], reply: Any) -> None:
    if deferred.called:  # it was cancelled, such as by a timeout
        return
    if isinstance(reply, Exception):
        deferred.errback(reply)
    else:
        deferred.callback(reply)


def _not_confirmed(confirmations: _Confirmations, reply: Any) -> None:
    callback, argument = confirmations.failed
    callback(argument, reply)


def _text_of(error: BaseException) -> str:
    return "connection closed by Redis" if type(error).__name__ == "ConnectionDone" else escaped(str(error))
