"""A reactor that spawns fake processes, which the test controls."""

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated, ReactorNotRunning
from twisted.logger import LogLevel, formatEvent
from twisted.python.failure import Failure

from rtservice.pool.control import CONTROL_OUT, LINK_CHANNEL, SupervisorMessages, encode
from rtservice.pool.worker_messages import encode_records, finished_record
from tests.support.fake_reactor import FakeReactor


class SpawningReactor(FakeReactor):
    """A fake reactor with fake processes. `stop` calls `before_stop` one turn later, as Twisted does."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[Process] = []
        self.refuse: OSError | None = None
        self.stopped = False
        self.before_stop: Callable[[], Any] = lambda: None

    def spawnProcess(
        self, protocol: Any, executable: str, arguments: list[str], environment: Any, childFDs: Any
    ) -> None:
        if self.refuse is not None:
            raise self.refuse
        process = Process(self, protocol, childFDs, environment, 1000 + len(self.processes))
        self.processes.append(process)
        protocol.makeConnection(process)

    def callFromThread(self, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    def stop(self) -> None:
        if self.stopped:
            raise ReactorNotRunning
        self.stopped = True
        self.callLater(0, self.before_stop)


class Pipe:
    """The supervisor's end of a pipe."""

    reads = True

    def startReading(self) -> None:
        self.reads = True

    def stopReading(self) -> None:
        self.reads = False


class Process:
    """A fake of Twisted's process transport; raises the same exceptions once the process has exited."""

    def __init__(
        self, reactor: SpawningReactor, protocol: Any, descriptors: dict[int, Any], environment: Any, pid: int
    ) -> None:
        self.reactor = reactor
        self.protocol = protocol
        self.descriptors = descriptors
        self.environment = environment
        # As after a fork: the supervisor closes its copy.
        self.link_end = socket.socket(fileno=os.dup(descriptors[LINK_CHANNEL]))
        self.pid: int | None = pid
        self.pipes = {number: Pipe() for number, kind in descriptors.items() if kind in ("r", "w")}
        self.signals: list[int] = []
        self.told: list[tuple[str, Any]] = []
        self._messages = SupervisorMessages(1_000_000)
        self._reason: Failure | None = None

    # --- called by the supervisor ---

    def writeToChild(self, descriptor: int, data: bytes) -> None:
        if descriptor not in self.pipes:
            raise KeyError(descriptor)
        self.told += self._messages.feed(data)

    def signalProcess(self, number: int) -> None:
        if self.pid is None:
            raise ProcessExitedAlready
        self.signals.append(number)

    def closeChildFD(self, descriptor: int) -> None:
        if descriptor in self.pipes:
            self.loses(descriptor)

    @property
    def paused(self) -> set[int]:
        """The descriptors that are currently not read."""
        return {number for number, pipe in self.pipes.items() if not pipe.reads}

    # --- called by the test: actions of the process ---

    def says(self, word: str, value: Any = None) -> None:
        self.writes(encode(word, value))

    def logs(self, text: str, **fields: Any) -> None:
        event = {"log_format": text, "log_level": LogLevel.info, "log_namespace": "its.own", "log_time": 1.0, **fields}
        self.writes(encode_records([finished_record(event, formatEvent(event) or "")]))

    def writes(self, data: bytes, descriptor: int = CONTROL_OUT) -> None:
        self.protocol.childDataReceived(descriptor, data)

    def exits(self, status: int = 0, killed: int | None = None) -> None:
        """Exit and be reaped; the pipes stay open."""
        self.pid = None
        self._reason = Failure(ProcessTerminated(status, killed) if status or killed else ProcessDone(0))
        self.protocol.processExited(self._reason)
        self._end_if_over()

    def loses(self, descriptor: int) -> None:
        del self.pipes[descriptor]
        self.protocol.childConnectionLost(descriptor)
        self._end_if_over()

    def dies(self, status: int = 0) -> None:
        """Exit, and close every pipe."""
        self.exits(status)
        for descriptor in sorted(self.pipes):
            self.loses(descriptor)

    def _end_if_over(self) -> None:
        if not self.pipes and self._reason is not None:
            self.protocol.processEnded(self._reason)

    def words(self) -> list[str]:
        return [word for word, _ in self.told]

    @property
    def killed(self) -> bool:
        return signal.SIGKILL in self.signals
