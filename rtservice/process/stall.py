"""Detect a blocked reactor: a thread checks its heartbeat, and logs the stack that blocks it."""

from __future__ import annotations

import sys
import threading
import traceback
from time import monotonic
from typing import Any

from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from rtservice.events import REACTOR_BLOCKED

# Seconds after which a blocked reactor is logged: all clients wait.
BLOCKED = 1.0

# Seconds between two heartbeats of the reactor, and between two checks of the thread. Together they take 0.01 % of a
# core.
_BEAT = BLOCKED / 4

# Seconds between two log records: a protocol that blocks often blocks for every client.
_REPORT_EVERY = 10.0

# Frames in a log record, from the innermost.
_FRAMES = 12


class StallDetector:
    """Logs the stack of the reactor's thread when the reactor has been blocked for `seconds`.

    Code that holds Python's global lock all the time, such as a regular expression, is detected when it releases it.
    """

    def __init__(self, log: Logger, seconds: float = BLOCKED) -> None:
        self._log = log
        self._seconds = seconds
        self._beating = LoopingCall(self._beat)
        self._seen = 0.0
        self._reactor_thread = 0
        self._stopped = threading.Event()

    def start(self, reactor: Any) -> None:
        """Start to watch this reactor. Call it in the reactor's thread."""
        self._reactor_thread = threading.get_ident()
        self._beating.clock = reactor
        self._beating.start(_BEAT)
        # A daemon thread does not delay the exit of the process.
        threading.Thread(target=self._watch, name="rtservice blocked", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._beating.running:
            self._beating.stop()

    def _beat(self) -> None:
        self._seen = monotonic()

    def _watch(self) -> None:
        reported = -_REPORT_EVERY
        while not self._stopped.wait(_BEAT):
            now, seen = monotonic(), self._seen
            if now - seen < self._seconds or now - reported < _REPORT_EVERY:
                continue
            frame = sys._current_frames().get(self._reactor_thread)
            # A reactor in its poll call is not blocked: the whole process was suspended.
            if frame is None or frame.f_code.co_name == "doPoll" or self._seen != seen:
                continue
            stack = "".join(traceback.format_stack(frame, limit=_FRAMES)).rstrip()
            del frame
            reported = now
            # Errors are written at once: the reactor may never come back.
            REACTOR_BLOCKED.log(self._log, seconds=now - seen, stack=stack)
