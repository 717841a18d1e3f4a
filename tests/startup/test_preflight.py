"""Start errors that are found without starting a process, each reported in one line."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtservice.config.values import SettingError
from rtservice.startup.preflight import check_directories, check_pidfile
from rtservice.startup.start import unexpected


@pytest.fixture
def inaccessible(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A directory of another user that this process may not enter."""
    closed = tmp_path / "closed"
    (closed / "inner").mkdir(parents=True)
    monkeypatch.chdir(closed / "inner")
    (closed / "inner").chmod(0o600)
    closed.chmod(0o600)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield closed
    if root:
        os.seteuid(0)
    closed.chmod(0o700)
    (closed / "inner").chmod(0o700)


def problem(twistd: dict[str, str]) -> str:
    with pytest.raises(SettingError) as caught:
        check_directories(twistd, os.path.abspath)
    return str(caught.value)


@pytest.mark.parametrize("option", ["rundir", "chroot"])
@pytest.mark.parametrize("below", ["", "/inner"])
def test_inaccessible_directory_is_rejected(inaccessible, option, below) -> None:
    path = f"{inaccessible}{below}"
    assert problem({option: path}) == f"--{option} {path}: permission denied"


def test_inaccessible_working_directory_is_rejected_unless_rundir_is_set(inaccessible) -> None:
    assert problem({"rundir": "."}) == (
        "the working directory: permission denied; change to another directory, or set --rundir"
    )
    check_directories({"rundir": "/"}, os.path.abspath)
    check_directories({}, os.path.abspath)  # `twist` has no such options


@pytest.mark.parametrize("name", ["d.pid", "inner/d.pid"])
def test_pidfile_in_an_inaccessible_directory_is_rejected(inaccessible, name) -> None:
    path = f"{inaccessible}/{name}"
    assert problem({"rundir": "/", "pidfile": path}) == f"--pidfile {path}: permission denied"


def test_unreadable_pidfile_is_rejected(tmp_path) -> None:
    (tmp_path / "d.pid").symlink_to("d.pid")
    with pytest.raises(SettingError, match=r"^--pidfile d\.pid: too many levels of symbolic links$"):
        check_pidfile("d.pid", lambda path: f"{tmp_path}/{path}")


@pytest.mark.parametrize("content", ["1", " 4194304\n", "999999999"])
def test_pidfile_with_a_process_id_is_left_to_twistd(tmp_path, content) -> None:
    (tmp_path / "d.pid").write_text(content)
    check_pidfile("d.pid", lambda path: f"{tmp_path}/{path}")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (OSError(errno.EFBIG, "File too large"), "cannot start: file too large"),
        (PermissionError(errno.EACCES, "Permission denied", "/x\ny"), r"cannot start: /x\ny: permission denied"),
        (OSError("of Python's own"), "cannot start: OSError: of Python's own"),
        (MemoryError(), "cannot start: MemoryError"),
        (SystemExit("two\nlines"), "cannot start: SystemExit: two lines"),
    ],
    ids=repr,
)
def test_every_exception_is_reported_in_one_line(error, line) -> None:
    assert unexpected(error) == line


def test_too_many_open_files_is_reported_with_the_descriptor_limit() -> None:
    line = unexpected(OSError(errno.EMFILE, "Too many open files"))
    assert line.startswith("cannot start: too many open files; the limit of descriptors (ulimit -n, LimitNOFILE=) is ")
