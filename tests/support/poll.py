"""Wait, without a reactor, until something is true."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from tests.support.deadline import DEADLINE


def poll(condition: Callable[[], Any]) -> Any:
    """Wait until a function returns a true value; return it."""
    end = time.monotonic() + DEADLINE
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < end, "the deadline has passed"
        pause.wait(0.01)
    return value
