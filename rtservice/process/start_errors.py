"""A start that fails: its exception, and its reason in one line."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from rtservice.events import START_EXCEPTION


class StartError(SystemExit, Exception):
    """The service cannot start. The text is the reason, which is already reported.

    Twistd removes the pidfile for an Exception, and the interpreter prints no traceback for a SystemExit: it has to be
    both.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.code = 1  # with a text as code, the interpreter would print it again


def one_line(failure: Failure) -> str:
    """Return the type and the text of an exception in one line."""
    try:
        text = " ".join(str(failure.value).split())
    except BaseException:  # __str__ may be hosted code
        text = ""
    return f"{type(failure.value).__name__}{text and f': {text}'}"


def traceback_level(error: BaseException | None) -> Any:
    """Return the level at which to log the traceback of a failed start: debug if the system rejected a call."""
    return LogLevel.debug if isinstance(error, OSError | MemoryError | KeyboardInterrupt) else LogLevel.error


def log_start_failure(log: Logger, subject: str, failure: Failure) -> str:
    """Log the traceback of a failed start, and return `<subject>: <exception>` in one line."""
    START_EXCEPTION.failure(log, failure, level=traceback_level(failure.value))
    return f"{subject}: {one_line(failure)}"
