"""A service whose output goes where the test says, and a client of it."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rtservice.testing import DEADLINE

TWISTD = str(Path(sys.executable).parent / "twistd")
GREETING = b"Hello from the server!"


@pytest.fixture
def greets() -> Callable[..., bool]:
    """Connects to the UNIX socket `s` in a directory, from a socket of a name, and leaves."""

    def greets(directory: Path, name: bytes | None = None) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            if name is not None:
                client.bind(os.fsencode(directory) + b"/" + name)
            try:
                client.connect(f"{directory}/s")
            except OSError:
                return False
            return client.recv(100) == GREETING

    return greets


@pytest.fixture
def start(tmp_path, environment, wait_for, greets) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `twistd -n rtservice` on a UNIX socket, with output where the test says, and waits until it serves.

    `root` is the directory that its --chroot names.
    """
    started = []

    def start(*arguments, twistd=(), launcher=(), env=None, root=None, **streams) -> subprocess.Popen:
        listen = "--listen=unix:/s" if root else f"--listen=unix:{tmp_path}/s"
        process = subprocess.Popen(
            [*launcher, TWISTD, "-n", "--pidfile=", *twistd, "rtservice", listen, *arguments],
            cwd=tmp_path,
            env={**environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            **streams,
        )
        started.append(process)
        wait_for(lambda: greets(root or tmp_path))
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
