"""Log files of real processes with logrotate, several writers, privilege drop and missing permissions."""

import contextlib
import gzip
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from rtservice.testing import DEADLINE
from tests.support.log_texts import STILL
from tests.support.repository import ETC

LOGROTATE = shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin")
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user or the root")
needs_logrotate = pytest.mark.skipif(LOGROTATE is None, reason="logrotate (Debian: logrotate) is not installed")


@pytest.fixture
def public():
    """A directory that every user can enter; those of pytest are private to the user."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


class Traffic(threading.Thread):
    """Successive clients, each bound to a different name, until `finish`."""

    def __init__(self, directory: Path, greets, names: Sequence[str] = ()) -> None:
        super().__init__(daemon=True)
        self.names = [*names]
        self._directory = directory
        self._greets = greets
        self._finished = threading.Event()

    def run(self) -> None:
        while not self._finished.is_set():
            name = f"client{len(self.names)}"
            assert self._greets(self._directory, name.encode())
            os.unlink(self._directory / name)
            self.names.append(name)

    def wait_for(self, count: int, wait_for) -> None:
        """Wait until so many more clients have been served."""
        seen = len(self.names) + count
        wait_for(lambda: len(self.names) >= seen)

    def finish(self) -> list[str]:
        self._finished.set()
        self.join(DEADLINE)
        return self.names


def text_of(directory: Path, prefix: str) -> str:
    """Return the content of all files with a prefix; decompress those that end in .gz."""
    found = ""
    for path in sorted(directory.glob(f"{prefix}*")):
        data = path.read_bytes()
        found += (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return found


def clients_in(text: str) -> Counter:
    """Return how often each client of Traffic occurs, in complete lines of the access log."""
    return Counter(re.findall(r"(?m)^start=\S+ peer=\S*/(client\d+) .* worker=\S+$", text))


def open_files(process: subprocess.Popen, directory: Path) -> set[str]:
    """Return the names of the files in a directory that a process has open."""
    names = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            path = Path(os.readlink(descriptor))
            names |= {path.name} if path.parent == directory else set()
    return names


def rotate(config: Path) -> None:
    done = subprocess.run(
        [str(LOGROTATE), "--force", f"--state={config}.state", str(config)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


# --- logrotate ---


@needs_logrotate
@pytest.mark.parametrize(
    ("how", "signalled"),
    [("create 0604", True), ("nocreate", True), ("copytruncate", False), ("copytruncate", True)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("workers", [1, 2])
def test_logrotate_loses_no_record_and_leaves_no_extra_file(
    start, tmp_path, greets, wait_for, how, signalled, workers
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o755)
    process = start(
        *("--access-log=logs/access.log", "--log-files=0", f"--workers={workers}"),
        twistd=("--logfile=logs/rt.log",),
        stderr=subprocess.DEVNULL,
    )
    postrotate = f"postrotate\nkill -USR1 {process.pid}\nendscript" if signalled else ""
    wait_for(lambda: "listening on" in (logs / "rt.log").read_text())  # a worker may serve before the others are ready
    config = tmp_path / "config"
    config.write_text(f"{logs}/*.log {{\nrotate 9\ncompress\ndelaycompress\n{how}\nsharedscripts\n{postrotate}\n}}\n")
    config.chmod(0o644)
    names: list[str] = []
    for number in range(5):
        if how == "copytruncate" or number == 0:
            traffic = Traffic(tmp_path, greets, names)
            traffic.start()
        traffic.wait_for(20, wait_for)
        if how == "copytruncate":  # lines written between copy and truncation are always lost
            names = traffic.finish()
            wait_for(lambda names=names: clients_in(text_of(logs, "access.log")).total() == len(names))
        rotate(config)
        if signalled:
            wait_for(lambda: open_files(process, logs) == {"access.log", "rt.log"})
        if number == 0 and how.startswith("create"):
            assert {stat.S_IMODE(path.stat().st_mode) for path in logs.glob("*.log")} == {0o604}
    if traffic.is_alive():
        traffic.wait_for(20, wait_for)
        names = traffic.finish()
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert clients_in(text_of(logs, "access.log")) == dict.fromkeys(names, 1)
    log_text = text_of(logs, "rt.log")
    assert "\0" not in log_text
    assert len(re.findall("listening on unix:", log_text)) == 1
    assert log_text.count("Server Shut Down.") == 1
    assert all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in log_text.splitlines())
    rotated = {"", ".1", ".2.gz", ".3.gz", ".4.gz", ".5.gz"}
    assert {path.name for path in logs.iterdir()} == {
        f"{log}{end}" for log in ("access.log", "rt.log") for end in rotated
    }


@needs_logrotate
@as_root
def test_the_logrotate_snippet_works_after_privileges_are_dropped(start, public, tmp_path, greets, wait_for) -> None:
    logs = public / "log"
    logs.mkdir(mode=0o755)
    process = start(
        f"--access-log={logs}/rtservice-access.log",
        *("--log-files", "0"),
        twistd=(f"--logfile={logs}/rtservice.log", "--uid=nobody", f"--rundir={public}"),
        stderr=subprocess.DEVNULL,
    )
    (public / "rtservice.pid").write_text(f"{process.pid}\n")
    config = public / "rtservice"
    text = (ETC / "logrotate.d" / "rtservice").read_text()
    config.write_text(text.replace("/var/log", str(logs)).replace("/run/rtservice.pid", f"{public}/rtservice.pid"))
    config.chmod(0o644)
    traffic = Traffic(tmp_path, greets)
    traffic.start()
    for _ in range(3):
        traffic.wait_for(20, wait_for)
        (logs / "rtservice.log").open("a").write("an operator's note\n")  # because of notifempty
        wait_for(lambda: clients_in((logs / "rtservice-access.log").read_text()))
        rotate(config)
    names = traffic.finish()
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert clients_in(text_of(logs, "rtservice-access.log")) == dict.fromkeys(names, 1)
    log_text = text_of(logs, "rtservice.log")
    assert log_text.count("Server Shut Down.") == 1
    assert "cannot be" not in log_text
    for path in logs.glob("*.log"):
        state = path.stat()
        assert (stat.S_IMODE(state.st_mode), state.st_uid) == (0o640, 65534)
    assert len([*logs.iterdir()]) == 8


# --- permissions and directories ---


@as_root
def test_a_log_file_without_permission_is_reported_and_reopened_once_permitted(
    start, public, tmp_path, wait_for, greets
) -> None:
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        process = start(
            f"--access-log={public}/access",
            twistd=(f"--logfile={public}/log", "--uid=nobody", f"--rundir={public}"),
            stderr=stderr,
        )
    for name in ("log", "access"):
        (public / name).rename(public / f"{name}.moved")
        (public / name).touch(0o600)  # owned by root
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
        assert greets(tmp_path)
    moved = public / "log.moved"
    for name in ("log", "access"):
        report = f"{public}/{name}: cannot be reopened: Permission denied; {STILL}"
        wait_for(lambda report=report: report in moved.read_text() and report in errors.read_text())
        assert (moved.read_text().count(report), errors.read_text().count(report)) == (1, 1)
    wait_for(lambda: (public / "access.moved").read_text().count("\n") >= 4)
    for name in ("log", "access"):
        os.chown(public / name, 65534, -1)
    # Without another signal.
    wait_for(lambda: "reopened: lines go to the file at its path again" in (public / "log").read_text())
    wait_for(lambda: greets(tmp_path) and (public / "access").read_text())
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert (public / "log").read_text().endswith("Server Shut Down.\n")
    assert stat.S_IMODE((public / "log").stat().st_mode) == 0o600


@as_root
@pytest.mark.parametrize("inside", [True, False])
def test_log_files_inside_and_outside_the_chroot_are_reopened(start, tmp_path, wait_for, greets, inside) -> None:
    root = tmp_path / "root"
    root.mkdir()
    directory = root if inside else tmp_path
    process = start(
        *("--access-log=/access", "--log-files=5"),
        twistd=(f"--logfile={directory}/log", f"--chroot={root}"),
        root=root,
        stderr=subprocess.DEVNULL,
    )
    wait_for((root / "access").read_text)
    (root / "access").rename(root / "access.moved")
    process.send_signal(signal.SIGUSR1)
    wait_for((directory / "log.1").exists)
    wait_for((root / "access").exists)
    assert greets(root)
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert (directory / "log").read_text().endswith("Server Shut Down.\n")
    assert (root / "access").read_text().count("\n") == 1


def test_a_replaced_log_directory_is_used_once_it_exists(start, tmp_path, wait_for, greets) -> None:
    logs, away = tmp_path / "logs", tmp_path / "away"
    logs.mkdir()
    process = start("--access-log=logs/access", twistd=("--logfile=logs/log",), stderr=subprocess.DEVNULL)
    logs.rename(away)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: (away / "log").read_text().count("cannot be reopened: No such file or directory") == 2)
    assert greets(tmp_path)
    wait_for(lambda: (away / "access").read_text().count("\n") == 2)
    logs.mkdir()
    wait_for(lambda: (logs / "log").exists() and (logs / "access").exists())  # without another signal
    assert greets(tmp_path)
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert "\n" in (logs / "access").read_text()
    assert (logs / "log").read_text().endswith("Server Shut Down.\n")


def test_an_output_that_cannot_be_reopened_does_not_affect_the_others(start, tmp_path, wait_for, greets) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    process = start("--access-log=two/access", twistd=("--logfile=one/log",), stderr=subprocess.DEVNULL)
    (tmp_path / "one").rename(tmp_path / "away")
    (tmp_path / "two" / "access").rename(tmp_path / "two" / "access.moved")
    process.send_signal(signal.SIGUSR1)
    wait_for((tmp_path / "two" / "access").exists)
    assert greets(tmp_path)
    wait_for(lambda: "\n" in (tmp_path / "two" / "access").read_text())
    assert "access" not in (tmp_path / "away" / "log").read_text().partition("cannot be")[2]


@pytest.mark.parametrize("logger", ["classic", "json", "text"])
def test_a_removed_log_file_is_created_again_in_every_format(start, tmp_path, wait_for, greets, logger) -> None:
    log = tmp_path / "log"
    process = start(twistd=(f"--logger=rtservice.observe.logs.{logger}", f"--logfile={log}"), stderr=subprocess.DEVNULL)
    log.unlink()
    assert greets(tmp_path)
    wait_for(lambda: log.exists() and log.read_text().count("22") >= 1)
    process.terminate()
    assert process.wait(DEADLINE) == 0


# --- several writers of one file ---


def test_a_draining_process_and_its_successor_share_log_files(start, tmp_path, wait_for, greets) -> None:
    log, access = tmp_path / "log", tmp_path / "access"
    options = ("--access-log=access", "--drain-timeout=60")
    first = start(*options, twistd=("--logfile=log",), stderr=subprocess.DEVNULL)
    with socket.socket(socket.AF_UNIX) as held:
        held.connect(f"{tmp_path}/s")
        assert held.recv(100)
        first.terminate()
        wait_for(lambda: "SIGTERM received" in log.read_text())
        successor = start(*options, twistd=("--logfile=log",), stderr=subprocess.DEVNULL)
        for _ in range(20):
            assert greets(tmp_path)
        for process in (first, successor):
            process.send_signal(signal.SIGUSR1)
        wait_for((tmp_path / "log.1").exists)
        (tmp_path / "access").rename(tmp_path / "access.1")
        for process in (first, successor):
            process.send_signal(signal.SIGUSR1)
        wait_for(access.exists)
        held.sendall(b"still here")
        assert held.recv(100) == b"still here"
    assert first.wait(DEADLINE) == 0
    successor.terminate()
    assert successor.wait(DEADLINE) == 0
    log_text = text_of(tmp_path, "log")
    assert log_text.count("listening on unix:") == log_text.count("Server Shut Down.") == 2
    assert all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in log_text.splitlines())
    assert "\0" not in log_text
    lines = text_of(tmp_path, "access").splitlines()
    assert len([line for line in lines if "in=0 out=22" in line]) >= 22
    assert len([line for line in lines if "in=10 out=32" in line]) == 1
    assert all(re.fullmatch(r"start=.* worker=-", line) for line in lines)


@pytest.mark.parametrize("spelled", ["log", "./log", "link", "hard"])
def test_one_file_can_be_both_log_and_access_log(start, tmp_path, wait_for, greets, spelled) -> None:
    log = tmp_path / "log"
    log.touch()
    (tmp_path / "link").symlink_to(log)
    (tmp_path / "hard").hardlink_to(log)
    process = start(f"--access-log={spelled}", twistd=("--logfile=log",), stderr=subprocess.DEVNULL)
    for _ in range(10):
        assert greets(tmp_path)
    wait_for(lambda: len(re.findall("(?m)^start=", log.read_text())) == 11)
    process.send_signal(signal.SIGUSR1)
    wait_for((tmp_path / "log.1").exists)
    for _ in range(10):
        assert greets(tmp_path)
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert len(re.findall("(?m)^start=.* worker=-$", log.read_text())) == 10
    assert not (tmp_path / "log.2").exists()


# --- rotation ---


@pytest.mark.parametrize(("option", "kept"), [((), 4), (("--log-files=2",), 2), (("--log-files=0",), 0)])
def test_log_files_sets_the_number_of_rotated_files(start, tmp_path, wait_for, greets, option, kept) -> None:
    log = tmp_path / "log"
    process = start(*option, twistd=("--logfile=log",), stderr=subprocess.DEVNULL)
    for number in range(4):
        assert greets(tmp_path)
        wait_for(lambda: "bytes in" in log.read_text())
        inode = log.stat().st_ino
        process.send_signal(signal.SIGUSR1)
        if kept:
            wait_for(lambda inode=inode: log.exists() and log.stat().st_ino != inode)
        else:
            assert greets(tmp_path)
            wait_for(lambda number=number: log.read_text().count("bytes in") >= 2 * (number + 1))
            assert log.stat().st_ino == inode
    assert len([*tmp_path.glob("log.*")]) == kept


def test_files_beyond_log_files_are_kept_and_reported_once(start, tmp_path, wait_for) -> None:
    log = tmp_path / "log"
    for number in range(1, 61):
        (tmp_path / f"log.{number}").write_text(f"{number}\n")
    process = start(twistd=("--logfile=log",), stderr=subprocess.DEVNULL)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: "listening on" in (tmp_path / "log.1").read_text())
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert text_of(tmp_path, "log").count(f"{log}.31 and older files not rotated: --log-files is 30") == 1
    # The file that was number 30 is removed.
    numbers = {int(path.read_text()) for path in tmp_path.glob("log.*") if path.name != "log.1"}
    assert numbers == {*range(1, 61)} - {30}


def test_redirected_standard_output_has_no_hole_after_truncation(start, tmp_path, wait_for, greets) -> None:
    output = tmp_path / "output"
    with output.open("wb") as stream:
        start(stdout=stream, stderr=stream)
    wait_for(lambda: "listening on" in output.read_text())
    os.truncate(output, 0)
    assert greets(tmp_path)
    wait_for(lambda: "bytes in" in output.read_text())
    assert b"\0" not in output.read_bytes()
