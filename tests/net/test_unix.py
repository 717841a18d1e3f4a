"""UNIX sockets: mode, stale files, and the lock of the directory."""

import contextlib
import fcntl
import os
import pathlib
import socket
import stat
from collections.abc import Iterator

import pytest

from rtservice.net import unix
from rtservice.net.description import ListenError
from rtservice.net.listen_types import open_description


def test_a_unix_socket_has_its_mode_and_is_removed_on_close(opened, tmp_path) -> None:
    path = tmp_path / "s"
    (listener,) = opened(f"unix:{path}:mode=640")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    listener.close()
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced(opened, tmp_path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
    (listener,) = opened(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert listener.name == f"unix:{path}"


def test_a_unix_socket_in_use_is_rejected(opened, tmp_path) -> None:
    path = tmp_path / "s"
    opened(f"unix:{path}")
    with pytest.raises(ListenError, match="stop the process that listens on it"):
        opened(f"unix:{path}")
    assert path.exists()


def test_a_file_that_is_not_a_socket_is_rejected_and_kept(opened, tmp_path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        opened(f"unix:{path}")
    assert path.read_text() == "precious"


def test_a_too_long_unix_path_is_rejected(opened, tmp_path) -> None:
    with pytest.raises(ListenError, match="longer than 107 bytes"):
        opened(f"unix:{tmp_path}/{'x' * 108}")


def test_close_keeps_the_socket_file_of_a_successor(opened, tmp_path) -> None:
    path = tmp_path / "s"
    (first,) = opened(f"unix:{path}")
    path.unlink()
    opened(f"unix:{path}")
    first.close()
    assert path.exists()


# --- the lock of a socket's directory ---


@pytest.fixture
def locked_directory(tmp_path) -> Iterator[tuple[pathlib.Path, int]]:
    """A directory locked by another descriptor; closing that descriptor unlocks it."""
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield tmp_path, descriptor
    with contextlib.suppress(OSError):
        os.close(descriptor)


def test_a_lock_released_in_time_is_acquired(locked_directory, monkeypatch) -> None:
    directory, descriptor = locked_directory
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.close(descriptor)

    monkeypatch.setattr(unix.time, "sleep", sleep)
    [listener] = open_description(f"unix:{directory}/s", backlog=1)
    listener.close()
    assert len(waits) == 3


def test_a_lock_that_stays_held_is_an_error_in_bounded_time_and_leaves_no_socket(locked_directory, monkeypatch) -> None:
    directory, _ = locked_directory
    monkeypatch.setattr(unix, "_LOCK_WAIT", 0.1)
    for _ in range(2):  # and no open descriptor
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ListenError, match=f"'{directory}/s': another process has locked its directory"):
            open_description(f"unix:{directory}/s", backlog=1)
        assert os.listdir("/proc/self/fd") == before
    assert not list(directory.iterdir())
