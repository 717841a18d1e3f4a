"""Convert log records of workers to events of the supervisor's log."""

from __future__ import annotations

from typing import Any

from twisted.logger import LogEvent
from twisted.python.failure import Failure

from rtservice.pool.worker_messages import Record


class WorkerError(Exception):
    """An exception that a worker logged. Its text is the last line of the worker's traceback."""


class WorkerFailure(Failure):
    """A failure that a worker logged: only the text of its traceback."""

    def __init__(self, traceback: str) -> None:
        super().__init__(WorkerError(traceback.rstrip("\n").rpartition("\n")[2]))
        self._text = traceback

    def getTraceback(self, elideFrameworkCode: int = 0, detail: str = "default") -> str:
        return self._text

    def getBriefTraceback(self) -> str:
        return self._text

    def printTraceback(self, file: Any = None, elideFrameworkCode: bool = False, detail: str = "default") -> None:
        if file is None:
            super().printTraceback(None, elideFrameworkCode, detail)
        else:
            file.write(self._text)


def as_event(record: Record, slot: int) -> LogEvent:
    """Return the event of a record. Its format string is constant; the worker has formatted the text."""
    event: LogEvent = {
        **record.fields,
        "slot": slot,
        "log_level": record.level,
        "log_namespace": record.namespace,
        "log_time": record.time,
        "log_system": f"{record.namespace}#{record.level.name} worker {slot}",
        "log_format": "{log_text}",
        "log_text": record.text,
    }
    if record.traceback:
        event["log_failure"] = WorkerFailure(record.traceback)
    return event
