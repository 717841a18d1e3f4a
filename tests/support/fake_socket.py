"""A listening socket that accepts what the test says, and a reactor for it."""

import socket

from twisted.internet.testing import MemoryReactorClock

from rtservice.net.port import Port
from tests.support.recording import Recording


class Listening:
    """A listening socket whose accept() does what it is told."""

    family = socket.AF_UNIX

    def __init__(self, *results) -> None:
        self.results = list(results)

    def fileno(self) -> int:
        return 99

    def accept(self):
        result = self.results.pop(0) if self.results else BlockingIOError()
        if isinstance(result, BaseException):
            raise result
        return result


class Reactor(MemoryReactorClock):
    """Takes our descriptors without asking for a real one."""

    def addReader(self, reader):
        self.readers.add(reader)

    def removeReader(self, reader):
        self.readers.discard(reader)


def listening(*results, **arguments) -> tuple[Reactor, Port]:
    clock = Reactor()
    port = Port(clock, Listening(*results), Recording(), name="test", **arguments)
    port.startListening()
    return clock, port
