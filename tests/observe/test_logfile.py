"""A log file that is moved, copied, truncated, replaced, removed, or out of reach, and what becomes of its lines."""

import errno
import os
import stat

import pytest

from rtservice.observe import logfile
from rtservice.observe.lines import LineWriter
from rtservice.observe.logfile import Event, Found, LogFile, Step, check_file, decide
from tests.support.log_texts import STILL

LONG = "x" * 1023 + "\n"


@pytest.fixture
def opened():
    """Lines to a LogFile, which is closed after the test."""
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
    """The module `os` as log files see it, with functions that fail when the test says so, and a count of calls."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}  # function: errno
        self.room: int | None = None  # bytes that the disk has
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
        (Event.ASKED, Found.OURS, Step.ROTATE, Step.KEEP),
        (Event.ASKED, Found.EMPTY, Step.KEEP, Step.KEEP),
        (Event.ASKED, Found.OTHER, Step.OPEN, Step.OPEN),
        (Event.ASKED, Found.NOTHING, Step.OPEN, Step.OPEN),
        (Event.FULL, Found.OURS, Step.ROTATE, Step.KEEP),
        (Event.FULL, Found.EMPTY, Step.KEEP, Step.KEEP),
        (Event.FULL, Found.OTHER, Step.OPEN, Step.OPEN),
        (Event.FULL, Found.NOTHING, Step.OPEN, Step.OPEN),
        (Event.REMOVED, Found.OURS, Step.OPEN, Step.OPEN),
        (Event.REMOVED, Found.EMPTY, Step.OPEN, Step.OPEN),
        (Event.REMOVED, Found.OTHER, Step.OPEN, Step.OPEN),
        (Event.REMOVED, Found.NOTHING, Step.OPEN, Step.OPEN),
    ],
)
def test_each_event_and_what_is_at_the_path_has_one_step(event, found, rotating, plain) -> None:
    assert decide(event, found, rotates=True) is rotating
    assert decide(event, found, rotates=False) is plain


# --- opened ---


@pytest.mark.parametrize(
    ("path", "problem"), [("no/such", FileNotFoundError), (".", IsADirectoryError), ("fine", None), ("there", None)]
)
def test_a_check_finds_what_opening_would(tmp_path, opened, path, problem) -> None:
    (tmp_path / "there").touch()
    for action in (check_file, opened):
        if problem is None:
            action(f"{tmp_path}/{path}")
        else:
            with pytest.raises(problem):
                action(f"{tmp_path}/{path}")
    assert (tmp_path / "there").read_text() == ""


def test_a_full_device_is_reported_once_and_nothing_is_raised(opened, said) -> None:
    told = []
    under_test = opened("/dev/full", aside=told.append)
    for _ in range(10):
        under_test.put("x\n")
    assert said() == ["/dev/full cannot be written: No space left on device"]
    assert told == ["rtservice: /dev/full cannot be written: No space left on device\n"]


def test_a_line_that_an_earlier_process_could_not_finish_is_not_continued(tmp_path, opened) -> None:
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


# --- reopened ---


def test_a_file_is_found_again_wherever_the_process_has_gone(tmp_path, opened, monkeypatch) -> None:
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
def test_a_file_that_somebody_else_made_is_used_as_it_is(tmp_path, opened, rotated) -> None:
    """`create` of logrotate."""
    path = tmp_path / "log"
    under_test = opened(path, rotated=rotated)
    under_test.put("one\n")
    path.rename(tmp_path / "log.1")
    path.touch(0o604)
    path.chmod(0o604)
    under_test.put("two\n")
    for _ in range(2):  # a second signal finds an empty file, of which nothing is to be made
        under_test.reopen()
    under_test.put("three\n")
    assert (tmp_path / "log.1").read_text() == "one\ntwo\n"
    assert path.read_text() == "three\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


@pytest.mark.parametrize("rotated", [0, 3])
@pytest.mark.parametrize("how", ["moved", "removed", "rotated"])
def test_a_file_that_is_created_has_the_mode_of_the_one_before(tmp_path, opened, rotated, how) -> None:
    path = tmp_path / "log"
    under_test = opened(path, rotated=rotated)
    under_test.put("one\n")
    path.chmod(0o664)  # more than the umask leaves
    if how == "moved":
        path.rename(tmp_path / "moved")
    elif how == "removed":
        path.unlink()
    under_test.reopen()
    under_test.put("two\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert path.read_text() == ("one\ntwo\n" if how == "rotated" and not rotated else "two\n")


def test_a_copied_and_truncated_file_has_no_hole(tmp_path, opened) -> None:
    path = tmp_path / "log"
    under_test = opened(path, rotated=3)
    under_test.put("one\n")
    os.truncate(path, 0)
    under_test.put("two\n")
    assert path.read_bytes() == b"two\n"
    os.truncate(path, 2)  # within a line
    under_test.put("three\n")
    assert path.read_bytes() == b"tw\nthree\n"


def test_lines_go_to_no_file_that_has_been_removed(tmp_path, opened) -> None:
    path = tmp_path / "log"
    under_test = opened(path)
    under_test.put("one\n")
    path.unlink()
    under_test.put("two\n")  # without a signal
    assert path.read_text() == "two\n"


def test_lines_are_kept_while_their_file_is_removed_and_no_other_can_be_opened(tmp_path, opened, said, reactor) -> None:
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
    assert sorted(said()) == sorted(
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
def test_a_file_that_cannot_be_opened_keeps_the_old_one_until_it_can(
    tmp_path, opened, faults, said, reactor, problem, rotated
) -> None:
    told = []
    path = tmp_path / "log"
    under_test = opened(path, rotated=rotated, reactor=reactor, aside=told.append)
    path.rename(tmp_path / "moved")
    faults.failing["open"] = problem
    for number in range(3):  # each signal is followed by a try, and the first one by a report
        under_test.reopen()
        under_test.put(f"{number}\n", at_once=True)
    reactor.pump([0.1] * 50)
    assert (tmp_path / "moved").read_text() == "0\n1\n2\n"
    report = f"{path}: cannot be reopened: {os.strerror(problem)}; {STILL}"
    assert said() == [report]
    assert told == [f"rtservice: {report}\n"]
    faults.failing.clear()
    reactor.pump([0.1] * 650)  # without a signal
    under_test.put("new\n", at_once=True)
    assert path.read_text() == "new\n"
    assert said()[1:] == [f"{path} reopened: lines go to the file at its path again"]
    assert reactor.getDelayedCalls() == []


def test_a_failure_that_lasts_costs_few_tries_and_one_that_comes_and_goes_few_reports(
    tmp_path, opened, faults, said, reactor
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
    assert 4 <= len([line for line in said() if "cannot be reopened" in line]) <= 8


def test_a_directory_that_goes_and_comes_back_is_used_again(tmp_path, opened, said, reactor) -> None:
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
    assert len(said()) == 2


def test_a_directory_below_one_that_may_not_be_entered_any_more_is_still_used(tmp_path, opened, monkeypatch) -> None:
    """Root opened it, --uid followed."""
    path = tmp_path / "log"
    under_test = opened(path, rotated=3)
    real = os.open

    def open_as_nobody(name, flags, mode=0o777, *, dir_fd=None) -> int:
        if "/" in name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(name, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(logfile.os, "open", open_as_nobody)
    under_test.put("one\n")
    under_test.reopen()
    under_test.put("two\n")
    assert (tmp_path / "log.1").read_text() == "one\n"
    assert path.read_text() == "two\n"


@pytest.mark.parametrize("what", ["directory", "link to nothing", "link to a file", "pipe without a reader"])
def test_whatever_is_at_the_path_by_then_loses_no_line(tmp_path, opened, said, what) -> None:
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
        assert said() == []
    else:
        assert (tmp_path / "moved").read_text() == "one\n"
        assert len(said()) == 1


# --- rotated ---


def test_a_file_rotates_at_its_size_and_when_it_is_asked_to(tmp_path, opened) -> None:
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


def test_so_many_rotated_files_are_kept_and_no_more(tmp_path, opened) -> None:
    under_test = opened(tmp_path / "log", rotated=3)
    for number in range(10):
        under_test.put(f"{number}\n")
        under_test.reopen()
    shown = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)}
    assert shown == {"log": "", "log.1": "9\n", "log.2": "8\n", "log.3": "7\n"}


def test_no_file_is_renamed_when_none_is_to_be_kept(tmp_path, opened) -> None:
    under_test = opened(tmp_path / "log", rotate_at=10)
    for _ in range(3):
        under_test.put("0123456789\n")
        under_test.reopen()
    assert os.listdir(tmp_path) == ["log"]


def test_a_gap_in_the_numbers_is_filled_and_what_is_above_it_stays(tmp_path, opened) -> None:
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


def test_twenty_thousand_older_files_cost_a_rotation_nothing_and_are_left_alone(tmp_path, opened, faults) -> None:
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
        under_test.put(LONG)  # which rotates
        assert faults.calls - before < 2 * 30 + 30
    assert len(os.listdir(tmp_path)) == 20_001


@pytest.mark.parametrize("at", ["log.2", "log.3"])
def test_what_cannot_be_renamed_stops_a_rotation_and_loses_nothing(tmp_path, opened, said, reactor, at) -> None:
    under_test = opened(tmp_path / "log", rotated=3, reactor=reactor)
    for number in range(2):
        under_test.put(f"{number}\n", at_once=True)
        under_test.reopen()
    (tmp_path / at).rename(tmp_path / "aside") if (tmp_path / at).exists() else None
    (tmp_path / at / "full").mkdir(parents=True)  # a directory where a file is to be
    if at == "log.2":  # which may be renamed, but not replaced
        (tmp_path / "log.3" / "full").mkdir(parents=True)
    under_test.put("2\n", at_once=True)
    under_test.reopen()
    under_test.put("3\n", at_once=True)
    assert (tmp_path / "log").read_text() == "2\n3\n"
    assert len(said()) == 1
    assert f"{tmp_path}/log: cannot be rotated: " in said()[0]
    for name in {at, "log.3"}:
        (tmp_path / name).rename(tmp_path / f"{name}.away")
    reactor.pump([0.1] * 100)  # tried again
    assert (tmp_path / "log.1").read_text() == "2\n3\n"


def test_a_rotation_that_could_not_create_its_file_is_finished_later(tmp_path, opened, faults, reactor) -> None:
    path = tmp_path / "log"
    under_test = opened(path, rotated=3, reactor=reactor)
    under_test.put("one\n", at_once=True)
    real = os.open

    def open_nothing_new(name, flags, *arguments, **named) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(name, flags, *arguments, **named)

    faults.open = open_nothing_new
    under_test.reopen()
    under_test.put("two\n", at_once=True)
    assert (tmp_path / "log.1").read_text() == "one\ntwo\n"
    del faults.open
    reactor.pump([0.1] * 50)
    under_test.put("three\n", at_once=True)
    assert path.read_text() == "three\n"
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


# --- two processes ---


def test_two_processes_rotate_one_file_once(tmp_path, opened) -> None:
    path = tmp_path / "log"
    one, other = (opened(path, rotated=5, rotate_at=10) for _ in range(2))
    one.put("0123456789\n")
    other.put("abc\n")  # which rotates
    one.put("def\n")  # which does not
    assert (tmp_path / "log.1").read_text() == "0123456789\n"
    assert path.read_text() == "abc\ndef\n"
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


def test_who_finds_that_the_other_process_rotates_goes_on_and_follows(tmp_path, opened) -> None:
    path = tmp_path / "log"
    holder = LogFile(str(path), rotated=5)
    under_test = opened(path, rotated=5)
    under_test.put("one\n")
    logfile.fcntl.flock(holder.fileno(), logfile.fcntl.LOCK_EX)  # within its rotation
    under_test.reopen()
    under_test.put("two\n")
    path.rename(tmp_path / "log.1")
    path.touch()
    holder.close()
    under_test.put("three\n")
    assert (tmp_path / "log.1").read_text() == "one\ntwo\n"
    assert path.read_text() == "three\n"


def test_a_file_system_without_locks_rotates_too(tmp_path, opened, monkeypatch) -> None:
    def refuse(descriptor, operation) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(logfile.fcntl, "flock", refuse)
    under_test = opened(tmp_path / "log", rotated=5)
    under_test.put("one\n")
    under_test.reopen()
    assert (tmp_path / "log.1").read_text() == "one\n"


# --- a disk that is full within a line ---


def test_a_line_that_was_cut_by_a_full_disk_is_continued(tmp_path, opened, faults) -> None:
    under_test = opened(tmp_path / "log")
    faults.room = 7
    under_test.put("one\n")
    under_test.put("second\n")
    faults.room = None
    under_test.put("third\n")
    assert (tmp_path / "log").read_text() == "one\nsecond\nthird\n"


@pytest.mark.parametrize("how", ["moved", "truncated", "other process"])
def test_a_line_that_was_cut_begins_again_where_it_cannot_be_continued(tmp_path, opened, faults, how) -> None:
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
        with path.open("a") as other:
            other.write("\nother\n")
    for room in (3, 1, 2, None):  # in pieces, which are shorter than what has to be written again
        faults.room = room
        under_test.put("more\n")
    whole = "second\nmore\nmore\nmore\nmore\n"
    assert path.read_text() == ("one\nsec\nother\n" + whole if how == "other process" else whole)


def test_a_line_that_was_cut_begins_again_in_a_pipe_that_replaced_the_file(tmp_path, opened, faults) -> None:
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


def test_no_descriptor_is_left_behind_whatever_fails(tmp_path, opened, faults) -> None:
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
