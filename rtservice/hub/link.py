"""A link: the stream socket between this worker and another one, with frames in both directions."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

from twisted.internet import error
from twisted.python.failure import Failure

from rtservice.hub.frames import Frame, FrameDecoder, FrameError
from rtservice.hub.outbox import MOST_CONTROL, Outbox

# Bytes of one read: their frames are handled at once, in a few milliseconds.
_READ = 64 * 1024

# Frames that are added from the snapshot at a time, and the unsent bytes with which more are added.
_SNAPSHOT_FRAMES, _SNAPSHOT_BYTES = 200, 64 * 1024

_ENDED = Failure(error.ConnectionDone())


class LinkUser(Protocol):
    """The user of a link."""

    def frames_received(self, link: Link, frames: list[Frame]) -> None:
        """Handle frames."""

    def link_failed(self, link: Link, problem: str) -> None:
        """The peer sends invalid frames, or does not read: nothing is sent or handled any more until the link ends."""

    def link_ended(self, link: Link) -> None:
        """The peer has closed the link, or its process has ended. All that it sent was handled."""

    def link_flushed(self, link: Link) -> None:
        """Everything is sent. Called after `notify_flushed` only."""


class Link:
    """A link with the process `peer`, an incarnation.

    `snapshot` are the first frames. They are made while they are sent; frames of `send` follow them. All frames of one
    turn of the reactor are sent with one system call. This is an IReadWriteDescriptor of the reactor.
    """

    def __init__(
        self, reactor: Any, sock: socket.socket, *, peer: int, user: LinkUser, snapshot: Iterator[bytes]
    ) -> None:
        self.peer = peer
        self.outbox = Outbox()
        self._reactor = reactor
        self._write_soon: Any = getattr(reactor, "write_soon", None)  # of our reactor
        self._socket = sock
        self._user = user
        self._decoder = FrameDecoder()
        self._snapshot: Iterator[bytes] | None = snapshot
        self._later: list[bytes] = []  # frames that follow the snapshot
        self._later_size = 0
        self._scheduled = False  # doWrite will be called
        self._waiting = False  # it is called when the socket is writable
        self._writes = True  # the peer reads
        self._failed = False
        self._notify = False
        self._process_ended = False
        self.ended = False
        sock.setblocking(False)
        reactor.addReader(self)
        self._schedule()

    # --- output ---

    def send(self, frame: bytes) -> None:
        """Send a frame other than a message."""
        if not self._writes:
            return
        if self._snapshot is not None:
            self._later.append(frame)
            self._later_size += len(frame)
        else:
            self.outbox.add(frame)
        if self.outbox.size + self._later_size > MOST_CONTROL:
            self._fail("does not read its link")
        elif not self._scheduled:
            self._schedule()

    def send_message(self, topic: str, frame: bytes) -> bool:
        """Send a message, or drop it if too many bytes are not sent. Return whether it is sent."""
        if not self._writes:
            return True  # the process has ended, or is about to be killed
        accepted = self.outbox.add_message(topic, frame)
        if not self._scheduled:
            self._schedule()
        return accepted

    def notify_flushed(self) -> None:
        """Call the user's `link_flushed` when everything is sent."""
        self._notify = True
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            if self._write_soon is not None:
                self._write_soon(self)
            else:
                self._wait()

    def _wait(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._reactor.addWriter(self)

    def _take_snapshot(self) -> None:
        """Add the next frames of the snapshot, and at its end those that follow it."""
        outbox = self.outbox
        while self._snapshot is not None and outbox.size < _SNAPSHOT_BYTES:
            frames = list(islice(self._snapshot, _SNAPSHOT_FRAMES))
            if not frames:
                self._snapshot = None
                frames, self._later, self._later_size = self._later, [], 0
            for frame in frames:
                outbox.add(frame)

    def doWrite(self) -> None:
        """Send what waits. Called by the reactor."""
        if self.ended:
            return
        if self._snapshot is not None:
            self._take_snapshot()
        outbox = self.outbox
        data = outbox.next()
        if data:
            try:
                outbox.sent(self._socket.send(data))
            except BlockingIOError:
                pass
            except OSError:  # the peer has closed its end; what it sent before is still read
                self._stop_writing()
        if self._writes and (outbox.size or self._snapshot is not None):
            self._wait()
            return
        self._scheduled = False
        if self._waiting:
            self._waiting = False
            self._reactor.removeWriter(self)
        if self._notify:
            self._notify = False
            self._user.link_flushed(self)

    def _stop_writing(self) -> None:
        self._writes = False
        self._snapshot = None
        self._later.clear()
        self.outbox.clear()

    # --- input ---

    def doRead(self) -> Failure | None:
        """Read and handle frames. Called by the reactor."""
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return _ENDED if self._process_ended else None
        except OSError:  # the peer has closed its end without reading everything
            return _ENDED
        if not data:
            return _ENDED
        if self._process_ended:
            self._reactor.callLater(0, self._read_rest)
        if not self._failed:
            try:
                frames = self._decoder.feed(data)
            except FrameError as problem:
                self._fail(f"sent {problem}")
            else:
                self._user.frames_received(self, frames)
        return None

    def process_ended(self) -> None:
        """End the link when everything that the peer sent is read: its process has ended.

        The socket alone does not show this if a child of that process has a copy of it.
        """
        self._process_ended = True
        self._reactor.callLater(0, self._read_rest)

    def _read_rest(self) -> None:
        if not self.ended:
            reason = self.doRead()
            if reason is not None:
                self.connectionLost(reason)

    # --- end ---

    def _fail(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            self._stop_writing()
            self._user.link_failed(self, problem)

    @property
    def failed(self) -> bool:
        """Whether the peer violates the protocol or does not read. The supervisor will kill it."""
        return self._failed

    def connectionLost(self, reason: object) -> None:
        """Close, and report the end. Called by the reactor."""
        if not self.ended:
            self.close()
            self._user.link_ended(self)

    def close(self) -> None:
        """Close the link without reporting it."""
        if not self.ended:
            self.ended = True
            self._stop_writing()
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor of the socket, or -1 after the end."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """Return the prefix of log records of this link."""
        return f"link with {self.peer}"
