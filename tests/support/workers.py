"""A `twistd rtservice` with workers."""

import re
import signal
from collections.abc import Callable
from typing import Any

from tests.support.processes import born, children
from tests.support.recorded import recorded


class Workers:
    """A `twistd rtservice` with workers."""

    def __init__(self, service: Any, wait_for: Callable[..., Any]) -> None:
        self.service = service
        self.pid: int = service.process.pid
        self._wait_for = wait_for
        self._seen: dict[int, str] = {}
        self.pids()

    def pids(self) -> list[int]:
        """Return the pids of the workers, oldest first."""
        found = children(self.pid)
        self._seen |= {pid: born(pid) for pid in found}
        return found

    def left(self) -> list[int]:
        """Return the pids of all workers seen so far that still exist."""
        return [pid for pid, when in self._seen.items() if when and born(pid) == when]

    def of_slot(self, slot: int) -> int:
        """Return the pid of the worker that became ready last in a slot."""
        return int(self.recorded("worker.ready", slot=slot)[-1]["pid"])

    def send(self, number: int) -> None:
        self.service.process.send_signal(number)

    def ready(self) -> list[int]:
        """Return the pids of the workers that have become ready, oldest first."""
        ready = {event["pid"] for event in self.recorded("worker.ready")}
        return [pid for pid in self.pids() if pid in ready]

    def settled(self, count: int) -> list[int]:
        """Wait until there are exactly so many workers and all are ready; return their pids."""

        def are_ready() -> list[int]:
            found = self.pids()
            return found if len(found) == count and self.ready() == found else []

        return list(self._wait_for(are_ready))

    def wait_event(self, name: str, number: int = 1, /, **fields: Any) -> dict[str, Any]:
        return dict(self.service.wait_event(name, number, **fields))

    def recorded(self, name: str, /, **fields: Any) -> list[dict[str, Any]]:
        """Return the records of an event with these fields, so far."""
        return recorded(self.service.events, name, **fields)

    def wait_line(self, pattern: str, count: int = 1) -> str:
        return str(self.service.wait_line(pattern, count))

    def lines(self, pattern: str) -> list[str]:
        return [line for line in list(self.service.lines) if re.search(pattern, line)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.pids()
        status = int(self.service.stop(number))
        assert self.left() == []
        return status
