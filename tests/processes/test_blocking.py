"""Locked directories, full backlogs, and pipes instead of files delay a start or a reload for a bounded time.

Each case ends with one error line that names the file. Without a bound, the processes would wait until the deadline of
the test.
"""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import DAEMON, FOREGROUND
from tests.support.refused import assert_refused


@contextlib.contextmanager
def locked(directory: Path, kind: int) -> Iterator[None]:
    """Lock a directory, which any user with read permission can do."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


# --- locks ---


@pytest.mark.parametrize(
    ("twistd", "kind", "more"),
    [(FOREGROUND, fcntl.LOCK_EX, []), (DAEMON, fcntl.LOCK_SH, ["--workers=2"])],
    ids=["exclusive-foreground", "shared-daemon-workers"],
)
def test_a_locked_directory_is_one_error_line_and_leaves_no_files(run, tmp_path, twistd, kind, more) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", kind):
        result = run(*twistd, "rtservice", "--listen=tcp:0:interface=127.0.0.1", "--listen=unix:run/s", *more)
    assert_refused(result, "rtservice: --listen unix:run/s: ", f"'{tmp_path}/run/s'", "locked", "lslocks")
    assert not list((tmp_path / "run").iterdir())


def test_a_status_socket_in_a_locked_directory_is_one_error_line(run, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", fcntl.LOCK_EX):
        result = run(*FOREGROUND, "rtservice", "--port=0", "--status=unix:run/s")
    assert_refused(result, "rtservice: --status unix:run/s: ", "locked")


def test_check_does_not_wait_for_a_lock(run, tmp_path) -> None:
    with locked(tmp_path, fcntl.LOCK_EX):
        result = run(*FOREGROUND, "rtservice", "--check", "--listen=unix:s")
    assert (result.returncode, result.stderr) == (0, "")


# --- sockets ---


def test_a_unix_socket_with_a_full_backlog_is_reported_in_use_without_waiting(run, tmp_path) -> None:
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(tmp_path / "s"))
        listening.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(tmp_path / "s"))
        assert_refused(run(*FOREGROUND, "rtservice", "--listen=unix:s"), f"'{tmp_path}/s' is in use")


# --- pipes instead of files ---


def pipes_in(directory: Path, *names: str) -> None:
    for name in names:
        os.mkfifo(directory / name)


@pytest.mark.parametrize(("twistd", "check"), [(FOREGROUND, []), (DAEMON, ["--check"])], ids=["serve", "daemon-check"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol-option=greeting=@pipe"], ["option greeting: ", "/pipe' is not a regular file"]),
        (["--protocol-option=greeting=@pipe", "--workers=2"], ["option greeting: ", "/pipe' is not a regular file"]),
        (["--config=pipe"], ["/pipe: is not a regular file"]),
        (["--listen=ssl:0:privateKey=pipe:certKey={0[server.pem]}"], ["private key", "/pipe'", "not a regular file"]),
        (["--listen=ssl:0:privateKey={0[server.key]}:certKey=pipe"], ["certificate", "/pipe'", "not a regular file"]),
        (["--listen=ssl:0:privateKey={0[server.key]}:certKey={0[server.pem]}:clientCA=pipe"], ["client CA", "/pipe'"]),
        (
            ["--listen=ssl:0:privateKey={0[server.key]}:certKey={0[server.pem]}:clientCA={0[ca.pem]}:clientCRL=pipe"],
            ["/pipe'"],
        ),
        (["--listen=ssl:0:certificates=pipes"], ["/pipes/pipe.pem'", "not a regular file"]),
        (["--status=ssl:0:privateKey=pipe:certKey=pipe"], ["--status", "/pipe'", "not a regular file"]),
        (["--listen=unix:pipe"], ["--listen", "/pipe' exists and is not a socket"]),
    ],
    ids=lambda value: value[0].partition(":privateKey={0[server.key]}")[2] or value[0] if value[0][0] == "-" else None,
)
def test_a_pipe_instead_of_a_file_is_one_error_line(
    run, tmp_path, certificates, twistd, check, arguments, words
) -> None:
    (tmp_path / "pipes").mkdir()
    pipes_in(tmp_path, "pipe", "pipes/pipe.pem")
    given = [argument.format(certificates) for argument in arguments]
    assert_refused(run(*twistd, "rtservice", *given, *check), *words)


@pytest.mark.parametrize("where", ["--rundir=.", "--chroot=."])
@pytest.mark.parametrize("more", [[], ["--workers=2"], ["--check"]], ids=["single-process", "workers", "check"])
def test_a_pidfile_that_is_a_pipe_is_one_error_line(run, tmp_path, where, more) -> None:
    if where.startswith("--chroot") and os.getuid() != 0:
        pytest.skip("only root can change the root")
    pipes_in(tmp_path, "d.pid")
    result = run("--nodaemon", "--pidfile=d.pid", where, "rtservice", "--listen=unix:s", *more)
    assert_refused(result, "rtservice: --pidfile d.pid: not a regular file")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_a_pidfile_that_blocks_twistd_is_one_error_line(run, tmp_path, kind) -> None:
    pipes_in(tmp_path, "pipe")
    (tmp_path / "link").symlink_to("pipe")
    path = "/dev/zero" if kind == "device" else kind
    assert_refused(run(f"--pidfile={path}", "--logfile=d.log", "rtservice", "--port=0"), f"--pidfile {path}: not a reg")


@pytest.mark.parametrize(
    "options", [["--logfile=pipe"], ["--logfile=-", "rtservice", "--access-log=pipe"]], ids=" ".join
)
def test_a_log_pipe_without_a_reader_is_one_error_line(run, tmp_path, options) -> None:
    pipes_in(tmp_path, "pipe")
    arguments = options if "rtservice" in options else [*options, "rtservice"]
    assert_refused(run("--nodaemon", "--pidfile=", *arguments, "--port=0"), "pipe: cannot be written")


# --- a reload ---


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["rt.toml", "served.key", "served.pem"])
def test_reload_with_a_pipe_instead_of_a_file_fails_and_keeps_serving(
    service, tmp_path, certificates, workers, name
) -> None:
    (tmp_path / "rt.toml").write_text("")
    for ending in ("key", "pem"):
        shutil.copy(certificates[f"server.{ending}"], tmp_path / f"served.{ending}")
    running = service(
        *("--config=rt.toml", f"--workers={workers}", "--listen=tcp:0:interface=127.0.0.1"),
        "--listen=ssl:0:interface=127.0.0.1:privateKey=served.key:certKey=served.pem",
    )
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    failed = running.reload()
    assert failed["event"] == "reload.failed"
    assert name in failed["problem"]
    assert "not a regular file" in failed["problem"]
    with running.connect() as client:
        assert client.recv(100)[:1]
    assert running.stop() == 0
