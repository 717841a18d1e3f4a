"""Sockets in the network namespace of another process."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Enter the network of a process in this thread; sockets created meanwhile stay in that network."""
    with open("/proc/thread-self/ns/net") as host, open(f"/proc/{pid}/ns/net") as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(host.fileno())


def _enter(fd: int) -> None:
    # os.setns() needs Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, 0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "setns")
