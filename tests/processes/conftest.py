"""Fixtures that start services with chosen output streams or with workers, and their environment."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import TWISTD
from tests.support.deadline import DEADLINE
from tests.support.greeting import GREETING
from tests.support.programs import PROGRAMS
from tests.support.service_manager import ServiceManager
from tests.support.workers import Workers


@pytest.fixture
def greets() -> Callable[..., bool]:
    """Return whether the service on the UNIX socket `s` of a directory greets a client, optionally bound to a name."""

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
    """Start `twistd -n rtservice` on a UNIX socket with the given output streams, and wait until it serves.

    `root` is the directory of its --chroot option.
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


@pytest.fixture
def workers(service, wait_for) -> Iterator[Callable[..., Workers]]:
    """Start a service with two workers, or as many as --workers says; check that no process is left at the end."""
    started: list[Workers] = []

    def start(*arguments: str, **more: Any) -> Workers:
        if not any(argument.startswith("--workers") for argument in arguments):
            arguments = ("--workers=2", *arguments)
        running = Workers(service(*arguments, **more), wait_for)
        started.append(running)
        return running

    yield start
    for running in started:
        if running.service.process.poll() is None:
            running.pids()
            running.send(signal.SIGTERM)
            running.send(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.service.process.wait(DEADLINE)
    left = [pid for running in started for pid in running.left()]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.fixture
def site() -> dict[str, str]:
    """The environment in which a worker handles the signals of tests.support.worker_signals."""
    return {"PYTHONPATH": str(PROGRAMS / "worker_signals")}


@pytest.fixture
def broken_site(tmp_path) -> dict[str, str]:
    """The environment in which a worker rejects a setting while the file `broken` exists."""
    return {"PYTHONPATH": str(PROGRAMS / "broken_worker"), "BROKEN": str(tmp_path / "broken")}


@pytest.fixture
def manager(tmp_path) -> Iterator[ServiceManager]:
    service_manager = ServiceManager(f"{tmp_path}/notify")
    yield service_manager
    service_manager.close()


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every user can enter and write; those of pytest are private to the user."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)
