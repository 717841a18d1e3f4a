"""A fake listening socket with given accept() results, and a reactor for it."""

import socket

from rtservice.net.port import Port
from tests.support.fake_reactor import FakeReactor
from tests.support.recording import Recording


class FakeListeningSocket:
    """A listening socket whose accept() returns or raises the given results."""

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


def listening(*results, **arguments) -> tuple[FakeReactor, Port]:
    clock = FakeReactor()
    port = Port(clock, FakeListeningSocket(*results), Recording(), name="test", **arguments)
    port.startListening()
    return clock, port
