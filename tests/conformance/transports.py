"""A reactor with listening ports that create our `Connection`, for Twisted's tests of transports."""

import socket
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.error import UnsupportedAddressFamily
from twisted.internet.main import installReactor

from rtservice.net.port import Port
from rtservice.net.reactor import Reactor


class _Adopted:
    """Twisted's port binds, closes and logs, as its tests expect; our port accepts on its socket."""

    reactor: Any
    socket: Any
    factory: Any
    ours: Any = None

    def startReading(self) -> None:
        self.ours = Port(self.reactor, self.socket, self.factory, name=repr(self))
        self.ours.listening = True
        self.reactor.addReader(self.ours)

    def stopReading(self) -> None:
        if self.ours is not None:
            self.ours.listening = False
            self.reactor.removeReader(self.ours)


class _TCPPort(_Adopted, tcp.Port):
    pass


class _UNIXPort(_Adopted, unix.Port):
    pass


class AdoptingReactor(Reactor):
    """Our reactor, with Twisted's TLS on top in tests that use listenSSL."""

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> _TCPPort:
        listening = _TCPPort(port, factory, backlog, interface, self)
        listening.startListening()
        return listening

    def listenUNIX(
        self, address: Any, factory: Any, backlog: int = 50, mode: int = 0o666, wantPID: int = 0
    ) -> _UNIXPort:
        listening = _UNIXPort(address, factory, backlog, mode, self, wantPID)
        listening.startListening()
        return listening

    def adoptStreamPort(self, fileDescriptor: int, addressFamily: int, factory: Any) -> Any:
        kind = {socket.AF_UNIX: _UNIXPort, socket.AF_INET: _TCPPort, socket.AF_INET6: _TCPPort}.get(addressFamily)
        if kind is None:
            raise UnsupportedAddressFamily(addressFamily)
        if kind is _UNIXPort:
            listening = kind._fromListeningDescriptor(self, fileDescriptor, factory)
        else:
            listening = kind._fromListeningDescriptor(self, fileDescriptor, addressFamily, factory)
        listening.startListening()
        return listening


def install() -> None:
    """Install the reactor; tests that run it in a child process call this."""
    installReactor(AdoptingReactor())
