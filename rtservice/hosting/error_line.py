"""Any exception as one line."""

from __future__ import annotations

import os
import traceback

from rtservice.escaping import escaped

_HERE = os.path.dirname(__file__)


def error_line(error: BaseException) -> str:
    """Return an exception as one line, with the file and line that raised it."""
    text = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError):
        return escaped(f"{text} ({error.filename}, line {error.lineno})")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    where = ""
    # A line of this package would not help: the cause is a call that it made.
    if frames and os.path.dirname(frames[-1].filename) != _HERE:
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return escaped(" ".join(f"{text}{where}".split()))
