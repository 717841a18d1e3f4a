"""A log file that is moved, copied, truncated, replaced, removed or inaccessible: no line is lost."""

import errno
import os
import stat

import pytest

from rtservice.observe import logfile
from rtservice.observe.lines import LineWriter
from rtservice.observe.logfile import FileEvent, Found, LogFile, Step, check_file, decide
from tests.support.log_texts import STILL

LONG = "x" * 1023 + "\n"


@pytest.fixture
def opened():
    """Open a LogFile with a LineWriter; the file is closed after the test."""
    files = []

    def open_file(path, *, reactor=None, aside=None, **how) -> LineWriter:
        files.append(LogFile(str(path), **how))
        lines = LineWriter(files[-1], aside=aside, clock=reactor.seconds if reactor else lambda: 0.0)
        if reactor:
            lines.start(reactor)
        return lines

    yield open_file
    for file in files:
        file.close()


class Faults:
    """Replacement of the module `os` in log files: injects failures into its functions, and counts the calls."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}  # function: errno
        self.room: int | None = None  # free bytes on the disk
        self.calls = 0

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if not callable(real):
            return real

        def call(*arguments, **named):
            self.calls += 1
            if name in self.failing:
                raise OSError(self.failing[name], os.strerror(self.failing[name]))
            return real(*arguments, **named)

        return call

    def write(self, descriptor: int, data) -> int:
        if self.room is None:
            return os.write(descriptor, data)
        written = os.write(descriptor, data[: self.room])
        self.room -= written
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


@pytest.fixture
def faults(monkeypatch) -> Faults:
    found = Faults()
    monkeypatch.setattr(logfile, "os", found)
    return found


# --- the table ---


@pytest.mark.parametrize(
    ("event", "found", "rotating", "plain"),
    [
        (FileEvent.ASKED, Found.OURS, Step.ROTATE, Step.KEEP),
        (FileEvent.ASKED, Found.EMPTY, Step.KEEP, Step.KEEP),
        (FileEvent.ASKED, Found.OTHER, Step.OPEN, Step.OPEN),
        (FileEvent.ASKED, Found.NOTHING, Step.OPEN, Step.OPEN),
        (FileEvent.FULL, Found.OURS, Step.ROTATE, Step.KEEP),
        (FileEvent.FULL, Found.EMPTY, Step.KEEP, Step.KEEP),
        (FileEvent.FULL, Found.OTHER, Step.OPEN, Step.OPEN),
        (FileEvent.FULL, Found.NOTHING, Step.OPEN, Step.OPEN),
        (FileEvent.REMOVED, Found.OURS, Step.OPEN, Step.OPEN),
        (FileEvent.REMOVED, Found.EMPTY, Step.OPEN, Step.OPEN),
        (FileEvent.REMOVED, Found.OTHER, Step.OPEN, Step.OPEN),
        (FileEvent.REMOVED, Found.NOTHING, Step.OPEN, Step.OPEN),
    ],
)
def test_the_step_depends_on_the_event_and_the_file_at_the_path(event, found, rotating, plain) -> None:
    assert decide(event, found, rotates=True) is rotating
    assert decide(event, found, rotates=False) is plain


# --- opening ---


@pytest.mark.parametrize(
    ("path", "problem"), [("no/such", FileNotFoundError), (".", IsADirectoryError), ("fine", None), ("there", None)]
)
def test_a_check_raises_the_same_errors_as_opening(tmp_path, opened, path, problem) -> None:
    (tmp_path / "there").touch()
    for action in (check_file, opened):
        if problem is None:
            action(f"{tmp_path}/{path}")
        else:
            with pytest.raises(problem):
                action(f"{tmp_path}/{path}")
    assert (tmp_path / "there").read_text() == ""


def test_a_full_device_is_logged_once_and_raises_nothing(opened, logged) -> None:
    aside_lines = []
    under_test = opened("/dev/full", aside=aside_lines.append)
    for _ in range(10):
        under_test.put("x\n")
    assert logged() == ["/dev/full cannot be written: No space left on device"]
    assert aside_lines == ["rtservice: /dev/full cannot be written: No space left on device\n"]


def test_an_incomplete_line_of_an_earlier_process_is_terminated_first(tmp_path, opened) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntw")
    opened(path).put("three\n")
    assert path.read_text() == "one\ntw\nthree\n"


def test_a_named_pipe_and_a_device_are_neither_rotated_nor_read(tmp_path, opened) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for path in (tmp_path / "pipe", "/dev/null"):
        under_test = opened(path, rotated=3, rotate_at=10)
        for _ in range(3):
            under_test.put("0123456789\n")
            under_test.reopen()
    assert os.read(reader, 100) == b"0123456789\n" * 3
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]


# --- reopening ---


def test_a_relative_path_is_reopened_after_a_change_of_directory(tmp_path, opened, monkeypatch) -> None:
    path = tmp_path / "a"
    path.write_text("before\n")
    monkeypatch.chdir(tmp_path)
    under_test = opened("a")
    monkeypatch.chdir("/")
    under_test.put("one\n")
    path.rename(tmp_path / "b")
    under_test.put("two\n")
    under_test.reopen()
    under_test.put("three\n")
    assert (tmp_path / "b").read_text() == "before\none\ntwo\n"
    assert path.read_text() == "three\n"


@pytest.mark.parametrize("rotated", [0, 3])
def test_a_file_created_by_logrotate_is_used_unchanged(tmp_path, opened, rotated) -> None:
    """The directive `create` of logrotate does this."""
    path = tmp_path / "log"
    under_test = opened(path, rotated=rotated)
    under_test.put("one\n")
    path.rename(tmp_path / "log.1")
    path.touch(0o604)
    path.chmod(0o604)
    under_test.put("two\n")
    for _ in range(2):  # the second signal finds an empty file and does nothing
        under_test.reopen()
    under_test.put("three\n")
    assert (tmp_path / "log.1").read_text() == "one\ntwo\n"
    assert path.read_text() == "three\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


@pytest.mark.parametrize("rotated", [0, 3])
@pytest.mark.parametrize("how", ["moved", "removed", "rotated"])
def test_a_new_file_has_the_mode_of_the_previous_one(tmp_path, opened, rotated, how) -> None:
    path = tmp_path / "log"
    under_test = opened(path, rotated=rotated)
    under_test.put("one\n")
    path.chmod(0o664)  # more than the umask permits
    if how == "moved":
        path.rename(tmp_path / "moved")
    elif how == "removed":
        path.unlink()
    under_test.reopen()
    under_test.put("two\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert path.read_text() == ("one\ntwo\n" if how == "rotated" and not rotated else "two\n")


def test_copytruncate_leaves_no_hole_in_the_file(tmp_path, opened) -> None:
    path = tmp_path / "log"
    under_test = opened(path, rotated=3)
    under_test.put("one\n")
    os.truncate(path, 0)
    under_test.put("two\n")
    assert path.read_bytes() == b"two\n"
    os.truncate(path, 2)  # within a line
    under_test.put("three\n")
    assert path.read_bytes() == b"tw\nthree\n"


def test_a_removed_file_is_recreated_for_the_next_line(tmp_path, opened) -> None:
    path = tmp_path / "log"
    under_test = opened(path)
    under_test.put("one\n")
    path.unlink()
    under_test.put("two\n")  # without a signal
    assert path.read_text() == "two\n"


def test_lines_are_buffered_while_a_removed_file_cannot_be_recreated(tmp_path, opened, logged, reactor) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    under_test = opened(directory / "log", reactor=reactor)
    under_test.put("one\n", at_once=True)
    (directory / "log").unlink()
    directory.rmdir()
    under_test.put("two\n", at_once=True)
    under_test.reopen()
    reactor.pump([0.1] * 20)
    directory.mkdir()
    reactor.pump([0.1] * 100)
    assert (directory / "log").read_text() == "two\n"
    assert under_test.dropped == 0
    assert sorted(logged()) == sorted(
        [
            f"{directory}/log cannot be written: No such file or directory",
            f"{directory}/log: cannot be reopened: No such file or directory; {STILL}",
            f"{directory}/log reopened: lines go to the file at its path again",
            f"{directory}/log is written again, lines dropped: 0",
        ]
    )
    assert reactor.getDelayedCalls() == []


@pytest.mark.parametrize("rotated", [0, 3])
@pytest.mark.parametrize("problem", [errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EROFS])
def test_the_old_file_stays_open_until_the_new_one_can_be_opened(
    tmp_path, opened, faults, logged, reactor, problem, rotated
) -> None:
    aside_lines = []
    path = tmp_path / "log"
    under_test = opened(path, rotated=rotated, reactor=reactor, aside=aside_lines.append)
    path.rename(tmp_path / "moved")
    faults.failing["open"] = problem
    for number in range(3):  # each signal causes a retry, and the first one a report
        under_test.reopen()
        under_test.put(f"{number}\n", at_once=True)
    reactor.pump([0.1] * 50)
    assert (tmp_path / "moved").read_text() == "0\n1\n2\n"
    report = f"{path}: cannot be reopened: {os.strerror(problem)}; {STILL}"
    assert logged() == [report]
    assert aside_lines == [f"rtservice: {report}\n"]
    faults.failing.clear()
    reactor.pump([0.1] * 650)  # without a signal
    under_test.put("new\n", at_once=True)
    assert path.read_text() == "new\n"
    assert logged()[1:] == [f"{path} reopened: lines go to the file at its path again"]
    assert reactor.getDelayedCalls() == []


def test_retries_of_a_lasting_failure_and_reports_of_an_intermittent_one_are_limited(
    tmp_path, opened, faults, logged, reactor
) -> None:
    path = tmp_path / "log"
    under_test = opened(path, reactor=reactor)
    path.rename(tmp_path / "moved")
    faults.failing["open"] = errno.EACCES
    under_test.reopen()
    before = faults.calls
    reactor.pump([1.0] * 3600)
    assert faults.calls - before < 70 * 5
    for _ in range(600):  # one minute
        faults.failing["open"] = errno.EACCES
        path.rename(tmp_path / "moved") if path.exists() else None
        under_test.reopen()
        faults.failing.clear()
        under_test.reopen()
        reactor.advance(0.1)
    assert 4 <= len([line for line in logged() if "cannot be reopened" in line]) <= 8


def test_a_recreated_directory_is_used_again(tmp_path, opened, logged, reactor) -> None:
    directory, away = tmp_path / "logs", tmp_path / "away"
    directory.mkdir()
    under_test = opened(directory / "log", rotated=3, reactor=reactor)
    under_test.put("one\n", at_once=True)
    directory.rename(away)
    under_test.reopen()
    under_test.put("two\n", at_once=True)
    directory.mkdir()
    reactor.pump([0.1] * 50)
    under_test.put("three\n", at_once=True)
    assert os.listdir(away) == ["log"]
    assert (away / "log").read_text() == "one\ntwo\n"
    assert (directory / "log").read_text() == "three\n"
    assert len(logged()) == 2


def test_rotation_works_after_access_to_a_parent_directory_is_lost(tmp_path, opened, monkeypatch) -> None:
    """Root opens the file, then --uid changes the user."""
    path = tmp_path / "log"
    under_test = opened(path, rotated=3)
    real = os.open

    def open_unprivileged(name, flags, mode=0o777, *, dir_fd=None) -> int:
        if "/" in name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(name, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(logfile.os, "open", open_unprivileged)
    under_test.put("one\n")
    under_test.reopen()
    under_test.put("two\n")
    assert (tmp_path / "log.1").read_text() == "one\n"
    assert path.read_text() == "two\n"


@pytest.mark.parametrize("what", ["directory", "link to nothing", "link to a file", "pipe without a reader"])
def test_no_line_is_lost_when_something_else_replaces_the_file(tmp_path, opened, logged, what) -> None:
    path, elsewhere = tmp_path / "log", tmp_path / "elsewhere"
    under_test = opened(path, rotated=3)
    path.rename(tmp_path / "moved")
    if what == "directory":
        path.mkdir()
    elif what == "pipe without a reader":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)
        if what == "link to a file":
            elsewhere.write_text("there\n")
    under_test.reopen()
    under_test.put("one\n")
    if what.startswith("link"):
        assert elsewhere.read_text().endswith("one\n")
        assert logged() == []
    else:
        assert (tmp_path / "moved").read_text() == "one\n"
        assert len(logged()) == 1


# --- rotation ---


def test_a_file_is_rotated_at_its_size_limit_and_on_reopen(tmp_path, opened) -> None:
    path = tmp_path / "t.log"
    path.write_text("before\n")
    under_test = opened(path, rotated=30)
    under_test.put("one\n")
    under_test.reopen()
    under_test.put("x" * 1_000_000 + "\n")
    under_test.put("two\n")
    assert path.read_text() == "two\n"
    assert (tmp_path / "t.log.2").read_text() == "before\none\n"
    assert (tmp_path / "t.log.1").stat().st_size == 1_000_001


def test_only_the_configured_number_of_rotated_files_is_kept(tmp_path, opened) -> None:
    under_test = opened(tmp_path / "log", rotated=3)
    for number in range(10):
        under_test.put(f"{number}\n")
        under_test.reopen()
    shown = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)}
    assert shown == {"log": "", "log.1": "9\n", "log.2": "8\n", "log.3": "7\n"}


def test_no_file_is_renamed_when_rotation_is_disabled(tmp_path, opened) -> None:
    under_test = opened(tmp_path / "log", rotate_at=10)
    for _ in range(3):
        under_test.put("0123456789\n")
        under_test.reopen()
    assert os.listdir(tmp_path) == ["log"]


def test_rotation_fills_a_gap_in_the_numbers_and_keeps_higher_numbers(tmp_path, opened) -> None:
    for number in (1, 2, 4, 7, 1000):
        (tmp_path / f"log.{number}").write_text(str(number))
    file = LogFile(f"{tmp_path}/log", rotated=5)
    assert file.beyond == ""
    file.close()
    under_test = opened(tmp_path / "log", rotated=5)
    under_test.put("new\n")
    under_test.reopen()
    shown = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)}
    named = {"log.1": "new\n", "log.2": "1", "log.3": "2", "log.4": "4", "log.7": "7", "log.1000": "1000"}
    assert shown == {"log": "", **named}


def test_20000_older_files_do_not_slow_a_rotation_and_are_kept(tmp_path, opened, faults) -> None:
    (tmp_path / "log.1").touch()
    for number in range(2, 20_001):
        os.link(tmp_path / "log.1", f"{tmp_path}/log.{number}")
    file = LogFile(f"{tmp_path}/log", rotated=30)
    assert file.beyond == f"{tmp_path}/log.31"
    file.close()
    under_test = opened(tmp_path / "log", rotated=30, rotate_at=100)
    for _ in range(3):
        under_test.put(LONG)
        before = faults.calls
        under_test.put(LONG)  # this rotates
        assert faults.calls - before < 2 * 30 + 30
    assert len(os.listdir(tmp_path)) == 20_001


@pytest.mark.parametrize("at", ["log.2", "log.3"])
def test_a_failed_rename_stops_the_rotation_without_loss(tmp_path, opened, logged, reactor, at) -> None:
    under_test = opened(tmp_path / "log", rotated=3, reactor=reactor)
    for number in range(2):
        under_test.put(f"{number}\n", at_once=True)
        under_test.reopen()
    (tmp_path / at).rename(tmp_path / "aside") if (tmp_path / at).exists() else None
    (tmp_path / at / "full").mkdir(parents=True)  # a directory at the path of a rotated file
    if at == "log.2":  # the directory can be renamed, but not replaced
        (tmp_path / "log.3" / "full").mkdir(parents=True)
    under_test.put("2\n", at_once=True)
    under_test.reopen()
    under_test.put("3\n", at_once=True)
    assert (tmp_path / "log").read_text() == "2\n3\n"
    assert len(logged()) == 1
    assert f"{tmp_path}/log: cannot be rotated: " in logged()[0]
    for name in {at, "log.3"}:
        (tmp_path / name).rename(tmp_path / f"{name}.away")
    reactor.pump([0.1] * 100)  # retried
    assert (tmp_path / "log.1").read_text() == "2\n3\n"


def test_a_rotation_that_cannot_create_the_new_file_is_completed_later(tmp_path, opened, faults, reactor) -> None:
    path = tmp_path / "log"
    under_test = opened(path, rotated=3, reactor=reactor)
    under_test.put("one\n", at_once=True)
    real = os.open

    def open_existing_only(name, flags, *arguments, **named) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(name, flags, *arguments, **named)

    faults.open = open_existing_only
    under_test.reopen()
    under_test.put("two\n", at_once=True)
    assert (tmp_path / "log.1").read_text() == "one\ntwo\n"
    del faults.open
    reactor.pump([0.1] * 50)
    under_test.put("three\n", at_once=True)
    assert path.read_text() == "three\n"
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


# --- two processes ---


def test_two_processes_rotate_a_shared_file_once(tmp_path, opened) -> None:
    path = tmp_path / "log"
    first, second = (opened(path, rotated=5, rotate_at=10) for _ in range(2))
    first.put("0123456789\n")
    second.put("abc\n")  # this rotates
    first.put("def\n")  # this does not
    assert (tmp_path / "log.1").read_text() == "0123456789\n"
    assert path.read_text() == "abc\ndef\n"
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


def test_a_process_writes_on_while_another_rotates_and_then_reopens(tmp_path, opened) -> None:
    path = tmp_path / "log"
    holder = LogFile(str(path), rotated=5)
    under_test = opened(path, rotated=5)
    under_test.put("one\n")
    logfile.fcntl.flock(holder.fileno(), logfile.fcntl.LOCK_EX)  # during its rotation
    under_test.reopen()
    under_test.put("two\n")
    path.rename(tmp_path / "log.1")
    path.touch()
    holder.close()
    under_test.put("three\n")
    assert (tmp_path / "log.1").read_text() == "one\ntwo\n"
    assert path.read_text() == "three\n"


def test_rotation_works_on_a_file_system_without_locks(tmp_path, opened, monkeypatch) -> None:
    def refuse(descriptor, operation) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(logfile.fcntl, "flock", refuse)
    under_test = opened(tmp_path / "log", rotated=5)
    under_test.put("one\n")
    under_test.reopen()
    assert (tmp_path / "log.1").read_text() == "one\n"


# --- a full disk cuts a line ---


def test_a_line_cut_by_a_full_disk_is_completed(tmp_path, opened, faults) -> None:
    under_test = opened(tmp_path / "log")
    faults.room = 7
    under_test.put("one\n")
    under_test.put("second\n")
    faults.room = None
    under_test.put("third\n")
    assert (tmp_path / "log").read_text() == "one\nsecond\nthird\n"


@pytest.mark.parametrize("how", ["moved", "truncated", "other process"])
def test_a_cut_line_is_written_again_when_it_cannot_be_completed(tmp_path, opened, faults, how) -> None:
    path = tmp_path / "log"
    under_test = opened(path)
    faults.room = 7
    under_test.put("one\n")
    under_test.put("second\n")
    if how == "moved":
        path.rename(tmp_path / "moved")
        under_test.reopen()
    elif how == "truncated":
        os.truncate(path, 0)
    else:
        with path.open("a") as second:
            second.write("\nother\n")
    for room in (3, 1, 2, None):  # pieces shorter than the text to be written again
        faults.room = room
        under_test.put("more\n")
    whole = "second\nmore\nmore\nmore\nmore\n"
    assert path.read_text() == ("one\nsec\nother\n" + whole if how == "other process" else whole)


def test_a_cut_line_is_written_again_to_a_pipe_that_replaced_the_file(tmp_path, opened, faults) -> None:
    path = tmp_path / "log"
    under_test = opened(path)
    faults.room = 3
    under_test.put("second\n")
    faults.room = None
    path.unlink()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    under_test.reopen()
    under_test.put("third\n")
    assert os.read(reader, 100) == b"second\nthird\n"
    os.close(reader)


# --- descriptors ---


def test_failures_leak_no_descriptors(tmp_path, opened, faults) -> None:
    path = tmp_path / "log"
    under_test = opened(path, rotated=3, rotate_at=10)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        faults.failing = {} if number % 2 else {("open", "rename", "fchmod", "pread", "lseek")[number % 5]: errno.EIO}
        under_test.put("0123456789\n")
        under_test.reopen()
        if number % 3 == 0:
            path.unlink(missing_ok=True)
    assert len(os.listdir("/proc/self/fd")) == before
