"""Try a change of this process in a child process, and report the problem that it would cause."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

_LONGEST = 4096  # bytes of a problem: fewer than a pipe takes at once


def problem_of(change: Callable[[], str | None]) -> str | None:
    """Call `change` in a forked child, and return what it returns: None when all is well, or one line.

    Chroots, users and groups cannot be taken back; whether they can be had depends on capabilities, sandboxes and user
    namespaces, of which only an attempt knows. To be called while the process has one thread. Raises OSError when no
    child can be made.
    """
    receiver, sender = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            _answer(change, sender)
    finally:
        os.close(sender)
        with open(receiver, "rb") as file:
            said = file.read()
    with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored, and it is gone already
        os.waitpid(child, 0)
    if not said:  # killed, most likely by a filter of system calls
        return "a child process that tried it was killed"
    return said[1:].decode(errors="replace") or None


def _answer(change: Callable[[], str | None], sender: int) -> None:
    """End this child with the answer. Nothing of its parent runs in it: no atexit handler, no flush of a buffer."""
    try:
        try:
            problem = change()
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        os.write(sender, b"=" + (problem or "").encode(errors="replace")[:_LONGEST])
    finally:
        os._exit(0)
