"""A worker's log record as an event of the supervisor's log."""

from __future__ import annotations

from typing import Any

from twisted.logger import LogEvent
from twisted.python.failure import Failure

from rtservice.pool.worker_messages import Record


class WorkerError(Exception):
    """An exception that was logged by a worker. Its text is the last line of the traceback there."""


class WorkerFailure(Failure):
    """A failure that was logged by a worker: the text of its traceback, and nothing that was an object there."""

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
    """Return the event of a record. Its only format string is constant; its text was made by the worker."""
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
