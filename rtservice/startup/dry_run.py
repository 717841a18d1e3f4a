"""Try a change of this process in a child process, and return the error that it would cause."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

_LONGEST = 4096  # limit of the text in bytes: a pipe accepts as many at once


def problem_of(change: Callable[[], str | None]) -> str | None:
    """Call `change` in a forked child, and return its result: None on success, or one line with the error.

    Changes of root directory, user and group cannot be undone. Whether they succeed depends on capabilities, sandboxes
    and user namespaces, which only an attempt shows. Call it while the process has one thread. Raises OSError if fork()
    fails.
    """
    receiver, sender = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            _answer(change, sender)
    finally:
        os.close(sender)
        with open(receiver, "rb") as file:
            answer = file.read()
    with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored, and the kernel has reaped the child
        os.waitpid(child, 0)
    if not answer:  # usually killed by a system call filter
        return "the child process that tried the change was killed"
    return answer[1:].decode(errors="replace") or None


def _answer(change: Callable[[], str | None], sender: int) -> None:
    """Send the result, and exit this child without running the parent's atexit handlers or flushing its buffers."""
    try:
        try:
            problem = change()
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        os.write(sender, b"=" + (problem or "").encode(errors="replace")[:_LONGEST])
    finally:
        os._exit(0)
