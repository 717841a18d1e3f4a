"""The chat without a reactor: its clients on fake transports, and the processes in which it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.logger import Logger
from twisted.python.failure import Failure

from rtservice.hub.hub import Hub
from rtservice.hub.local import LocalCarrier
from rtservice.protocols.chat import ChatFactory


class Call:
    """A delayed call."""

    def __init__(self, calls: list[Call], when: float, call: Callable[[], object]) -> None:
        self._calls, self.when, self.call = calls, when, call
        calls.append(self)

    def active(self) -> bool:
        return self in self._calls

    def cancel(self) -> None:
        self._calls.remove(self)


class ManualReactor:
    """A reactor that the test runs turn by turn."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.now = 0.0

    def seconds(self) -> float:
        return self.now

    def callLater(self, delay: float, call: Any, *arguments: Any) -> Call:
        return Call(self.calls, self.now + delay, lambda: call(*arguments))

    def turn(self) -> None:
        """Run the calls that are due now, but not those that they schedule."""
        for call in [call for call in self.calls if call.when <= self.now]:
            if call in self.calls:
                self.calls.remove(call)
                call.call()

    def settle(self, seconds: float = 1000.0) -> int:
        """Advance the clock by this many seconds; return the number of turns."""
        end, count = self.now + seconds, 0
        while (due := min((call.when for call in self.calls), default=end + 1)) <= end:
            self.now = max(self.now, due)
            self.turn()
            count += 1
            assert count < 100_000, "the work has no end"
        self.now = end
        return count


class Transport(StringTransport):
    """A transport that counts unread bytes and pauses its producer, as Twisted's transports do."""

    unsent = 0
    stalled = False  # the client does not read
    writes = 0

    def write(self, data: bytes) -> None:
        super().write(data)
        self.writes += 1
        if self.stalled:
            self.unsent += len(data)
            if self.unsent > 64 * 1024:
                self.producer.pauseProducing()

    def read_all(self) -> None:
        """Simulate a client that reads everything."""
        self.unsent = 0
        if self.producer is not None:
            self.producer.resumeProducing()

    def abortConnection(self) -> None:
        self.disconnecting = True


def chat(*, carrier: Any = None, clock: Any = None, **limits: int) -> ChatFactory:
    """Return a started factory, in a process with this carrier; by default it is the only process."""
    factory = ChatFactory(**limits)
    factory.clock = clock or ManualReactor()
    hub = Hub(carrier or LocalCarrier(), Logger(observer=lambda event: None))
    hub.start(factory.clock)
    factory.doStart()
    factory.use(hub)
    return factory


class Client:
    """A connection to the server, as its client uses it."""

    def __init__(self, factory: ChatFactory, nick: str = "", room: str = "") -> None:
        self.clock: ManualReactor = factory.clock
        self.protocol: Any = factory.buildProtocol(None)
        self.transport = Transport()
        self.protocol.makeConnection(self.transport)
        if nick:
            self.send_and_settle(nick)
        if room:
            self.send_and_settle(f"/join {room}")
        self.received()

    def send(self, *lines: str) -> None:
        """Deliver lines to the server in one call of dataReceived."""
        self.protocol.dataReceived("".join(f"{line}\r\n" for line in lines).encode())

    def send_and_settle(self, *lines: str) -> None:
        """Deliver lines to the server, and run it until they are handled."""
        self.send(*lines)
        self.clock.settle()

    def received(self) -> list[str]:
        lines_received = self.transport.value().decode().splitlines()
        self.transport.clear()
        return lines_received

    def disconnect(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))
        self.clock.settle()

    @property
    def closing(self) -> bool:
        return self.transport.disconnecting
