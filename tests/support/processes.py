"""Processes, their children and sockets, from /proc."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def children(pid: int) -> list[int]:
    """Return the children of a process that are not reaped."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def born(pid: int) -> str:
    """Return the start time of a process, which together with the pid identifies it; empty if it does not exist.

    A zombie counts as not existing.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def alive(pid: int) -> bool:
    return born(pid) != ""


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def sockets_of(pid: int) -> set[str]:
    """Return the inodes of the sockets of a process."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(entry.path))
    return {link[len("socket:[") : -1] for link in found if link.startswith("socket:[")}


def accepted_by(pid: int, clients: list[socket.socket]) -> list[socket.socket]:
    """Return the clients of 127.0.0.1 whose connections a process has accepted."""
    inodes = sockets_of(pid)
    ends = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ends[fields[1], fields[2]] = fields[9]  # the inode is 0 until it is accepted

    def is_accepted(client: socket.socket) -> bool:
        near, far = (f"0100007F:{name[1]:04X}" for name in (client.getsockname(), client.getpeername()))
        return ends[far, near] in inodes

    return [client for client in clients if is_accepted(client)]


def freeze(pid: int, wait_for: Callable[..., Any]) -> None:
    """Stop a process with SIGSTOP; connections and signals stay pending in the kernel."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def cpu_seconds(*pids: int) -> float:
    """Return the CPU time that processes have used, in seconds, in user and kernel mode: proc(5)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
