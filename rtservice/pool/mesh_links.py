"""Link the workers that use the hub with each other: the supervisor makes the sockets, and passes them to the workers.

A worker asks for its links once, and gets an incarnation: a number that increases in the order in which workers ask.
The supervisor keeps no copy of a link. So when a worker process ends, its links end for all others at once.
"""

from __future__ import annotations

import socket
from array import array
from collections import deque
from typing import Any

from twisted.internet import error
from twisted.python.failure import Failure

from rtservice.hub.roster import encode_gone, encode_link, encode_welcome

# The maximum number of datagrams that a worker has not read. With more, it counts as one that does not read.
_MOST_UNREAD = 200

_ENDED = Failure(error.ConnectionDone())


class LinkChannel:
    """The supervisor's end of a worker's link channel, an IWriteDescriptor.

    `inherited` is the end of the worker, which must be closed after the worker is spawned. Each datagram is sent at
    once or, while the worker does not read, later. Raises OSError.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._socket, self.inherited = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._unsent: deque[tuple[bytes, socket.socket | None]] = deque()
        self._fails = False
        self.closed = False

    @property
    def full(self) -> bool:
        """Whether the worker does not read."""
        return len(self._unsent) > _MOST_UNREAD or self._fails

    def send(self, datagram: bytes, sock: socket.socket | None = None) -> None:
        """Send a datagram, with a socket that is closed here after that."""
        if self.closed:
            if sock is not None:
                sock.close()
            return
        self._unsent.append((datagram, sock))
        if len(self._unsent) == 1:
            reason = self.doWrite()
            if reason is not None:
                self.close()
            elif self._unsent:
                self._reactor.addWriter(self)

    def doWrite(self) -> Failure | None:
        """Send the datagrams that wait. Called by the reactor."""
        while self._unsent:
            datagram, sock = self._unsent[0]
            rights = [] if sock is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [sock.fileno()]))]
            try:
                self._socket.sendmsg([datagram], rights)
            except BlockingIOError:
                return None
            except ConnectionError:  # the worker has stopped its hub, or is about to end
                return _ENDED
            except OSError:  # ETOOMANYREFS: too many sockets are under way
                self._fails = True
                break
            self._unsent.popleft()
            if sock is not None:
                sock.close()
        self._reactor.removeWriter(self)
        return None

    def close(self) -> None:
        """Close the channel, and drop the datagrams that were not sent; their links end."""
        if not self.closed:
            self.closed = True
            self._reactor.removeWriter(self)
            self._socket.close()
            self.inherited.close()
            for _, sock in self._unsent:
                if sock is not None:
                    sock.close()
            self._unsent.clear()

    def connectionLost(self, reason: object) -> None:
        """Close the channel. Called by the reactor."""
        self.close()

    def fileno(self) -> int:
        """Return the descriptor of the socket, or -1 after the end."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """Return the prefix of log records of this channel."""
        return "link channel"


class MeshLinks:
    """The workers of the mesh, by their incarnations."""

    def __init__(self) -> None:
        self._last = 0
        self._channels: dict[int, LinkChannel] = {}

    def add(self, channel: LinkChannel) -> list[LinkChannel]:
        """Link the worker of this channel with all others. Return the channels of workers that do not read.

        Raises OSError if there are no descriptors; the worker must end then.
        """
        if channel.closed:  # its process has ended
            return []
        self._last += 1
        others = dict(self._channels)
        self._channels[self._last] = channel
        channel.send(encode_welcome(self._last, len(others)))
        for incarnation, other in others.items():
            end, other_end = socket.socketpair()
            channel.send(encode_link(incarnation), end)
            other.send(encode_link(self._last), other_end)
        return [each for each in self._channels.values() if each.full]

    def remove(self, channel: LinkChannel) -> None:
        """Remove a worker whose process has ended. Without `add`, only its channel is closed."""
        channel.close()
        gone = [incarnation for incarnation, other in self._channels.items() if other is channel]
        for incarnation in gone:
            del self._channels[incarnation]
            for other in self._channels.values():
                other.send(encode_gone(incarnation))

    def channel_of(self, incarnation: int) -> LinkChannel | None:
        """Return the channel of a worker, or None if its process has ended."""
        return self._channels.get(incarnation)
