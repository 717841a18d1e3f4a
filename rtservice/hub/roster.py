"""The roster: the supervisor passes each worker the sockets of its links, as datagrams on its link channel.

    WELCOME  incarnation of this worker, and the number of LINK datagrams that follow for workers that joined before
    LINK     incarnation of another worker; with the socket of the link, as SCM_RIGHTS: unix(7)
    GONE     incarnation of a worker whose process has ended

The sockets have no names, so no other process can connect to them.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

from twisted.internet import error
from twisted.python.failure import Failure

_DATAGRAM = Struct("!BQQ")
_WELCOME, _LINK, _GONE = range(3)
_DESCRIPTOR = array("i").itemsize

_CLOSED = Failure(error.ConnectionDone())


class Welcome(NamedTuple):
    """This worker has joined the mesh, with this number of links to others."""

    incarnation: int
    links: int


class NewLink(NamedTuple):
    """A link with another worker."""

    peer: int
    socket: socket.socket


class Gone(NamedTuple):
    """The process of another worker has ended."""

    peer: int


class RosterError(Exception):
    """A datagram cannot be received completely. The text is for the log."""


def encode_welcome(incarnation: int, links: int) -> bytes:
    """Return the datagram of a Welcome."""
    return _DATAGRAM.pack(_WELCOME, incarnation, links)


def encode_link(peer: int) -> bytes:
    """Return the datagram of a NewLink, which is sent with a socket."""
    return _DATAGRAM.pack(_LINK, peer, 0)


def encode_gone(peer: int) -> bytes:
    """Return the datagram of a Gone."""
    return _DATAGRAM.pack(_GONE, peer, 0)


def receive(channel: socket.socket) -> Welcome | NewLink | Gone | None:
    """Receive a datagram; None if the supervisor has closed the channel.

    Raises BlockingIOError, OSError, and RosterError if this process has no free descriptor for the socket.
    """
    data, ancillary, flags, _ = channel.recvmsg(_DATAGRAM.size, socket.CMSG_SPACE(_DESCRIPTOR), socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    kind, incarnation, links = _DATAGRAM.unpack(data)
    if kind == _WELCOME:
        return Welcome(incarnation, links)
    if kind == _GONE:
        return Gone(incarnation)
    descriptors = array("i")
    for _, _, content in ancillary:
        descriptors.frombytes(content)
    if flags & socket.MSG_CTRUNC or not descriptors:
        raise RosterError("no free descriptor for a link to another worker; raise the limit of open files")
    return NewLink(incarnation, socket.socket(fileno=descriptors[0]))


class RosterReader:
    """Reads a worker's link channel: an IReadDescriptor.

    `take` is called with each datagram, and `fail` with the reason if the channel cannot be read.
    """

    def __init__(
        self,
        reactor: Any,
        channel: socket.socket,
        *,
        take: Callable[[Welcome | NewLink | Gone], None],
        fail: Callable[[str], None],
    ) -> None:
        self._reactor = reactor
        self._channel = channel
        self._take = take
        self._fail = fail
        channel.setblocking(False)
        reactor.addReader(self)

    def doRead(self) -> Failure | None:
        """Receive one datagram. Called by the reactor."""
        try:
            datagram = receive(self._channel)
        except BlockingIOError:
            return None
        except (OSError, RosterError) as problem:
            self.close()
            self._fail(os.strerror(problem.errno) if isinstance(problem, OSError) and problem.errno else str(problem))
            return None
        if datagram is None:  # the supervisor has died: no worker will join
            return _CLOSED
        self._take(datagram)
        return None

    def connectionLost(self, reason: object) -> None:
        """Close the channel. Called by the reactor."""
        self.close()

    def close(self) -> None:
        """Close the channel. Links that were not received end for the other workers."""
        self._reactor.removeReader(self)
        self._channel.close()

    def fileno(self) -> int:
        """Return the descriptor of the channel, or -1 after `close`."""
        return self._channel.fileno()

    def logPrefix(self) -> str:
        """Return the prefix of log records of this channel."""
        return "link channel"
