"""A reactor for tests alone: whatever it listens on is served by our Port and Connection instead of Twisted's."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Any

from twisted.internet import error, task
from twisted.internet.defer import Deferred
from twisted.internet.main import installReactor

from rtservice.net import listeners, reactor, stream


class ListeningPort(stream.Port):
    """A Port that owns its socket, as those that Twisted's `listenTCP` and `listenUNIX` give do."""

    _type = "TCP"  # set by Twisted's listenSSL

    def __init__(self, reactor: Any, listener: listeners.Listener, factory: Any) -> None:
        super().__init__(reactor, listener.socket, factory, name=listener.name)
        self.listener = listener
        self.startListening()

    def stopListening(self) -> Deferred[None]:
        self.reactor.removeReader(self)
        return task.deferLater(self.reactor, 0, self._close)

    def _close(self) -> None:
        super().stopListening()
        self.listener.close()

    def connectionLost(self, reason: Any) -> None:
        self._close()

    loseConnection = stopListening


class Reactor(reactor.Reactor):
    """Ours, with listenTCP, listenUNIX, listenSSL and adoptStreamPort on top of `listeners` and `Port`."""

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> ListeningPort:
        kind, where = "tcp6" if ":" in interface else "tcp", interface.replace(":", r"\:")
        try:
            (listener,) = listeners.open_description(f"{kind}:{port}:interface={where}", backlog=backlog)
        except listeners.ListenError as problem:
            raise error.CannotListenError(interface, port, problem.__cause__) from problem
        return ListeningPort(self, listener, factory)

    def listenUNIX(
        self, address: Any, factory: Any, backlog: int = 50, mode: int = 0o666, wantPID: bool = False
    ) -> ListeningPort:
        path = os.fsdecode(address)
        if path.startswith("\0"):  # the abstract namespace has no files, and `listeners` leaves it to Twisted
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.bind(path)
            sock.listen(backlog)
            return ListeningPort(self, listeners.Listener(sock, f"unix:@{path[1:]}"), factory)
        escaped = "".join("\\" + character if character in "\\:=" else character for character in path)
        try:
            (listener,) = listeners.open_description(f"unix:{escaped}:mode={mode & 0o7777:03o}", backlog=backlog)
        except listeners.ListenError as problem:
            raise error.CannotListenError(None, address, problem) from problem
        return ListeningPort(self, listener, factory)

    def adoptStreamPort(self, fileDescriptor: int, addressFamily: int, factory: Any) -> ListeningPort:
        if addressFamily not in self._supportedAddressFamilies:
            raise error.UnsupportedAddressFamily(addressFamily)
        sock = socket.socket(fileno=fcntl.fcntl(fileDescriptor, fcntl.F_DUPFD_CLOEXEC, 3))
        return ListeningPort(self, listeners.Listener(sock, f"descriptor {fileDescriptor}"), factory)


def install() -> None:
    installReactor(Reactor())
